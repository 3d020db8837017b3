"""What the networks of a space spend of a budget."""

import random
from collections.abc import Callable
from functools import lru_cache
from typing import final

from kdnas.architecture import Architecture
from kdnas.costs.budget import Budget, amount
from kdnas.costs.count import cost, peak_memory
from kdnas.costs.latency import LatencyTable
from kdnas.space import SearchSpace


@final
class BudgetCheck:
    """Tells of an architecture what it spends and whether a budget admits it.

    Args:
        space: of the architectures.
        budget: the bounds.
        table: of the device that a bound on latency is for; asked only where there is one.
    """

    def __init__(self, space: SearchSpace, budget: Budget, table: Callable[[], LatencyTable] | None = None) -> None:
        self.space, self.budget = space, budget
        self.table: LatencyTable | None = None
        if budget.latency is not None:
            if table is None:
                raise ValueError("a bound on latency needs a latency table of the device. Leave it out here.")
            self.table = table()
        self.measured = lru_cache(maxsize=100_000)(self._measured)

    def _measured(self, architecture: Architecture) -> dict[str, float]:
        """Bytes of memory and seconds of latency, where they are bounded."""
        blueprint = self.space.blueprint(architecture)
        found: dict[str, float] = {}
        if self.budget.memory is not None:
            found["memory"] = peak_memory(blueprint)
        if self.table is not None:
            found["latency"] = self.table.seconds(blueprint)
        return found

    def excess(self, architecture: Architecture) -> float:
        """The largest relative overshoot over a bound; not positive when the budget admits it."""
        return self.budget.excess(cost(self.space.blueprint(architecture)), **self.measured(architecture))

    def admits(self, architecture: Architecture) -> bool:
        """Whether it is within every bound."""
        return self.excess(architecture) <= 0

    def says(self, architecture: Architecture) -> str:
        """What it spends, in words."""
        spent = {**cost(self.space.blueprint(architecture))._asdict(), **self.measured(architecture)}
        said = [f"{amount(n, v)} {n}" if n in ("params", "macs") else f"{n} {amount(n, v)}" for n, v in spent.items()]
        return f"{', '.join(said[:-1])} and {said[-1]}"


class Infeasible(ValueError):
    """No network of the space is within the budget, or none was found; the message names the nearest."""


def check_feasible(meter: BudgetCheck, rng: random.Random, attempts: int = 1000) -> None:
    """Raise `Infeasible` when neither the smallest network nor any of many draws is within the budget."""
    space = meter.space
    nearest, excess = space.smallest, meter.excess(space.smallest)
    if excess <= 0:
        return
    current = nearest
    for _ in range(attempts):
        candidate = space.mutate(current, rng) if rng.random() < 0.8 else space.sample(rng)
        found = meter.excess(candidate)
        if found <= 0:
            return
        if found < excess:
            nearest = current = candidate
            excess = found
    raise Infeasible(
        f"infeasible: no network found with {meter.budget}; the nearest is {space.code(nearest)} with "
        f"{meter.says(nearest)}. Raise the budget, or use a space with smaller networks."
    )
