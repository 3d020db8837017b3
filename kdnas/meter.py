"""What the networks of a space spend of a budget."""

from collections.abc import Callable
from functools import lru_cache
from typing import final

from kdnas.architecture import Architecture
from kdnas.cost import Budget, amount, cost, peak_memory
from kdnas.latency import LatencyTable
from kdnas.space import SearchSpace


@final
class Meter:
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
