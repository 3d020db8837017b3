"""Which values an annotation admits: one rule for settings, tables, specs and the command line."""

import contextlib
import dataclasses
import functools
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, final, get_args, get_origin

from kdnas.plain import printable

LATER = {"later": True}
"""Metadata of a dataclass's field that was added later: at its default it is not written, so that what was written
before, and digests of it, stay the same."""


@final
@dataclass(frozen=True)
class Range:
    """The numbers that a value may hold: the metadata of an `Annotated` type, for one number or a tuple.

    Attributes:
        least: the smallest number; None for no bound.
        most: the largest number; None for no bound.
        above: every number is larger than this; None for no bound.
        below: every number is smaller than this; None for no bound.
        odd: whether every number is odd.
        ascending: whether each number of a tuple is larger than the one before.
        empty: whether a tuple may be empty.

    Example:
        >>> Range(least=1, ascending=True).check("widths", (8, 4, 12))
        Traceback (most recent call last):
        ValueError: `widths` must be ascending, got [8, 4, 12].
    """

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    odd: bool = False
    ascending: bool = False
    empty: bool = False

    def check(self, name: str, value: Any) -> None:
        """Check one number, or a tuple of them.

        Raises:
            ValueError: a number outside the range; the message has the name.
        """
        _raise(name, self.problem(value))

    def problem(self, value: Any) -> str:
        """What the value must be and is not, such as "be at least 1, got 0"; empty where nothing is wrong."""
        numbers = value if isinstance(value, tuple | list) else (value,)
        if not all(isinstance(number, int | float) for number in numbers):
            return f"be a number or a tuple of numbers, got {shown(value)}"
        rules = {
            "not be empty": self.empty or bool(numbers),
            "be finite": all(is_finite(n) for n in numbers),
            f"be at least {self.least}": self.least is None or all(n >= self.least for n in numbers),
            f"be above {self.above}": self.above is None or all(n > self.above for n in numbers),
            f"be below {self.below}": self.below is None or all(n < self.below for n in numbers),
            f"be at most {self.most}": self.most is None or all(n <= self.most for n in numbers),
            "be odd": not self.odd or all(n % 2 for n in numbers),
            "be ascending": not self.ascending or list(numbers) == sorted(set(numbers)),
        }
        broken = next((rule for rule, holds in rules.items() if not holds), "")
        return broken and f"{broken}, got {shown(value)}"


def is_finite(number: Any) -> bool:
    """Whether a number is neither NaN nor infinite, and a float can hold it."""
    try:
        return math.isfinite(number)
    except OverflowError:  # an integer beyond every float
        return False


_WHOLE = re.compile(r"[+-]?\d+", re.ASCII)
_REAL = re.compile(r"[+-]?((\d+\.?\d*|\.\d+)(e[+-]?\d+)?|inf|nan)", re.ASCII | re.IGNORECASE)


def whole(text: str) -> int:
    """The whole number of a text that a person typed, or that a file of text holds: digits 0 to 9 and a sign.

    Raises:
        ValueError: it is none; `1_000` and digits of other scripts, which Python reads, are not meant as numbers.

    Example:
        >>> whole("-12")
        -12
    """
    if not _WHOLE.fullmatch(text):
        raise ValueError(f"a whole number has digits 0 to 9 and a sign, got {shown(text)}.")
    return int(text)


def real(text: str) -> float:
    """The number of a text, as `whole`, with a decimal point and an exponent; `inf` and `nan` are left to ranges.

    Raises:
        ValueError: it is none.

    Example:
        >>> real("1.5e3")
        1500.0
    """
    if not _REAL.fullmatch(text):
        raise ValueError(f"a number has digits 0 to 9, a sign, a point and an exponent, got {shown(text)}.")
    return float(text)


@final
@dataclass(frozen=True)
class Time:
    """The metadata of a time: a positive number of seconds, or a text such as `300s`, `20m`, `2h` or `1h30m`."""

    def problem(self, value: Any) -> str:
        """As `Range.problem`."""
        total = seconds(value)
        if total is None:
            return f"be a number and s, m or h, such as 300s or 1h30m, got {shown(value)}"
        return "" if 0 < total < math.inf else f"be positive and finite, got {shown(value)}"


def seconds(value: Any) -> float | None:
    """The seconds of a time; None for another form.

    Example:
        >>> seconds("1h30m"), seconds(2), seconds("soon")
        (5400.0, 2.0, None)
    """
    text = str(value)
    parts = re.fullmatch(r"(?:([\d.]+)h)?(?:([\d.]+)m)?(?:([\d.]+)s?)?", text, re.ASCII)
    try:
        if parts is None or not any(parts.groups()):
            return real(text.removesuffix("s"))
        return sum(real(n) * unit for n, unit in zip(parts.groups(), (3600, 60, 1), strict=True) if n)
    except ValueError:
        return None


_MOST_SIZE = 2**20  # no network has a million channels, pixels a side or layers in a row
Size = Annotated[int, Range(least=1, most=_MOST_SIZE)]
"""A count: channels, layers, pixels, a stride."""
Sizes = Annotated[tuple[int, ...], Range(least=1, most=_MOST_SIZE)]
"""Counts, one for each of several places."""
SizeOptions = Annotated[tuple[int, ...], Range(least=1, most=_MOST_SIZE, ascending=True)]
"""Options of a choice that are counts."""
_MOST_DEPTH = 1000
Depth = Annotated[int, Range(least=1, most=_MOST_DEPTH)]
"""A number of layers, blocks or stages."""
Depths = Annotated[tuple[int, ...], Range(least=0, most=_MOST_DEPTH)]
"""Numbers of layers, one for each of several places; some may be 0."""
DepthOptions = Annotated[tuple[int, ...], Range(least=1, most=_MOST_DEPTH, ascending=True)]
"""Options of a choice that are numbers of layers."""
Kernel = Annotated[int, Range(least=1, most=_MOST_SIZE, odd=True)]
"""The height and width of a kernel; odd, so that padding keeps the resolution."""
KernelOptions = Annotated[tuple[int, ...], Range(least=1, most=_MOST_SIZE, odd=True, ascending=True)]
"""Options of a choice that are kernels."""
Ratios = Annotated[tuple[float, ...], Range(above=0, ascending=True)]
"""Options of a choice that are factors of a width."""
Factor = Annotated[float, Range(above=0)]
"""A factor of a width, or another positive number."""
Rate = Annotated[float, Range(least=0, below=1)]
"""The probability of dropping something."""
Side = Annotated[int, Range(least=0, most=_MOST_SIZE)]
"""The height and width of images, or 0 for a default; or another size that may be 0."""
Level = Annotated[int, Range(least=0, most=65535)]
"""A value of a pixel."""
Count = Annotated[int, Range(least=1, most=2**40)]
"""A number of steps, images or candidates."""
Sample = Annotated[int, Range(least=3, most=2**40)]
"""A number of images that correlations are measured on."""
Index = Annotated[int, Range(least=0, most=2**40)]
"""A number that may be 0."""
Processes = Annotated[int, Range(least=0, most=1024)]
"""A number of processes that may be 0."""
WorkerCount = Annotated[int, Range(least=1, most=1024)]
"""A number of processes side by side."""
Seed = Annotated[int, Range(least=0, below=2**63)]
"""A seed of random numbers."""
Amount = Annotated[float, Range(least=0)]
"""A weight or another quantity that may be 0."""
Seconds = Annotated[float | str, Time()]
"""A time."""
Real = Annotated[float, Range()]
"""A number that may be negative; an option of an algorithm with no other annotation of its own may not."""
Share = Annotated[float, Range(least=0, most=1)]
"""A part of a whole."""


def check_value(name: str, value: Any, kind: Any) -> None:
    """Check a value against an annotation.

    Numbers are no booleans, and finite. Of other types than numbers, texts, booleans, None, `Literal`, and tuples,
    unions and `Annotated` types of these, every value is accepted: they check themselves.

    Args:
        name: of the parameter or setting, for the message.
        value: what was given.
        kind: the annotation.

    Raises:
        ValueError: another type, a number that is none, or one outside its `Range`.

    Example:
        >>> check_value("steps", True, Count)
        Traceback (most recent call last):
        ValueError: `steps` must be a whole number, got True.
        >>> check_value("warmup", float("nan"), Share)
        Traceback (most recent call last):
        ValueError: `warmup` must be finite, got nan.
    """
    _raise(name, problem(value, kind))


def check_fields(value: Any, where: str = "") -> None:
    """Check every field of a dataclass against its annotation, and those of the dataclasses in its fields.

    Args:
        value: the dataclass.
        where: its own name, before those of its fields.

    Raises:
        ValueError: as `check_value`; the message has the field's path, such as `stages[1].width`.
    """
    hints = hints_of(type(value))
    for field in dataclasses.fields(value):
        name, content = f"{where}{field.name}", getattr(value, field.name)
        check_value(name, content, hints.get(field.name, Any))
        for index, part in enumerate(content if isinstance(content, tuple) else (content,)):
            if dataclasses.is_dataclass(part):
                check_fields(part, f"{name}[{index}]." if isinstance(content, tuple) else f"{name}.")


def check_arguments(target: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Check the arguments of a call against the annotations of a function's or a class's parameters.

    Raises:
        ValueError: as `check_value`.
    """
    hints = hints_of(target)
    for name, value in arguments.items():
        if name in hints:
            check_value(name, value, hints[name])


@functools.lru_cache(maxsize=1024)
def hints_of(target: Any) -> dict[str, Any]:
    """The types of a dataclass's fields, or of a callable's parameters; those for type checkers only are left out."""
    call = target
    if inspect.isclass(target) and not dataclasses.is_dataclass(target):
        call = next((vars(c)["__init__"] for c in target.__mro__ if "__init__" in vars(c)), None)
    try:
        return typing.get_type_hints(call, include_extras=True)
    except (NameError, TypeError, AttributeError):
        known = getattr(inspect.unwrap(call), "__globals__", {}) if callable(call) else {}
    hints = {}
    for name, kind in getattr(call, "__annotations__", {}).items():
        alone = types.SimpleNamespace(__annotations__={name: kind})
        with contextlib.suppress(NameError, TypeError, AttributeError):
            hints |= typing.get_type_hints(alone, known, include_extras=True)
    return hints


def problem(value: Any, kind: Any) -> str:
    """What the value must be and is not, such as "be a whole number, got 'a'"; empty where an annotation admits it."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        wrong = problem(value, inner[0])
        ranges = [extra for extra in inner[1:] if isinstance(extra, Range | Time)]
        return wrong or ("" if value is None else next(filter(None, (r.problem(value) for r in ranges)), ""))
    if origin in (Union, UnionType):
        wrong = [problem(value, option) for option in inner]
        return "" if "" in wrong else _of_union(value, inner, wrong)
    if origin is Literal:
        same = any(value == option and type(value) is type(option) for option in inner)
        return "" if same else f"be one of {', '.join(map(str, inner))}, got {shown(value)}"
    if origin is tuple:
        return _of_tuple(value, inner)
    word = WORDS.get(kind)
    if word is None:
        return ""
    if kind is float and type(value) is int:
        kind = int
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        return f"be {word}, got {shown(value)}"
    if kind in (int, float) and not is_finite(value):
        return f"be finite, got {shown(value)}"
    return ""


WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    NoneType: "None",
}
"""What a value of a type is called in a message."""


def _of_union(value: Any, kinds: tuple[Any, ...], wrong: list[str]) -> str:
    """What is wrong for the kind that the value is nearest to; else all that it could be."""
    for kind, words in zip(kinds, wrong, strict=True):
        plain = get_args(kind)[0] if get_origin(kind) is Annotated else kind
        numeric = plain in (int, float) and isinstance(value, int | float) and not isinstance(value, bool)
        if numeric and not words.startswith(f"be {WORDS[plain]}"):
            return words
    heads = dict.fromkeys(words.partition(", got")[0].removeprefix("be ") for words in wrong)
    heads.pop(WORDS[NoneType], None)
    return f"be {' or '.join(heads)}, got {shown(value)}"


def _of_tuple(value: Any, kinds: tuple[Any, ...]) -> str:
    if not isinstance(value, tuple | list):
        return f"be a list, got {shown(value)}"
    if kinds and kinds[-1] is not ... and len(kinds) != len(value):
        return f"have {len(kinds)} entries, got {shown(value)}"
    each = [kinds[0]] * len(value) if kinds and kinds[-1] is ... else kinds
    for entry, kind in zip(value, each, strict=False):
        wrong = problem(entry, kind)
        if wrong:
            return f"{wrong} in {shown(value)}"
    return ""


def shown(value: Any) -> str:
    """A value for a message: at most 80 printable characters."""
    value = list(value) if isinstance(value, tuple) else value
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        text = "a number of thousands of digits"
    return printable(text if len(text) <= 80 else f"{text[:77]}...")


def _raise(name: str, words: str) -> None:
    if words:
        raise ValueError(f"`{name}` must {words}.")
