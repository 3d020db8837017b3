"""One subnet, as a value, and the decisions it is made of."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import final

Value = int | float | str


@final
class Architecture(Mapping[str, Value]):
    """Choice name to chosen option. Immutable, hashable, equal by content; `dict(architecture)` is its JSON."""

    __slots__ = ("_hash", "_values")

    def __init__(self, values: Mapping[str, Value]) -> None:
        self._values = dict(values)
        self._hash = hash(frozenset(self._values.items()))

    def __getitem__(self, name: str) -> Value:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return f"Architecture({self._values})"

    def under(self, prefix: str) -> "Architecture":
        """The choices under `prefix.`, with the prefix removed."""
        start = prefix + "."
        return Architecture({n[len(start) :]: v for n, v in self.items() if n.startswith(start)})

    def integer(self, name: str) -> int:
        """The option of an integer choice, as an int."""
        return int(self._values[name])


@final
@dataclass(frozen=True)
class Choice:
    """One decision of a search space.

    Attributes:
        name: dotted, such as `stage1.block0.kernel`.
        options: in ascending order; the last makes the largest network.
        needs: the choice this one depends on, or None.
        at_least: it exists only while `architecture[needs] >= at_least`.
    """

    name: str
    options: tuple[Value, ...]
    needs: str | None = None
    at_least: int = 0

    def __post_init__(self) -> None:
        if not self.options:
            raise ValueError(f"{self.name} has no options. Give it at least one.")
        if len(set(self.options)) < len(self.options):
            raise ValueError(f"{self.name} has an option twice: {self.options}. Remove the repetition.")

    def exists(self, chosen: Mapping[str, Value]) -> bool:
        """Whether this decision is to be made, given the earlier ones."""
        return self.needs is None or (self.needs in chosen and int(chosen[self.needs]) >= self.at_least)
