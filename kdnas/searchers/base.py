"""One loop for every search: a searcher asks, a scorer scores, the ranking remembers."""

import abc
import random
from collections.abc import Callable, Sequence
from typing import final

from kdnas.architecture import Architecture
from kdnas.runs.entry import Entry
from kdnas.space import SearchSpace


class Searcher(abc.ABC):
    """Proposes architectures and learns from their scores.

    Built at run time with `space`, `admits` (a test for the budget) and `rng`; everything random is drawn from `rng`,
    so that told the same scores it asks the same questions: that is how a search is resumed.

    Class attributes:
        stopped: why the last `ask` returned nothing.
    """

    def __init__(self, *, space: SearchSpace, admits: Callable[[Architecture], bool], rng: random.Random) -> None:
        self.space, self.admits, self.rng = space, admits, rng

    @abc.abstractmethod
    def ask(self, limit: int) -> Sequence[Architecture]:
        """At most `limit` admitted architectures to score next; none when it is done, and `stopped` says why."""

    @abc.abstractmethod
    def tell(self, scored: Sequence[Entry]) -> None:
        """The scores of what was asked, in that order; of those stopped early, the scores of then."""

    def begin(self, scored: Sequence[Entry]) -> None:
        """Scores of networks that it did not ask for, before it is asked first. Ignored unless overridden."""

    def trace(self) -> dict[str, float]:
        """Numbers worth a curve, after what was told last: such as the entropy of a policy. None unless overridden."""
        return {}

    stopped: str = "it is done"
    _tight: bool = False

    @final
    def sample(self, attempts: int = 200) -> Architecture | None:
        """A random admitted architecture, or None.

        When `attempts` uniform draws found none, the budget is tight: from then on a random walk of mutations from the
        smallest network, within the budget, takes their place.
        """
        for _ in range(0 if self._tight else attempts):
            candidate = self.space.sample(self.rng)
            if self.admits(candidate):
                return candidate
        self._tight = True
        walked = self.space.smallest
        if not self.admits(walked):
            return None
        for _ in range(self.rng.randrange(12)):
            mutant = self.space.mutate(walked, self.rng)
            walked = mutant if self.admits(mutant) else walked
        return walked
