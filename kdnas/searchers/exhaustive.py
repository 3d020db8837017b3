"""Every admitted architecture."""

import itertools
from collections.abc import Iterator, Sequence
from typing import final

from kdnas.architecture import Architecture
from kdnas.runs.entry import Entry
from kdnas.searchers.base import Searcher


@final
class Exhaustive(Searcher):
    """Every distinct admitted network once, depth first, so that shared prefixes are adjacent.

    Reference: none; the definition of the optimum on a space small enough to enumerate.
    """

    stopped = "every admitted architecture was scored"
    _left: Iterator[Architecture] | None = None

    def ask(self, limit: int) -> Sequence[Architecture]:
        """The next networks."""
        if self._left is None:
            self._left = filter(self.admits, self.space.all())
        return list(itertools.islice(self._left, min(limit, 4096)))

    def tell(self, scored: Sequence[Entry]) -> None:
        """Does nothing: the order is fixed."""
