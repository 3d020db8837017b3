"""An architecture, one network of a search space, and the choices it is made of: plain values."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import final

Value = int | float | str
"""An option of a choice.

Example:
    >>> options: tuple[Value, ...] = (16, 0.5, "k3e6")
    >>> all(isinstance(option, Value) for option in options)
    True
"""


@final
class Architecture(Mapping[str, Value]):
    """A mapping of choice names to options: one network of a search space.

    Immutable, hashable, equal by content; `dict(architecture)` is its JSON.

    Args:
        values: option by choice name; `SearchSpace.architecture` also checks them.

    Example:
        >>> architecture = Architecture({"depth": 2, "block0.kernel": 3, "block1.kernel": 5})
        >>> architecture["block1.kernel"], architecture.integer("depth")
        (5, 2)
        >>> architecture.under("block1")
        Architecture({'kernel': 5})
        >>> {architecture: "a key"}[Architecture(dict(architecture))]
        'a key'
    """

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
        options: numbers in ascending order, or names of operations.
        needs: the choice this one depends on, or None.
        at_least: it exists only while `architecture[needs] >= at_least`.

    Example:
        >>> kernel = Choice("block1.kernel", (3, 5), needs="depth", at_least=2)
        >>> kernel.exists({"depth": 2}), kernel.exists({"depth": 1})
        (True, False)
    """

    name: str
    options: tuple[Value, ...]
    needs: str | None = None
    at_least: int = 0

    def __post_init__(self) -> None:
        if not self.options:
            raise ValueError(f"the choice {self.name} has no options. Give it at least one.")
        if len(set(self.options)) < len(self.options):
            raise ValueError(f"the choice {self.name} has an option twice: {self.options}. Remove the repetition.")

    def exists(self, values: Mapping[str, Value]) -> bool:
        """Whether the choice exists, given the options of the earlier choices."""
        return self.needs is None or (self.needs in values and int(values[self.needs]) >= self.at_least)
