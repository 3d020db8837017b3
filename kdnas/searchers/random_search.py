"""Uniform random search: the control of every other searcher."""

import random
from collections.abc import Callable, Sequence
from typing import final

from kdnas.architecture import Architecture
from kdnas.runs.entry import Entry
from kdnas.searchers.base import Searcher
from kdnas.space import SearchSpace


@final
class RandomSearch(Searcher):
    """Distinct admitted architectures, each choice uniform.

    Reference: Li and Talwalkar, Random Search and Reproducibility for Neural Architecture Search, UAI 2019.
    """

    def __init__(self, *, space: SearchSpace, admits: Callable[[Architecture], bool], rng: random.Random) -> None:
        super().__init__(space=space, admits=admits, rng=rng)
        self._proposed: set[Architecture] = set()

    def ask(self, limit: int) -> Sequence[Architecture]:
        """Architectures not proposed before."""
        return self.propose(min(limit, 64), lambda _: self.sample(), self._proposed)

    def tell(self, scored: Sequence[Entry]) -> None:
        """Does nothing: samples are independent of scores."""

    def begin(self, scored: Sequence[Entry]) -> None:
        """The entries are not proposed again."""
        self._proposed.update(entry.architecture for entry in scored)
