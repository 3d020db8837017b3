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
    """A queue of the youngest `population` networks; the best of a random `tournament` of them is mutated or crossed.

    Each generation of `batch` children is asked at once, so that the scorer can share their prefixes. The child takes
    the place of the oldest, however good that is. Only architectures within the budget are ever asked.

    Args:
        space: the search space.
        admits: the budget's test.
        rng: draws everything.
        population: networks kept.
        tournament: how many of them compete to be a parent.
        rate: probability that a choice mutates; at least one does.
        crossover: probability that a child has two parents.
        batch: children per generation.

    Raises:
        ValueError: a population, tournament or batch below 1, or a rate or crossover outside [0, 1].

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
                raise ValueError(f"{name} is a probability in [0, 1], got {value}.")
        self.population, self.tournament = population, tournament
        self.rate, self.crossover, self.batch = rate, crossover, batch
        self._alive: deque[Entry] = deque(maxlen=population)
        self._seen: set[Architecture] = set()

    def ask(self, limit: int) -> Sequence[Architecture]:
        """The first population at random, then generations of children not seen before."""
        wanted = min(limit, self.batch)
        asked: list[Architecture] = []
        failed = 0
        while len(asked) < wanted and failed < 200:
            failed += 1
            drawing = not self._alive or len(self._alive) + len(asked) < self.population
            candidate = self.sample() if drawing else self._child()
            if candidate is not None and candidate not in self._seen and self.admits(candidate):
                self._seen.add(candidate)
                asked.append(candidate)
                failed = 0
        if not asked:
            self.stopped = "no admitted architecture was found that was not scored before"
        return asked

    def tell(self, scored: Sequence[Entry]) -> None:
        """The children join, the oldest leave."""
        self._alive.extend(scored)

    def begin(self, scored: Sequence[Entry]) -> None:
        """They are of the first population."""
        self._seen.update(entry.architecture for entry in scored)
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
