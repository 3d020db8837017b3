"""Whether plain JSON content has the types of an annotation."""

import dataclasses
import functools
import reprlib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, NotRequired, Required, Union, is_typeddict

from kdnas.values import WORDS, is_finite, problem

_WORDS: dict[Any, str] = {**WORDS, dict: "an object", list: "a list", types.NoneType: "null"}


def mismatch(value: Any, kind: Any, place: str = "") -> str:
    """What is wrong with a value, such as "its 'phases.train' must be an object, got 3"; empty where nothing is.

    Args:
        value: what JSON gave.
        kind: `str`, `int`, `float` (finite; whole numbers too), `bool`, `None`, `Any`, `Literal`, a union, a dict, a
            list or a tuple of such, one of these within a range, a TypedDict or a dataclass; every other class must
            come from an object.
        place: keys that lead to the value, joined by dots.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Required, NotRequired):
        return mismatch(value, inner[0], place)
    if origin is Annotated:
        wrong = mismatch(value, inner[0], place)
        words = wrong or problem(value, kind)
        return wrong or (words and f"{_subject(place)}must {words}")
    if kind is Any or isinstance(kind, typing.TypeVar):
        return ""
    if origin in (Union, types.UnionType):
        reasons = [mismatch(value, option, place) for option in inner]
        # Of an object or nothing, what is wrong within the object says more.
        return "" if "" in reasons else max(reasons, key=lambda reason: reason.count("."))
    if origin is Literal:
        return "" if value in inner else _wrong(place, " or ".join(map(repr, inner)), value)
    if is_typeddict(kind) or dataclasses.is_dataclass(kind):
        return _fields(value, kind, place)
    base = origin or kind
    if isinstance(base, type) and issubclass(base, Mapping):
        values = inner[1] if len(inner) > 1 else Any
        return _each(value, dict, ((key, values) for key in value) if isinstance(value, dict) else (), place)
    if base in (list, tuple, Sequence):
        fixed = base is tuple and bool(inner) and Ellipsis not in inner
        if fixed and isinstance(value, list) and len(value) != len(inner):
            return _wrong(place, f"a list of {len(inner)}", value)
        kinds = inner if fixed else (inner[0] if inner else Any,) * (len(value) if isinstance(value, list) else 0)
        return _each(value, list, enumerate(kinds), place)
    base = types.NoneType if base is None else base
    if base not in _WORDS:
        base = dict
    accepted = isinstance(value, int | float if base is float else base)
    if not accepted or (isinstance(value, bool) and base is not bool):
        return _wrong(place, _WORDS[base], value)
    return _wrong(place, "finite", value) if base is float and not is_finite(value) else ""


def _fields(value: Any, kind: Any, place: str) -> str:
    if not isinstance(value, dict):
        return _wrong(place, _WORDS[dict], value)
    hints, required = _hints(kind)
    for name in required:
        if name not in value:
            return f"has no {_join(place, name)!r}"
    return _each(value, dict, ((name, hint) for name, hint in hints.items() if name in value), place)


def _each(value: Any, base: type, parts: Iterable[tuple[Any, Any]], place: str) -> str:
    if not isinstance(value, base):
        return _wrong(place, _WORDS[base], value)
    return next(filter(None, (mismatch(value[key], kind, _join(place, key)) for key, kind in parts)), "")


@functools.cache
def _hints(kind: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The types of an object's keys, and the keys that it must have."""
    hints = typing.get_type_hints(kind, include_extras=True)
    if is_typeddict(kind):
        return hints, tuple(sorted(kind.__required_keys__))
    missing = dataclasses.MISSING
    fields = [f for f in dataclasses.fields(kind) if f.default is missing and f.default_factory is missing]
    return hints, tuple(field.name for field in fields)


def _join(place: str, key: Any) -> str:
    return f"{place}.{key}" if place else str(key)


def _wrong(place: str, words: str, value: Any) -> str:
    if not place and words == _WORDS[dict]:
        return "holds no JSON object"
    return f"{_subject(place)}must be {words}, got {reprlib.repr(value)}"


def _subject(place: str) -> str:
    return f"its {place!r} " if place else ""
