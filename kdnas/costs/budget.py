"""Costs and budgets as values, with their units."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

from kdnas.costs.target import Target
from kdnas.specs import nearest
from kdnas.values import is_finite, real, shown


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
_NAMES = (*COUNTS, "memory", "latency", "size")
FORMATS = ("fp32", "int8")
"""The forms of a student whose bytes may be bounded: its weights, and its graph in 8-bit integers."""
_UNITS = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9}
_BYTES = {**_UNITS, "B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30}
_OF = {
    "memory": _BYTES,
    "size": _BYTES,
    "latency": {"s": 1.0, "ms": 1e-3, "us": 1e-6},
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
        latency: seconds of one call, as a `LatencyTable` of the target predicts.
        size: bytes of the file that is shipped, see `format`.
        shares: bounds given as shares of a source's cost, such as `macs="25%"`: pairs of name and share. `of` turns
            them into numbers; until then the budget admits nothing.
        target: what the latency is measured on, written after `@`: `latency="5ms@onnxruntime,threads=2"`.
        format: `fp32` for `weights.safetensors`, `int8` for `student-int8.onnx`, written after `@`: `size="2MB@int8"`.

    Raises:
        ValueError: a bound that is not a positive number, or a share of 100 % or more.

    Example:
        >>> Budget(macs="20M", latency="5ms").latency
        0.005
        >>> Budget(macs="20M") == Budget.parse("macs=20M")
        True
        >>> Budget(macs="25%").of({"macs": 8e6}) == Budget(macs=2e6)
        True
    """

    params: float | None
    macs: float | None
    memory: float | None
    latency: float | None
    size: float | None
    shares: tuple[tuple[str, float], ...]
    target: Target
    format: str
    own_json: ClassVar[bool] = True

    def __init__(
        self,
        params: float | str | None = None,
        macs: float | str | None = None,
        memory: float | str | None = None,
        latency: float | str | None = None,
        size: float | str | None = None,
    ) -> None:
        shares = []
        target, latency = _after("latency", latency)
        form, size = _after("size", size)
        if form not in ("", *FORMATS):
            raise ValueError(f"a size is that of {' or '.join(FORMATS)}, got {form!r}. Write size=2MB@int8.")
        object.__setattr__(self, "target", Target.parse(target) if target else Target())
        object.__setattr__(self, "format", form or FORMATS[0])
        bounds = {"params": params, "macs": macs, "memory": memory, "latency": latency, "size": size}
        for name, bound in bounds.items():
            value = bound
            if isinstance(bound, str) and bound.strip().endswith("%"):
                value = None
                shares.append((name, _share(name, bound)))
            object.__setattr__(self, name, None if value is None else _bound(name, value))
        object.__setattr__(self, "shares", tuple(shares))

    @property
    def names(self) -> tuple[str, ...]:
        """The costs that are bounded, by a number or a share."""
        return (*self.bounds(), *(name for name, _ in self.shares))

    def of(self, costs: Mapping[str, float]) -> "Budget":
        """The budget in numbers.

        Args:
            costs: of the source; at least those whose shares are bounded.
        """
        absolute = {name: share * costs[name] for name, share in self.shares}
        return Budget.from_json({**self.to_json(), **self._qualified({**self.bounds(), **absolute})})

    def with_target(self, target: Target) -> "Budget":
        """The same bounds, with the latency of another target."""
        budget = Budget.from_json(self.to_json())
        object.__setattr__(budget, "target", target)
        return budget

    def to_json(self) -> dict[str, float | str | None]:
        """The arguments that make an equal budget; a size only where it is bounded, as in files of earlier versions."""
        texts = {name: f"{100 * share:.12g}%" for name, share in self.shares}
        values = self._qualified({**self.bounds(), **texts})
        return {name: values.get(name) for name in _NAMES if name != "size" or name in values}

    def _qualified(self, values: Mapping[str, float | str]) -> dict[str, float | str]:
        """The bounds with what stands after `@` where that is not the default."""
        qualified = dict(values)
        for name, unit, qualifier, default in (
            ("latency", "s", str(self.target), str(Target())),
            ("size", "B", self.format, FORMATS[0]),
        ):
            if name in values and qualifier != default:
                value = values[name]
                qualified[name] = f"{value if isinstance(value, str) else f'{value!r}{unit}'}@{qualifier}"
        return qualified

    def admits(self, cost: Cost, **measured: float) -> bool:
        """Whether the network is within every bound."""
        return self.excess(cost, **measured) <= 0

    def excess(self, cost: Cost, **measured: float) -> float:
        """The largest relative overshoot over a bound; not positive when the network is admitted.

        Args:
            cost: params and macs.
            **measured: memory, latency and size, where they are bounded.
        """
        spent = {**cost._asdict(), **measured}
        self.only(tuple(spent), "this")
        return max((spent[name] / bound - 1 for name, bound in self.bounds().items()), default=0.0)

    def bounds(self) -> dict[str, float]:
        """The bounds that are set as numbers."""
        return {name: bound for name in _NAMES if (bound := getattr(self, name)) is not None}

    def only(self, names: Sequence[str], job: str, *, shares: bool = False) -> None:
        """Raise a ValueError where a cost other than these is bounded.

        Args:
            names: costs that may be bounded.
            job: subject of the message, such as `an exact search`.
            shares: whether bounds may be shares of a source's cost.
        """
        if self.shares and not shares:
            raise ValueError(f"{job} has no source network whose shares could be bounded, got {self}. Give a number.")
        others = [name for name in self.names if name not in names]
        if others:
            raise ValueError(f"{job} bounds {' and '.join(names)}, got a bound on {others[0]}. Remove that bound.")

    def __str__(self) -> str:
        of = {"latency": "" if self.target == Target() else f" on {self.target.words}", "size": f" in {self.format}"}
        texts = [f"{name} <= {amount(name, bound)}{of.get(name, '')}" for name, bound in self.bounds().items()]
        texts += [f"{name} <= {100 * share:g}%{of.get(name, '')}" for name, share in self.shares]
        return ", ".join(texts) or "no bound"

    @classmethod
    def from_json(cls, value: object) -> "Budget":
        """The budget that `to_json` wrote.

        Raises:
            ValueError: no object, an unknown key, or a wrong value.
        """
        if not isinstance(value, Mapping):
            raise ValueError(f"a budget must be an object, got {value!r}.")
        for name in value:
            if name not in _NAMES:
                raise ValueError(f"unknown key {shown(name)}.{nearest(str(name), _NAMES)}")
        return cls(**value)

    @classmethod
    def parse(cls, texts: str | Iterable[str]) -> "Budget":
        """A budget from texts such as `macs=5e6`, `params=2M`, `memory=256KiB`, `latency=5ms@compile` or `macs=25%`.

        Raises:
            ValueError: another form, an unknown or repeated name, or a bound that is not a positive number.
        """
        bounds: dict[str, str] = {}
        known = list(_NAMES)
        for text in [texts] if isinstance(texts, str) else texts:
            name, separator, number = text.partition("=")
            if not separator:
                raise ValueError(f"a budget must be name=number, such as macs=5e6, got {text!r}.")
            if "," in number.partition("@")[0]:
                raise ValueError(
                    f"a bound must be a number without commas, got {text!r}. Write each bound by itself: --budget "
                    "macs=20M --budget params=1M."
                )
            if name not in known:
                raise ValueError(
                    f"a budget bounds {', '.join(known[:-1])} or {known[-1]}, got {shown(name)}.{nearest(name, known)}"
                )
            if name in bounds:
                raise ValueError(f"{name} is bounded twice. Name it once.")
            bounds[name] = number
        return cls(**bounds)


def _after(name: str, bound: float | str | None) -> tuple[str, float | str | None]:
    """What stands after `@` in a bound, and the bound without it."""
    if not isinstance(bound, str):
        return "", bound
    text, at, qualifier = bound.partition("@")
    if at and not qualifier.strip():
        raise ValueError(f"the bound of {name} must name something after @, got {bound!r}. Remove the @.")
    return qualifier.strip(), text


def _share(name: str, text: str) -> float:
    """A share below 1 from a percentage."""
    try:
        share = real(text.strip()[:-1].rstrip()) / 100
    except ValueError:
        share = float("nan")
    if not 0 < share < 1:
        raise ValueError(f"the bound of {name} must be above 0% and below 100% of the source's, got {text!r}.")
    return share


def _bound(name: str, bound: float | str) -> float:
    """A bound from a number, or from a text with a unit."""
    units = _OF.get(name, _UNITS)
    value = float("nan")
    if isinstance(bound, str):
        match = re.fullmatch(r"\s*(.*?[\d.])\s*([A-Za-z]*)\s*", bound)
        try:
            value = real(match[1]) * units[match[2]] if match else real(bound.strip())
        except (ValueError, KeyError):
            known = ", ".join(filter(None, units))
            rule = (
                f"a number, with one of the units {known} or none" if "" in units else f"a number with a unit, {known}"
            )
            raise ValueError(f"the bound of {name} must be {rule}, got {bound!r}.") from None
    elif isinstance(bound, int | float) and not isinstance(bound, bool) and is_finite(bound):
        value = float(bound)
    if not 0 < value < float("inf"):
        raise ValueError(
            f"the bound of {name} must be positive and finite, got {bound if isinstance(bound, str) else shown(bound)}."
        )
    return value


def amount(name: str, value: float) -> str:
    """A cost as people read it: milliseconds or seconds, bytes, or a whole number.

    Example:
        >>> amount("latency", 0.0051), amount("latency", 30.0), amount("macs", 1e6)
        ('5.1 ms', '30 s', '1,000,000')
    """
    if name == "latency":
        number, unit = (value, "s") if value >= 1 else (1e3 * value, "ms")
        return f"{number:,.0f} {unit}" if number >= 100 else f"{number:.3g} {unit}"
    return f"{value:,.0f} bytes" if name in ("memory", "size") else f"{value:,.0f}"


def described(costs: Mapping[str, float]) -> str:
    """Costs by name, as people read them.

    Example:
        >>> described({"params": 1500, "macs": 20_000, "latency": 0.002})
        '1,500 params, 20,000 macs and latency 2 ms'
    """
    texts = [f"{amount(n, v)} {n}" if n in COUNTS else f"{n} {amount(n, v)}" for n, v in costs.items()]
    return " and ".join(filter(None, (", ".join(texts[:-1]), texts[-1])))
