"""NSGA-II: evolution of the Pareto front of several objectives."""

import random
from collections.abc import Callable, Sequence
from typing import final

import numpy as np
from numpy.typing import NDArray

from kdnas.architecture import Architecture
from kdnas.runs.entry import Entry
from kdnas.searchers.base import Searcher
from kdnas.space import SearchSpace
from kdnas.statistics import pareto_front
from kdnas.values import Share


@final
class Nsga2(Searcher):
    """Evolution of the Pareto front of score, params and MACs.

    Parents win tournaments of two by (rank, crowding distance); children are crossed, and mutated where crossing gives
    nothing new. Parents and children together are sorted into fronts: rank 0 is dominated by no other network, rank 1
    by rank 0 alone, and so on; `a` dominates `b` when it is no worse in every objective and better in one. Whole fronts
    survive, lowest rank first, and of the last one the networks of largest crowding distance: the sum over objectives
    of the gap between both neighbours, divided by the front's range in that objective; infinite at both ends. Only
    architectures within the budget are proposed, and none twice.

    Args:
        space: the search space.
        admits: whether an architecture is within the budget.
        rng: source of all random numbers.
        population: networks that survive a generation, and the size of the first one.
        rate: probability that a choice mutates; at least one does.
        crossover: probability that a child has two parents.
        batch: children per generation.
        costs: objectives to minimise beside the score, which is maximised: `params`, `macs`, `layers`.

    Raises:
        ValueError: an unknown cost, or `population` or `batch` is below 2.

    Reference: Deb et al., A Fast and Elitist Multiobjective Genetic Algorithm: NSGA-II, IEEE TEC 2002, section III.
    Differs: the first population is proposed in batches; a child is mutated only if it was scored before.
    """

    def __init__(
        self,
        *,
        space: SearchSpace,
        admits: Callable[[Architecture], bool],
        rng: random.Random,
        population: int = 40,
        rate: Share = 0.1,
        crossover: Share = 0.9,
        batch: int = 20,
        costs: tuple[str, ...] = ("params", "macs"),
    ) -> None:
        super().__init__(space=space, admits=admits, rng=rng)
        unknown = [name for name in costs if name not in ("params", "macs", "layers")]
        if unknown or min(population, batch) < 2:
            raise ValueError(
                "`costs` must be among params, macs and layers, `population` and `batch` at least 2, "
                f"got {costs=}, {population=}, {batch=}."
            )
        self.population, self.rate, self.crossover, self.batch, self.costs = population, rate, crossover, batch, costs
        self.front: list[Entry] = []
        self._alive: list[Entry] = []
        self._fitness: list[tuple[int, float]] = []
        self._proposed: set[Architecture] = set()

    def ask(self, limit: int) -> Sequence[Architecture]:
        """The first population at random, then children not scored before."""
        first = len(self._proposed)
        return self.propose(
            min(limit, self.batch),
            lambda count: self.sample() if not self._alive or first + count < self.population else self._child(),
            self._proposed,
        )

    def tell(self, scored: Sequence[Entry]) -> None:
        """Updates the front; the best of old and new networks survive."""
        self.front = self._best([*self.front, *scored])
        both = [*self._alive, *scored]
        values = self._objectives(both)
        ranks = sorted_fronts(values)
        fitness: list[tuple[int, float]] = [(0, 0.0)] * len(both)
        for rank, members in enumerate(ranks):
            for place, distance in zip(members, crowding(values[members]), strict=True):
                fitness[place] = rank, -float(distance)
        order = sorted(range(len(both)), key=lambda i: (fitness[i], both[i].code))[: self.population]
        self._alive, self._fitness = [both[i] for i in order], [fitness[i] for i in order]

    def begin(self, scored: Sequence[Entry]) -> None:
        """The entries are part of the first population."""
        self._proposed.update(entry.architecture for entry in scored)
        self.tell(scored)

    def _best(self, entries: Sequence[Entry]) -> list[Entry]:
        front = [entries[i] for i in pareto_front(self._objectives(entries))]
        return sorted(front, key=lambda e: (-e.score, e.macs, e.code))

    def _objectives(self, entries: Sequence[Entry]) -> NDArray[np.float64]:
        return np.array([[-e.score, *(getattr(e, name) for name in self.costs)] for e in entries], float)

    def _child(self) -> Architecture:
        first = self._parent()
        child = first
        if self.rng.random() < self.crossover:
            child = self.space.cross(first, self._parent(), self.rng)
        return child if child not in self._proposed else self.space.mutate(child, self.rng, self.rate)

    def _parent(self) -> Architecture:
        first, second = self.rng.randrange(len(self._alive)), self.rng.randrange(len(self._alive))
        return self._alive[min(first, second, key=lambda i: self._fitness[i])].architecture


def sorted_fronts(values: NDArray[np.float64]) -> list[list[int]]:
    """Indices in fronts, best first; `values` is `[points, objectives]`, all minimised."""
    left = np.arange(len(values))
    fronts = []
    while len(left):
        front = pareto_front(values[left])
        fronts.append(left[front].tolist())
        left = np.delete(left, front)
    return fronts


def crowding(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The crowding distance of every point of one front, `[points, objectives]`."""
    total = np.zeros(len(values))
    for column in values.T:
        order = np.argsort(column, kind="stable")
        span = column[order[-1]] - column[order[0]]
        total[order[[0, -1]]] = np.inf
        if span > 0:
            total[order[1:-1]] += (column[order[2:]] - column[order[:-2]]) / span
    return total
