"""An entry: one row of a ranking."""

from dataclasses import dataclass, field
from typing import Any, final

from kdnas.architecture import Architecture
from kdnas.runs.schema import mismatch

RANDOM, CONTRAST = "random control", "contrast"
CONTROL_SEARCHERS = frozenset((RANDOM, CONTRAST))
"""An entry's `searcher` where it is a control's: random search, and the same search under another score."""


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
            ValueError: an unknown, a missing or a wrong value; the message names its key, after "it".
        """
        unknown = sorted(value.keys() - cls.__dataclass_fields__.keys())
        reason = f"has the unknown key {unknown[0]!r}" if unknown else mismatch(value, cls)
        if not reason and not all(isinstance(option, str | int | float) for option in value["architecture"].values()):
            reason = "its 'architecture' must have an option for each choice"
        if reason:
            raise ValueError(reason)
        fields: dict[str, Any] = {**value, "architecture": Architecture(value["architecture"])}
        return cls(**fields)
