"""An entry: one row of a ranking."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from typing import Any, final

from kdnas.architecture import Architecture

RANDOM, CONTRAST = "random control", "contrast"
CONTROL_SEARCHERS = frozenset((RANDOM, CONTRAST))
"""An entry's `searcher` where it is a control's: random search, and the same search under another score."""


_KINDS: dict[Any, Any] = {Architecture: Mapping, dict: Mapping, str: str, int: int, float: (int, float)}
_KIND_WORDS = {Mapping: "an object", str: "a text", int: "a whole number", (int, float): "a number"}


@final
@dataclass(frozen=True)
class Entry:
    """One scored architecture.

    Attributes:
        share: of the whole evaluation that was run; below 1 where it was stopped early.
        spent: memory in bytes and latency in seconds, where the search bounds them.
    """

    architecture: Architecture
    code: str
    score: float
    parts: dict[str, float]
    params: int
    macs: int
    layers: int
    seconds: float
    scorer: str = ""
    searcher: str = ""
    search: int = 0
    share: float = 1.0
    spent: dict[str, float] = field(default_factory=dict)

    @property
    def is_control(self) -> bool:
        """Whether it belongs to a control, not to the search itself."""
        return self.searcher in CONTROL_SEARCHERS

    def to_json(self) -> dict[str, Any]:
        """One line of `ranking.jsonl`."""
        return {**self.__dict__, "architecture": dict(self.architecture)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Entry":
        """The entry of a line of `ranking.jsonl`.

        Raises:
            ValueError: an unknown, a missing or a wrong value; the message names its key.
        """
        known = {f.name: f for f in dataclasses.fields(cls)}
        for name in value:
            if name not in known:
                raise ValueError(f"it has the unknown key {name!r}.")
        for name, entry_field in known.items():
            required = entry_field.default is MISSING and entry_field.default_factory is MISSING
            if name not in value and required:
                raise ValueError(f"it has no {name!r}.")
            kinds = _KINDS[getattr(entry_field.type, "__origin__", entry_field.type)]
            if name in value and (not isinstance(value[name], kinds) or isinstance(value[name], bool)):
                raise ValueError(f"its {name!r} must be {_KIND_WORDS[kinds]}, got {value[name]!r}.")
            if isinstance(value.get(name), float) and not math.isfinite(value[name]):
                raise ValueError(f"its {name!r} must be finite, got {value[name]}.")
        fields: dict[str, Any] = {**value, "architecture": Architecture(value["architecture"])}
        return cls(**fields)
