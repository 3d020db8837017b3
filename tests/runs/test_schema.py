from dataclasses import dataclass
from typing import Any, Literal, NotRequired, TypedDict

import pytest

from kdnas.runs.schema import mismatch
from kdnas.values import Index, Share


class Inner(TypedDict):
    number: int
    share: NotRequired[float]


@dataclass
class Outer:
    inner: Inner
    rows: list[Inner]
    kind: Literal["a", "b"] = "a"


RIGHT = {"inner": {"number": 1}, "rows": [{"number": 2, "share": 1}], "kind": "b"}


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (RIGHT, Outer),
        (None, int | None),
        ({"a": [1, None]}, dict[str, list[int | None]]),
        ([1, "a"], tuple[int, str]),
        ([], tuple[int, ...]),
        (object, Any),
        (True, bool),
        (3, float),
    ],
)
def test_right_values_have_no_fault(value, kind):
    assert mismatch(value, kind) == ""


@pytest.mark.parametrize(
    ("value", "kind", "reason"),
    [
        ([], Outer, "holds no JSON object"),
        ({"inner": {"number": 1}}, Outer, "has no 'rows'"),
        (RIGHT | {"rows": [{"share": 1}]}, Outer, "has no 'rows.0.number'"),
        (RIGHT | {"kind": "c"}, Outer, "its 'kind' must be 'a' or 'b', got 'c'"),
        (RIGHT | {"inner": {"number": True}}, Outer, "its 'inner.number' must be a whole number, got True"),
        (RIGHT | {"inner": {"number": 1.0}}, Outer, "its 'inner.number' must be a whole number, got 1.0"),
        (RIGHT | {"rows": {}}, Outer, "its 'rows' must be a list, got {}"),
        ({"a": float("nan")}, dict[str, float], "its 'a' must be finite, got nan"),
        ({"a": 10**400}, dict[str, float], "its 'a' must be finite, got 1000000"),
        ([1], tuple[int, int], "must be a list of 2, got [1]"),
        ("text", int | None, "must be"),
        ({"n": -1}, dict[str, Index], "its 'n' must be at least 0, got -1"),
        ({"n": 1.5}, dict[str, Share | None], "its 'n' must be at most 1, got 1.5"),
        ({"n": True}, dict[str, Index], "its 'n' must be a whole number, got True"),
        ({"number": "x"}, Inner | None, "its 'number' must be a whole number, got 'x'"),
    ],
)
def test_a_wrong_value_is_named_by_its_place(value, kind, reason):
    assert mismatch(value, kind).startswith(reason)
