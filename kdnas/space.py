"""Search spaces: finite sets of architectures, and the blueprint of each. No torch here."""

import abc
import dataclasses
import functools
import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self, final

from kdnas.architecture import Architecture, Choice, Value
from kdnas.specs import Spec, nearest, spec

_REMEMBERED = 10_000  # blueprints; each is a few kilobytes
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


@final
@dataclass(frozen=True)
class Layer:
    """How to make one module: a description, not a module.

    Attributes:
        make: the module's class and its arguments.
        bank: the weights it draws on. In a supernet, layers at one position with one bank share weights by
            the sharing rule; layers with different banks have weights of their own.
    """

    make: Spec
    bank: str = "shared"

    def __str__(self) -> str:
        return str(self.make)


def layer(make: Callable[..., Any] | str, *, bank: str = "shared", **arguments: Any) -> Layer:
    """A Layer from a module class, or its import path, and the class's arguments."""
    return Layer(spec(make, **arguments), bank)


@final
@dataclass(frozen=True)
class Blueprint:
    """A whole network as a value: stem, stages, head.

    Attributes:
        stem: takes images.
        stages: each a sequence of layers; a loss sees the output of every stage.
        head: takes the last stage's output, gives logits.
        image: channels, height and width of the images the network computes on.
    """

    stem: Layer
    stages: tuple[tuple[Layer, ...], ...]
    head: Layer
    image: tuple[int, int, int]

    def named_layers(self) -> Iterator[tuple[str, Layer]]:
        """Position and layer, in order of execution."""
        yield "stem", self.stem
        for i, stage in enumerate(self.stages):
            for j, one in enumerate(stage):
                yield f"stages.{i}.{j}", one
        yield "head", self.head

    def __str__(self) -> str:
        lines = [f"image       {' x '.join(map(str, self.image))}"]
        lines += [f"{position:<11} {one}" for position, one in self.named_layers()]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` turns back into an equal Blueprint."""
        return {
            "image": list(self.image),
            "stem": _layer_json(self.stem),
            "stages": [[_layer_json(one) for one in stage] for stage in self.stages],
            "head": _layer_json(self.head),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Blueprint":
        """The Blueprint that `to_json` wrote."""
        channels, height, width = value["image"]
        return cls(
            _layer_from_json(value["stem"]),
            tuple(tuple(_layer_from_json(one) for one in stage) for stage in value["stages"]),
            _layer_from_json(value["head"]),
            (channels, height, width),
        )


def _layer_json(one: Layer) -> dict[str, Any]:
    return {**one.make.to_json(), "bank": one.bank}


def _layer_from_json(value: Mapping[str, Any]) -> Layer:
    return Layer(Spec.from_json({"make": value["make"], "arguments": value["arguments"]}), value["bank"])


@dataclass(frozen=True, kw_only=True)
class SearchSpace(abc.ABC):
    """A finite set of architectures, and how each one is built.

    A family derives from this as a frozen keyword-only dataclass, whose fields are the keys of its TOML
    tables, and writes `structure` and `layers`. Everything else is generic.

    Attributes:
        name: the table's name.
        source: paper and table the numbers come from.
        classes: number of classes.
        image_channels: channels of an image.
        resolutions: heights (and widths) of the images the network computes on, ascending; more
            than one makes the input size a choice like any other, named `resolution`.
    """

    name: str = ""
    source: str = ""
    classes: int = 10
    image_channels: int = 3
    resolutions: tuple[int, ...] = (32,)

    @property
    @abc.abstractmethod
    def structure(self) -> tuple[Choice, ...]:
        """The choices but `resolution`, in the order they are decided; one comes after the one it needs."""

    @abc.abstractmethod
    def layers(self, architecture: Architecture) -> tuple[Layer, tuple[tuple[Layer, ...], ...], Layer]:
        """Stem, stages and head of a canonical architecture."""

    def covering(self) -> tuple[Architecture, ...]:
        """Architectures that together use every weight; an elastic space needs only its largest."""
        return (self.largest,)

    def bank_layers(self) -> Iterator[tuple[str, Layer]]:
        """Position and layer of all that a supernet holds weights for: those of the covering architectures.

        Where one position has several in one bank, the supernet holds the one with most parameters. A family
        overrides this when no architecture has a layer with all the weights that others use there.
        """
        for architecture in self.covering():
            yield from self.blueprint(architecture).named_layers()

    def canonical(self, architecture: Architecture) -> Architecture:
        """The one value for all architectures that are the same network; the identity unless overridden."""
        return architecture

    def code(self, architecture: Architecture) -> str:
        """A compact name: per choice the digit of its option, `.` where the choice does not exist."""
        return "".join(
            _DIGITS[c.options.index(architecture[c.name])] if c.name in architecture else "." for c in self.choices
        )

    def parse(self, code: str) -> Architecture:
        """The canonical architecture of a code.

        Raises:
            ValueError: the code has another length, or a digit without an option.
        """
        if len(code) != len(self.choices):
            raise ValueError(
                f"a code of {self.name or 'this space'} has {len(self.choices)} digits, got {len(code)} in {code!r}."
            )
        values: dict[str, Value] = {}
        for choice, digit in zip(self.choices, code, strict=True):
            if digit != ".":
                place = _DIGITS.find(digit)
                if not 0 <= place < len(choice.options):
                    raise ValueError(
                        f"{choice.name} has {len(choice.options)} options, so its digit is 0 to "
                        f"{_DIGITS[len(choice.options) - 1]}, got {digit!r} in {code!r}."
                    )
                values[choice.name] = choice.options[place]
        return self.architecture(values)

    # What follows is the same for every space.

    @final
    @functools.cached_property
    def choices(self) -> tuple[Choice, ...]:
        """Every decision, in the order it is made."""
        first = (Choice("resolution", self.resolutions),) if len(self.resolutions) > 1 else ()
        return first + tuple(self.structure)

    @final
    def blueprint(self, architecture: Architecture) -> Blueprint:
        """The network of an architecture, as a value; the latest ones are remembered."""
        found = self._blueprints.get(architecture)
        if found is None:
            canonical = self.canonical(architecture)
            stem, stages, head = self.layers(canonical)
            side = canonical.integer("resolution") if "resolution" in canonical else self.resolutions[0]
            found = Blueprint(stem, stages, head, (self.image_channels, side, side))
            if len(self._blueprints) >= _REMEMBERED:
                self._blueprints.clear()
            self._blueprints[architecture] = found
        return found

    @functools.cached_property
    def _blueprints(self) -> dict[Architecture, Blueprint]:
        return {}

    @final
    def decide(self, pick: Callable[[Choice], Value]) -> Architecture:
        """The canonical architecture that takes `pick(choice)` for every choice that exists."""
        chosen: dict[str, Value] = {}
        for choice in self.choices:
            if choice.exists(chosen):
                chosen[choice.name] = pick(choice)
        return self.canonical(Architecture(chosen))

    @final
    @functools.cached_property
    def largest(self) -> Architecture:
        """The last option everywhere."""
        return self.decide(lambda choice: choice.options[-1])

    @final
    @functools.cached_property
    def smallest(self) -> Architecture:
        """The first option everywhere."""
        return self.decide(lambda choice: choice.options[0])

    @final
    def sample(self, rng: random.Random) -> Architecture:
        """Every option of every existing choice equally likely.

        Networks with several spellings are drawn as often as they have spellings.
        """
        return self.decide(lambda choice: rng.choice(choice.options))

    @final
    def mutate(self, architecture: Architecture, rng: random.Random, rate: float = 0.1) -> Architecture:
        """Each choice redrawn with probability `rate`, at least one of them changed to another option.

        Raises:
            ValueError: the space has one architecture only.
        """
        changeable = [c for c in self.choices if c.exists(architecture) and len(c.options) > 1]
        if not changeable:
            raise ValueError(f"{self.name or 'this space'} has one architecture; nothing can be mutated.")
        while True:
            forced = rng.choice(changeable).name

            def pick(choice: Choice, forced: str = forced) -> Value:
                kept = architecture.get(choice.name)
                if kept is None:
                    return rng.choice(choice.options)
                others = [o for o in choice.options if o != kept]
                return rng.choice(others) if others and (choice.name == forced or rng.random() < rate) else kept

            mutant = self.decide(pick)
            if mutant != architecture:  # two spellings of one network are no change
                return mutant

    @final
    def cross(self, first: Architecture, second: Architecture, rng: random.Random) -> Architecture:
        """Each choice from one parent, drawn anew where neither has it."""

        def pick(choice: Choice) -> Value:
            held = [parent[choice.name] for parent in (first, second) if choice.name in parent]
            return rng.choice(held or choice.options)

        return self.decide(pick)

    @final
    def architecture(self, values: Mapping[str, Value]) -> Architecture:
        """The canonical architecture of a mapping, checked.

        Raises:
            ValueError: an unknown or a missing choice, or a value that is no option.
        """
        self.validate(values)
        return self.canonical(Architecture(values))

    @final
    def validate(self, values: Mapping[str, Value]) -> None:
        """Raise a ValueError with rule, value and fix unless the mapping is an architecture of this space."""
        known = {choice.name: choice for choice in self.choices}
        for name in values:
            if name not in known:
                raise ValueError(f"{self.name or 'this space'} has no choice {name!r}.{nearest(name, known)}")
        for choice in self.choices:
            exists = choice.exists(values)
            if exists and choice.name not in values:
                raise ValueError(f"{choice.name} is missing. Set it to one of {choice.options}.")
            if not exists and choice.name in values:
                raise ValueError(
                    f"{choice.name} exists only while {choice.needs} is at least {choice.at_least}, which is "
                    f"{values.get(choice.needs or '')}. Remove {choice.name}."
                )
            if exists and values[choice.name] not in choice.options:
                raise ValueError(f"{choice.name} must be one of {choice.options}, got {values[choice.name]!r}.")

    @final
    def count(self) -> int:
        """How many assignments of the choices there are, exactly; several may be one network (`canonical`)."""
        children: dict[str | None, list[Choice]] = {}
        for choice in self.choices:
            children.setdefault(choice.needs, []).append(choice)

        def ways(choice: Choice) -> int:
            below = children.get(choice.name, [])
            return sum(
                math.prod(ways(child) for child in below if int(option) >= child.at_least) if below else 1
                for option in choice.options
            )

        return math.prod(ways(choice) for choice in children.get(None, []))

    @final
    def all(self) -> Iterator[Architecture]:
        """Every distinct network once, depth first in the order of the choices."""

        def extend(chosen: dict[str, Value], place: int) -> Iterator[Architecture]:
            if place == len(self.choices):
                value = Architecture(chosen)
                if self.canonical(value) == value:
                    yield value
                return
            choice = self.choices[place]
            if not choice.exists(chosen):
                yield from extend(chosen, place + 1)
                return
            for option in choice.options:
                yield from extend({**chosen, choice.name: option}, place + 1)

        return extend({}, 0)

    @final
    def fitted(self, *, classes: int, image_channels: int) -> Self:
        """The same space for other data."""
        return dataclasses.replace(self, classes=classes, image_channels=image_channels)


def make_divisible(value: float, divisor: int = 8) -> int:
    """The nearest multiple of `divisor`, at least one, never more than 10 % below `value`.

    Reference: the rounding rule of Sandler et al., MobileNetV2, CVPR 2018, as used by all MobileNet-like spaces.
    """
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded
