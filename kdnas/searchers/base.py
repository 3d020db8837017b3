"""The base class of searchers."""

import abc
import math
import random
import time
from collections.abc import Callable, Sequence
from typing import final

from kdnas.architecture import Architecture
from kdnas.runs.entry import Entry
from kdnas.space import SearchSpace


class TimeOver(Exception):
    """The time of a search is over while candidates are proposed."""


class Searcher(abc.ABC):
    """Proposes architectures and is told their scores.

    Built at run time with `space`, `admits` (whether an architecture is within the budget) and `rng`. All random
    numbers come from `rng`, so that the proposals follow from the scores: this is how an interrupted search is resumed.

    Attributes:
        stopped: why the last `ask` returned nothing.
        deadline: when the search ends, by `time.perf_counter`; `admits` then raises `TimeOver`.
    """

    def __init__(self, *, space: SearchSpace, admits: Callable[[Architecture], bool], rng: random.Random) -> None:
        self.space, self.rng = space, rng
        self.deadline = math.inf
        self._within = admits

    @final
    def admits(self, architecture: Architecture) -> bool:
        """Whether an architecture is within the budget.

        Raises:
            TimeOver: the search's time is over.
        """
        self.check_time()
        return self._within(architecture)

    @final
    def check_time(self) -> None:
        """Raise `TimeOver` after the deadline: for loops that may not call `admits` for long."""
        if time.perf_counter() >= self.deadline:
            raise TimeOver

    @abc.abstractmethod
    def ask(self, limit: int) -> Sequence[Architecture]:
        """At most `limit` admitted architectures to score next; none when it is done, for the reason in `stopped`."""

    @abc.abstractmethod
    def tell(self, scored: Sequence[Entry]) -> None:
        """The scores of the proposals, in their order; of evaluations stopped early, the last intermediate scores."""

    def begin(self, scored: Sequence[Entry]) -> None:
        """Warm start: called once before the first `ask` with entries scored earlier. Default: ignore them."""

    def trace(self) -> dict[str, float]:
        """Numbers to plot over the search, such as the entropy of a policy; none by default."""
        return {}

    stopped: str = "it is done"
    _tight: bool = False

    @final
    def sample(self, attempts: int = 200) -> Architecture | None:
        """A random admitted architecture, or None.

        After `attempts` uniform samples without an admitted one the budget is tight: from then on the sample is the end
        of a random walk of mutations within the budget, from the smallest network.
        """
        for _ in range(0 if self._tight else attempts):
            candidate = self.space.sample(self.rng)
            if self.admits(candidate):
                return candidate
        self._tight = True
        current = self.space.smallest
        if not self.admits(current):
            return None
        for _ in range(self.rng.randrange(12)):
            mutant = self.space.mutate(current, self.rng)
            current = mutant if self.admits(mutant) else current
        return current

    @final
    def propose(
        self, size: int, draw: Callable[[int], Architecture | None], proposed: set[Architecture]
    ) -> list[Architecture]:
        """At most `size` admitted architectures that are not among those proposed, and are added to them.

        After the deadline the batch ends with what it has.

        Args:
            size: of the batch; it is smaller where 200 successive candidates are None, over the budget or repeated.
            draw: the next candidate, from the number of architectures in the batch so far.
            proposed: all architectures proposed so far.

        Raises:
            TimeOver: the deadline has come before the first candidate.
        """
        batch: list[Architecture] = []
        failed = 0
        while len(batch) < size and failed < 200:
            failed += 1
            try:
                candidate = draw(len(batch))
                new = candidate is not None and candidate not in proposed and self.admits(candidate)
            except TimeOver:
                if batch:
                    return batch
                raise
            if candidate is not None and new:
                proposed.add(candidate)
                batch.append(candidate)
                failed = 0
        if not batch:
            self.stopped = "no admitted architecture was found that was not scored before"
        return batch
