"""Every admitted architecture."""

import time
from collections.abc import Iterator, Sequence
from typing import final

from kdnas.architecture import Architecture
from kdnas.runs.entry import Entry
from kdnas.searchers.base import Searcher, TimeOver

_SECONDS = 1.0  # of one batch: where few are admitted they are scored while there is time


@final
class Exhaustive(Searcher):
    """Every distinct admitted network once, depth first, so that shared prefixes are adjacent.

    Reference: none; the definition of the optimum on a space small enough to enumerate.
    """

    stopped = "every admitted architecture was scored"
    _left: Iterator[Architecture] | None = None

    def ask(self, limit: int) -> Sequence[Architecture]:
        """The next networks: at most 4096, and after a second those of that second."""
        self._left = self._left or self._admitted()
        batch: list[Architecture] = []
        began = time.perf_counter()
        try:
            for architecture in self._left:
                batch.append(architecture)
                if len(batch) >= min(limit, 4096) or time.perf_counter() - began > _SECONDS:
                    break
        except TimeOver:
            if not batch:
                raise
        return batch

    def _admitted(self) -> Iterator[Architecture]:
        for architecture in self.space.assignments():
            self.check_time()
            if self.space.canonical(architecture) == architecture and self.admits(architecture):
                yield architecture

    def tell(self, scored: Sequence[Entry]) -> None:
        """Does nothing: the order is fixed."""
