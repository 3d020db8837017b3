"""Whether architectures of a space are within a budget."""

import logging
import math
import random
import time
from collections.abc import Callable
from functools import lru_cache
from typing import final

from kdnas.architecture import Architecture, Choice, Value
from kdnas.costs.budget import Budget, described
from kdnas.costs.count import cost, peak_memory
from kdnas.costs.latency import LatencyTable, NotMeasured
from kdnas.costs.size import check_format, shipped_bytes
from kdnas.space import Blueprint, SearchSpace

_log = logging.getLogger(__name__)


@final
class BudgetCheck:
    """Costs of architectures, and whether a budget admits them.

    Args:
        space: the search space.
        budget: upper bounds; shares are of the space's largest network, which is the source of a converted one.
        table: makes the latency table of the device; called only where latency is bounded.

    Raises:
        ValueError: latency is bounded, and there is no table.
    """

    def __init__(self, space: SearchSpace, budget: Budget, table: Callable[[], LatencyTable] | None = None) -> None:
        self.space = space
        self.table: LatencyTable | None = None
        if "latency" in budget.names:
            if table is None:
                raise ValueError(
                    "a bound on latency needs a latency table of the device, and none is available. Remove the bound."
                )
            self.table = table()
        if "size" in budget.names:
            check_format(budget.format)
        self._warned = False
        self.budget = self._absolute(budget)
        self.measured = lru_cache(maxsize=100_000)(self._measured)

    def _absolute(self, budget: Budget) -> Budget:
        if not budget.shares:
            return budget
        largest = self.space.blueprint(self.space.largest)
        costs: dict[str, float] = {**cost(largest)._asdict(), "memory": peak_memory(largest)}
        if self.table is not None:
            costs["latency"] = self.table.seconds(largest)
        if "size" in budget.names:
            costs["size"] = shipped_bytes(largest, budget.format)
        return budget.of(costs)

    def _measured(self, architecture: Architecture) -> dict[str, float]:
        """Bytes of memory and of the shipped file and seconds of latency, where they are bounded."""
        blueprint = self.space.blueprint(architecture)
        costs: dict[str, float] = {}
        if self.budget.memory is not None:
            costs["memory"] = peak_memory(blueprint)
        if self.table is not None:
            costs["latency"] = self._seconds(self.table, blueprint)
        if self.budget.size is not None:
            costs["size"] = shipped_bytes(blueprint, self.budget.format)
        return costs

    def _seconds(self, table: LatencyTable, blueprint: Blueprint) -> float:
        """Predicted seconds; of a network with a layer that was not measured elsewhere infinite, with a warning."""
        try:
            return table.seconds(blueprint)
        except NotMeasured as error:
            if not self._warned:
                _log.warning(f"{error} Networks with such layers are left out; measure more networks (--num-networks).")
                self._warned = True
            return math.inf

    def excess(self, architecture: Architecture) -> float:
        """The largest relative overshoot over a bound; not positive when the budget admits it."""
        return self.budget.excess(cost(self.space.blueprint(architecture)), **self.measured(architecture))

    def admits(self, architecture: Architecture) -> bool:
        """Whether the architecture is within every bound."""
        return self.excess(architecture) <= 0

    def describe(self, architecture: Architecture) -> str:
        """All counted and measured costs as text."""
        return described({**cost(self.space.blueprint(architecture))._asdict(), **self.measured(architecture)})


class Infeasible(ValueError):
    """No network within the budget exists or was found; the message names the nearest one."""


def check_feasible(check: BudgetCheck, rng: random.Random, attempts: int = 1000, seconds: float = math.inf) -> None:
    """Raise `Infeasible` when neither the smallest network nor any of many draws is within the budget.

    Where the smallest is the cheapest, nothing is drawn for a budget without latency.

    Args:
        check: the space and the budget.
        rng: source of the draws.
        attempts: number of draws.
        seconds: time after which no further one is tested.
    """
    began = time.perf_counter()
    space = check.space
    nearest, excess = space.smallest, check.excess(space.smallest)
    if excess <= 0:
        return
    current = nearest
    if space.smallest_is_cheapest and check.budget.latency is None:
        attempts = 0
    for _ in range(attempts):
        if time.perf_counter() - began >= seconds:
            break
        candidate = space.mutate(current, rng) if rng.random() < 0.8 else space.sample(rng)
        candidate_excess = check.excess(candidate)
        if candidate_excess <= 0:
            return
        if candidate_excess < excess:
            nearest = current = candidate
            excess = candidate_excess
    raise Infeasible(
        f"infeasible: no network found with {check.budget}; the nearest is {space.code(nearest)} with "
        f"{check.describe(nearest)}. Raise the budget or use a space with smaller networks."
    )


def largest_within(check: BudgetCheck, start: Architecture) -> Architecture:
    """A network within the budget that no change of one choice makes larger in MACs.

    Choice by choice, the option of most MACs that the budget admits, until nothing changes; choices that a greater
    depth adds begin at their first option.

    Args:
        check: the space and the budget.
        start: a network within it.
    """
    space, best, before = check.space, start, None
    while best != before:
        before = best
        for choice in space.choices:
            if choice.name not in best:
                continue
            changed = (_with(space, best, choice, option) for option in choice.options)
            admitted = [best, *(architecture for architecture in changed if check.admits(architecture))]
            best = max(admitted, key=lambda architecture: cost(space.blueprint(architecture)).macs)
    return best


def _with(space: SearchSpace, architecture: Architecture, choice: Choice, option: Value) -> Architecture:
    """The architecture with another option of one choice; choices that this adds have their first option."""
    return space.decide(lambda c: option if c == choice else architecture.get(c.name, c.options[0]))
