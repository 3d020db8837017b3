"""Options of losses: recorded, and checked against the ranges that the class declares."""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any, Literal, get_args, get_origin

from torch import nn

from kdnas.specs import check_literals


def ranges_of(make: type) -> dict[str, str]:
    """The ranges of all numeric options of a class, its bases' included."""
    ranges: dict[str, str] = {}
    for base in reversed(make.__mro__):
        ranges |= vars(base).get("ranges", {})
    return ranges


def check_options(make: type, options: Mapping[str, Any]) -> None:
    """Check options against the class's `Literal` annotations and its `ranges`.

    Args:
        make: the class.
        options: values by name; a number, None, or a tuple of numbers where a range is declared.

    Raises:
        ValueError: an option is none of the values or outside its range; the message has the default.
    """
    check_literals(make, options)
    parameters = inspect.signature(make).parameters
    for name, interval in ranges_of(make).items():
        if name not in options or name not in parameters:
            continue
        value, parameter = options[name], parameters[name]
        kinds = {parameter.annotation, *get_args(parameter.annotation)}
        numbers = value if isinstance(value, tuple | list) else (value,)
        is_name = isinstance(value, str) and any(get_origin(kind) is Literal for kind in kinds)
        if is_name or (value is None and type(None) in kinds):
            continue
        whole = int in kinds and float not in kinds
        if not all(_is_in(number, interval, whole=whole) for number in numbers):
            fraction = whole and not all(isinstance(number, Integral) for number in numbers)
            endless = any(isinstance(number, float) and not math.isfinite(number) for number in numbers)
            kind = "a whole number, " if fraction else "finite and " if endless and words(interval) != "finite" else ""
            raise ValueError(
                f"`{name}` must be {kind}{words(interval)}, got {value!r}. The default is {parameter.default!r}."
            )


def words(interval: str) -> str:
    """`(0, inf)` as `above 0`, `[1, inf)` as `at least 1`, `[0, 1)` as `in [0, 1)`."""
    low, high = interval[1:-1].split(", ")
    if high != "inf":
        return f"in {interval}"
    if low == "-inf":
        return "finite"
    return f"above {low}" if interval[0] == "(" else f"at least {low}"


def _is_in(number: Any, interval: str, *, whole: bool) -> bool:
    if not isinstance(number, Real) or isinstance(number, bool):
        return False
    value = float(number)
    if not math.isfinite(value) or (whole and not value.is_integer()):
        return False
    low, high = map(float, interval[1:-1].split(", "))
    above = low < value or (interval[0] == "[" and value == low)
    return above and (value < high or (interval[-1] == "]" and value == high))


def recorded(init: Callable[..., None]) -> Callable[..., None]:
    """The constructor, which checks the options first and records them in `options`; of a base class nothing more."""

    @functools.wraps(init)
    def checked(self: Any, *arguments: Any, **options: Any) -> None:
        if getattr(type(self), "__init__", None) is not checked:
            init(self, *arguments, **options)
            return
        check_options(type(self), options)
        init(self, *arguments, **options)
        parameters = inspect.signature(type(self)).parameters.values()
        values = {p.name: options.get(p.name, p.default) for p in parameters if p.default is not p.empty}
        self.options = {name: value for name, value in values.items() if not isinstance(value, nn.Module)}

    return checked
