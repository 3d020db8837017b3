"""Costs and budgets as values, with their units."""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

from kdnas.specs import nearest


class Cost(NamedTuple):
    """The cost of a network.

    Attributes:
        params: number of parameters.
        macs: multiply-accumulates for one image: convolutions, linear layers and matrix products; no
            normalisation, activation or bias, as every cited paper counts.
    """

    params: int
    macs: int


COUNTS = Cost._fields
_UNITS = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9}
_OF = {
    "memory": {**_UNITS, "B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30},
    "latency": {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6},
}


@final
@dataclass(frozen=True, init=False)
class Budget:
    """Upper bounds, all of which a network must satisfy. None is no bound.

    Attributes:
        params: number of parameters.
        macs: multiply-accumulates for one image.
        memory: bytes of activations alive at once, for one image in float32: `peak_memory`. Weights come on top, four
            bytes each.
        latency: seconds for one image, as a `LatencyTable` of the device predicts.

    Raises:
        ValueError: a bound that is not a positive number.

    Example:
        >>> Budget(macs="20M", latency="5ms")
        Budget(params=None, macs=20000000.0, memory=None, latency=0.005)
        >>> Budget(macs="20M") == Budget.parse("macs=20M")
        True
    """

    params: float | None
    macs: float | None
    memory: float | None
    latency: float | None

    def __init__(
        self,
        params: float | str | None = None,
        macs: float | str | None = None,
        memory: float | str | None = None,
        latency: float | str | None = None,
    ) -> None:
        for name, bound in (("params", params), ("macs", macs), ("memory", memory), ("latency", latency)):
            object.__setattr__(self, name, None if bound is None else _bound(name, bound))

    def admits(self, cost: Cost, **measured: float) -> bool:
        """Whether the network is within every bound."""
        return self.excess(cost, **measured) <= 0

    def excess(self, cost: Cost, **measured: float) -> float:
        """The largest relative overshoot over a bound; not positive when the network is admitted.

        Args:
            cost: params and macs.
            **measured: memory and latency, where they are bounded.
        """
        spent = {**cost._asdict(), **measured}
        self.only(tuple(spent), "this")
        return max((spent[name] / bound - 1 for name, bound in self.bounds().items()), default=0.0)

    def bounds(self) -> dict[str, float]:
        """The bounds that are set."""
        return {name: bound for name, bound in dataclasses.asdict(self).items() if bound is not None}

    def only(self, names: Sequence[str], job: str) -> None:
        """Raise a ValueError where a cost other than these is bounded.

        Args:
            names: costs that may be bounded.
            job: subject of the message, such as `an exact search`.
        """
        others = [name for name in self.bounds() if name not in names]
        if others:
            raise ValueError(f"{job} bounds {' and '.join(names)}, got a bound on {others[0]}. Remove that bound.")

    def __str__(self) -> str:
        return ", ".join(f"{name} <= {amount(name, bound)}" for name, bound in self.bounds().items()) or "no bound"

    @classmethod
    def parse(cls, texts: str | Iterable[str]) -> "Budget":
        """A budget from texts such as `macs=5e6`, `params=2M`, `memory=256KiB` or `latency=5ms`.

        Raises:
            ValueError: another form, an unknown or repeated name, or a bound that is not a positive number.
        """
        bounds: dict[str, str] = {}
        known = [f.name for f in dataclasses.fields(cls)]
        for text in [texts] if isinstance(texts, str) else texts:
            name, separator, number = text.partition("=")
            if not separator:
                raise ValueError(f"a budget must be name=number, such as macs=5e6, got {text!r}.")
            if name not in known:
                raise ValueError(
                    f"a budget bounds {', '.join(known[:-1])} or {known[-1]}, got {name!r}.{nearest(name, known)}"
                )
            if name in bounds:
                raise ValueError(f"{name} is bounded twice. Name it once.")
            bounds[name] = number
        return cls(**bounds)


def _bound(name: str, bound: float | str) -> float:
    """A bound from a number, or from a text with a unit."""
    units = _OF.get(name, _UNITS)
    value = float("nan")
    if isinstance(bound, str):
        match = re.fullmatch(r"\s*(.*?[\d.])\s*([A-Za-z]*)\s*", bound)
        try:
            value = float(match[1]) * units[match[2]] if match else float(bound)
        except (ValueError, KeyError):
            raise ValueError(
                f"the bound of {name} must be a number, with one of the units {', '.join(filter(None, units))} or "
                f"none, got {bound!r}."
            ) from None
    elif isinstance(bound, int | float):
        value = float(bound)
    if not 0 < value < float("inf"):
        raise ValueError(f"the bound of {name} must be positive, got {bound}.")
    return value


def amount(name: str, value: float) -> str:
    """A cost as people read it: milliseconds, bytes, or a whole number."""
    if name == "latency":
        return f"{1e3 * value:,.3g} ms"
    return f"{value:,.0f} bytes" if name == "memory" else f"{value:,.0f}"
