"""Regularised (ageing) evolution."""

import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import final

from kdnas.architecture import Architecture
from kdnas.runs.entry import Entry
from kdnas.searchers.base import Searcher
from kdnas.space import SearchSpace


@final
class Evolution(Searcher):
    """Evolution of the youngest `population` networks; parents are the best of a random `tournament`.

    The `batch` children of a generation are proposed at once, so that the scorer can share their prefixes. A child
    replaces the oldest network, whatever its score. Only architectures within the budget are proposed.

    Args:
        space: the search space.
        admits: whether an architecture is within the budget.
        rng: source of all random numbers.
        population: networks in the queue.
        tournament: networks that compete to be a parent.
        rate: probability that a choice mutates; at least one does.
        crossover: probability that a child has two parents.
        batch: children per generation.

    Raises:
        ValueError: `population`, `tournament` or `batch` is below 1, or `rate` or `crossover` outside [0, 1].

    Reference: Real et al., Regularized Evolution for Image Classifier Architecture Search, AAAI 2019, algorithm 1.
    Differs: children come in batches, and some have two parents (Guo et al., SPOS, ECCV 2020, algorithm 1).
    """

    def __init__(
        self,
        *,
        space: SearchSpace,
        admits: Callable[[Architecture], bool],
        rng: random.Random,
        population: int = 32,
        tournament: int = 8,
        rate: float = 0.1,
        crossover: float = 0.25,
        batch: int = 16,
    ) -> None:
        super().__init__(space=space, admits=admits, rng=rng)
        if min(population, tournament, batch) < 1:
            raise ValueError(
                f"population, tournament and batch must be at least 1, got {population=}, {tournament=}, {batch=}."
            )
        for name, value in (("rate", rate), ("crossover", crossover)):
            if not 0 <= value <= 1:
                raise ValueError(f"`{name}` must be in [0, 1], got {value}.")
        self.population, self.tournament = population, tournament
        self.rate, self.crossover, self.batch = rate, crossover, batch
        self._alive: deque[Entry] = deque(maxlen=population)
        self._proposed: set[Architecture] = set()

    def ask(self, limit: int) -> Sequence[Architecture]:
        """The first population at random, then generations of children not scored before."""
        alive = len(self._alive)
        return self.propose(
            min(limit, self.batch),
            lambda count: self.sample() if not alive or alive + count < self.population else self._child(),
            self._proposed,
        )

    def tell(self, scored: Sequence[Entry]) -> None:
        """The children join, the oldest leave."""
        self._alive.extend(scored)

    def begin(self, scored: Sequence[Entry]) -> None:
        """The entries are part of the first population."""
        self._proposed.update(entry.architecture for entry in scored)
        self._alive.extend(scored)

    def _child(self) -> Architecture:
        first = self._parent()
        if self.rng.random() < self.crossover:
            child = self.space.cross(first, self._parent(), self.rng)
            if child != first:
                return child
        return self.space.mutate(first, self.rng, self.rate)

    def _parent(self) -> Architecture:
        rivals = self.rng.sample(list(self._alive), min(self.tournament, len(self._alive)))
        return max(rivals, key=lambda e: (e.share, e.score)).architecture
