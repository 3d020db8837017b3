"""Search spaces: finite sets of architectures, and the blueprint of each."""

import abc
import dataclasses
import functools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeVar, final

from kdnas.architecture import Architecture, Choice, Value
from kdnas.specs import Spec, nearest, resolve, spec
from kdnas.values import Depth as Depth
from kdnas.values import DepthOptions as DepthOptions
from kdnas.values import Depths as Depths
from kdnas.values import Factor as Factor
from kdnas.values import Kernel as Kernel
from kdnas.values import KernelOptions as KernelOptions
from kdnas.values import Range as Range
from kdnas.values import Rate as Rate
from kdnas.values import Ratios as Ratios
from kdnas.values import Size as Size
from kdnas.values import SizeOptions as SizeOptions
from kdnas.values import Sizes as Sizes
from kdnas.values import check_fields, shown

_CACHE_SIZE = 10_000  # blueprints; each is a few kilobytes
_MUTATIONS = 1000  # tries to find a neighbour that is another network
_Map = TypeVar("_Map")  # a feature map, or its shape


@final
@dataclass(frozen=True)
class Layer:
    """A module's class and arguments: a description, not a module.

    Attributes:
        make: the module's class and its arguments.
        bank: name of its weights. In a supernet, layers at the same position with the same bank share weights by the
            sharing rule; layers with different banks have weights of their own.
        reads: of a head: indices of the stages, ascending, whose outputs it takes before that of the last one.
    """

    make: Spec
    bank: str = "shared"
    reads: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.make}{''.join(f' with stage {stage}' for stage in self.reads)}"

    def inputs(self, x: _Map, outputs: Sequence[_Map]) -> tuple[_Map, ...]:
        """What it is called with.

        Args:
            x: the output of the layer before it.
            outputs: of the stages before it.
        """
        return (*(outputs[stage] for stage in self.reads), x)


def layer(
    make: Callable[..., Any] | str, *, bank: str = "shared", reads: tuple[int, ...] = (), **arguments: Any
) -> Layer:
    """A Layer from a module class, or its import path, and the class's arguments."""
    return Layer(spec(make, **arguments), bank, reads)


@final
@dataclass(frozen=True)
class Blueprint:
    """A whole network as a value: stem, stages, head.

    Attributes:
        stem: reads images.
        stages: each a sequence of layers; losses see the output of every stage.
        head: reads the last stage's output, after those of the stages that it names in `reads`; returns logits.
        image: channels, height and width of the images the network computes on.
        dense: whether it takes images of any size, of which `image` is the one that costs are counted at, and its
            logits, `[batch, classes, height, width]`, are enlarged to the size of the images (bilinear).
    """

    stem: Layer
    stages: tuple[tuple[Layer, ...], ...]
    head: Layer
    image: tuple[int, int, int]
    dense: bool = False

    def __post_init__(self) -> None:
        reads, before = self.head.reads, len(self.stages) - 1
        known = all(type(i) is int and 0 <= i < before for i in reads)
        if not known or sorted(set(reads)) != list(reads):
            raise ValueError(
                f"`reads` of a head must be indices of the {before} stages before the last, ascending, got {reads}."
            )
        if reads and not all(self.stages):
            raise ValueError("every stage must have a layer where the head has `reads`.")
        if any(entry.reads for entry in (self.stem, *(entry for stage in self.stages for entry in stage))):
            raise ValueError("`reads` must be empty for layers before the head.")

    def named_layers(self) -> Iterator[tuple[str, Layer]]:
        """Position and layer, in order of execution."""
        return ((name, entry) for name, entry, _ in self.steps())

    def steps(self) -> Iterator[tuple[str, Layer, int | None]]:
        """Position, layer, and the stage that ends with it, in order of execution."""
        yield "stem", self.stem, None
        for i, stage in enumerate(self.stages):
            for j, stage_layer in enumerate(stage):
                yield f"stages.{i}.{j}", stage_layer, i if j == len(stage) - 1 else None
        yield "head", self.head, None

    @property
    def chain(self) -> Layer:
        """The network as one layer, for images of its own size; dense logits are not enlarged."""
        ends = [place for place, (_, _, stage) in enumerate(self.steps()) if stage in self.head.reads]
        reads = {"reads": tuple(ends)} if ends else {}
        parts = tuple(entry.make for _, entry in self.named_layers())
        return Layer(spec("kdnas.blocks.basic:Chain", parts=parts, **reads))

    def __str__(self) -> str:
        lines = [f"image       {' x '.join(map(str, self.image))}"]
        lines += [f"{position:<11} {entry}" for position, entry in self.named_layers()]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` turns back into an equal Blueprint."""
        return {
            "image": list(self.image),
            "stem": _layer_json(self.stem),
            "stages": [list(map(_layer_json, stage)) for stage in self.stages],
            "head": _layer_json(self.head),
            **({"dense": True} if self.dense else {}),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Blueprint":
        """The Blueprint that `to_json` wrote."""
        channels, height, width = value["image"]
        return cls(
            _layer_from_json(value["stem"]),
            tuple(tuple(map(_layer_from_json, stage)) for stage in value["stages"]),
            _layer_from_json(value["head"]),
            (channels, height, width),
            value.get("dense", False) is True,
        )


def _layer_json(value: Layer) -> dict[str, Any]:
    reads = {"reads": list(value.reads)} if value.reads else {}
    return {**value.make.to_json(), "bank": value.bank, **reads}


def _layer_from_json(value: Mapping[str, Any]) -> Layer:
    make = Spec.from_json({"make": value["make"], "arguments": value["arguments"]})
    return Layer(make, value["bank"], tuple(value.get("reads", ())))


@dataclass(frozen=True, kw_only=True)
class SearchSpace(abc.ABC):
    """A finite set of architectures, and the network of each.

    A family is a frozen keyword-only dataclass that derives from this, has the keys of its TOML tables as fields, and
    defines `structure` and `layers`. Everything else is generic. Fields whose types have a `Range`, such as `Size` or
    `SizeOptions`, are checked when a space is made.

    Attributes:
        name: the table's name.
        source: paper and table the numbers come from.
        classes: number of classes.
        image_channels: channels of an image.
        resolutions: heights (and widths) of the images the network computes on, ascending; with more than one, the
            input size is a choice named `resolution`.

    Example:
        >>> import random
        >>> from kdnas.spaces.toy import Toy
        >>> space = Toy(widths=(4, 8), depths=(1, 2), num_stages=1)
        >>> space.count()
        6
        >>> architecture = space.sample(random.Random(0))
        >>> architecture
        Architecture({'stage0.depth': 2, 'stage0.layer0.width': 8, 'stage0.layer1.width': 4})
        >>> space.code(architecture), space.parse("110") == architecture
        ('110', True)
        >>> print(space.blueprint(space.smallest))
        image       3 x 8 x 8
        stem        ConvNormAct(inputs=3, kernel=3, outputs=4, stride=1)
        stages.0.0  ConvNormAct(inputs=4, kernel=3, outputs=4, stride=1)
        head        PoolLinear(classes=10, inputs=4)
    """

    name: str = ""
    source: str = ""
    classes: Size = 10
    image_channels: Size = 3
    resolutions: SizeOptions = (32,)

    smallest_is_cheapest: ClassVar[bool] = False
    """Whether no architecture has fewer params, MACs or bytes of activations than the smallest."""

    dense: ClassVar[bool] = False
    """Whether its networks classify every position of an image, and take images of any size."""

    digits: ClassVar[str] = "0123456789abcdefghijklmnopqrstuvwxyz"
    """The digits of a choice's first option, second option and so on in a code."""

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    @abc.abstractmethod
    def structure(self) -> tuple[Choice, ...]:
        """All choices but `resolution`, in the order they are decided; a choice comes after the one it needs."""

    @abc.abstractmethod
    def layers(self, architecture: Architecture) -> tuple[Layer, tuple[tuple[Layer, ...], ...], Layer]:
        """Stem, stages and head of a canonical architecture; nothing is built."""

    def covering(self) -> tuple[Architecture, ...]:
        """Architectures that together use every weight.

        The largest, and one for every option that is no number or larger than the largest's.
        """
        largest = self.largest

        def needs(choice: Choice, option: Value) -> bool:
            chosen = largest.get(choice.name)
            both = isinstance(option, int | float) and isinstance(chosen, int | float)
            return option != chosen and (not both or option > chosen)

        others = [
            self.decide(lambda c, own=choice, option=option: option if c == own else largest.get(c.name, c.options[-1]))
            for choice in self.choices
            for option in choice.options
            if needs(choice, option)
        ]
        return tuple(dict.fromkeys((largest, *others)))

    def bank_layers(self) -> Iterator[tuple[str, Layer]]:
        """Position and layer of everything a supernet has weights for: the layers of the covering architectures.

        Of several layers at one position in one bank, the supernet builds one with the largest value of each argument
        that is a number. A family overrides this when no architecture has a layer with the weights that others use
        there.
        """
        for architecture in self.covering():
            yield from self.blueprint(architecture).named_layers()

    def canonical(self, architecture: Architecture) -> Architecture:
        """The same value for all architectures that are the same network; the identity unless overridden."""
        return architecture

    def code(self, architecture: Architecture) -> str:
        """A compact name: per choice the digit of its option, `.` where the choice does not exist."""
        return "".join(
            self.digits[c.options.index(architecture[c.name])] if c.name in architecture else "." for c in self.choices
        )

    def parse(self, code: str) -> Architecture:
        """The canonical architecture of a code.

        Raises:
            ValueError: the code has another length, or a digit without an option.
        """
        if len(code) != len(self.choices):
            raise ValueError(
                f"a code of {self._title} must have {len(self.choices)} digits, got {len(code)} in {code!r}."
            )
        values: dict[str, Value] = {}
        for choice, digit in zip(self.choices, code, strict=True):
            if digit != ".":
                index = self.digits.find(digit)
                if not 0 <= index < len(choice.options):
                    raise ValueError(
                        f"the digit of {choice.name} must be from {self.digits[0]} to "
                        f"{self.digits[len(choice.options) - 1]}, got {digit!r} in {code!r}."
                    )
                values[choice.name] = choice.options[index]
        return self.architecture(values)

    # The rest is the same for every space.

    @final
    @functools.cached_property
    def choices(self) -> tuple[Choice, ...]:
        """All choices, in the order they are decided."""
        first = (Choice("resolution", self.resolutions),) if len(self.resolutions) > 1 else ()
        return first + tuple(self.structure)

    @final
    def blueprint(self, architecture: Architecture) -> Blueprint:
        """The network of an architecture, as a value; cached."""
        blueprint = self._blueprints.get(architecture)
        if blueprint is None:
            canonical = self.canonical(architecture)
            stem, stages, head = self.layers(canonical)
            blueprint = Blueprint(stem, stages, head, (self.image_channels, *self.size_of(canonical)), self.dense)
            if len(self._blueprints) >= _CACHE_SIZE:
                self._blueprints.clear()
            self._blueprints[architecture] = blueprint
        return blueprint

    def size_of(self, architecture: Architecture) -> tuple[int, int]:
        """Height and width of the images that a canonical architecture computes on."""
        side = architecture.integer("resolution") if "resolution" in architecture else self.resolutions[0]
        return side, side

    @functools.cached_property
    def _blueprints(self) -> dict[Architecture, Blueprint]:
        return {}

    @final
    def decide(self, pick: Callable[[Choice], Value]) -> Architecture:
        """The canonical architecture with the option `pick(choice)` for every choice that exists."""
        values: dict[str, Value] = {}
        for choice in self.choices:
            if choice.exists(values):
                values[choice.name] = pick(choice)
        return self.canonical(Architecture(values))

    @final
    @functools.cached_property
    def largest(self) -> Architecture:
        """The option of most MACs everywhere; of equal ones that of most params, then the last."""
        return self._extreme(-1)

    @final
    @functools.cached_property
    def smallest(self) -> Architecture:
        """The option of least MACs everywhere; of equal ones that of least params, then the first."""
        return self._extreme(0)

    def _extreme(self, end: int) -> Architecture:
        """From the first (0) or last (-1) options: choice by choice the cheapest or dearest option beside the others'.

        It ends where no change of one choice helps. Resolutions are ascending, and need no test.
        """
        cost = resolve("kdnas.costs.count:cost")  # by its path: counting takes torch, values do not
        options = {choice.name: choice.options[end] for choice in self.choices}

        def network() -> Architecture:
            return self.decide(lambda choice: options[choice.name])

        def rank() -> tuple[int, int]:
            params, macs = cost(self.blueprint(network()))
            return (macs, params) if end == 0 else (-macs, -params)

        best, before = rank(), None
        while best != before:
            before = best
            for choice in self.choices:
                if choice.name == "resolution" or choice.name not in network():
                    continue
                chosen = options[choice.name]
                for option in choice.options:
                    options[choice.name] = option
                    if (new := rank()) < best:
                        chosen, best = option, new
                options[choice.name] = chosen
        return network()

    @final
    def uniform(self, option: Value) -> Architecture:
        """This option for every choice that has it, the last option for the others."""
        return self.decide(lambda choice: option if option in choice.options else choice.options[-1])

    @final
    def sample(self, rng: random.Random) -> Architecture:
        """A random architecture: every option of every existing choice is equally likely.

        Where several assignments are one network (`canonical`), it is sampled in proportion to their number.
        """
        return self.decide(lambda choice: rng.choice(choice.options))

    @final
    def mutate(self, architecture: Architecture, rng: random.Random, rate: float = 0.1) -> Architecture:
        """A neighbour: each choice is changed to another option with probability `rate`, at least one in any case.

        Where a hundred neighbours in turn are the same network in another form, half of the choices are changed.

        Raises:
            ValueError: the space has one architecture only.
        """
        changeable = [c for c in self.choices if c.exists(architecture) and len(c.options) > 1]
        if not changeable:
            raise ValueError(f"{self._title} has only one architecture, which cannot be mutated.")
        for attempt in range(_MUTATIONS):
            forced = rng.choice(changeable).name
            rate = rate if attempt < _MUTATIONS // 10 else max(rate, 0.5)

            def pick(choice: Choice, forced: str = forced, rate: float = rate) -> Value:
                current = architecture.get(choice.name)
                if current is None:
                    return rng.choice(choice.options)
                others = [option for option in choice.options if option != current]
                return rng.choice(others) if others and (choice.name == forced or rng.random() < rate) else current

            mutant = self.decide(pick)
            if mutant != architecture:  # another assignment of the same network is no change
                return mutant
        raise ValueError(f"{self._title} has only one architecture in {_MUTATIONS} mutations. Give it more options.")

    @final
    def cross(self, first: Architecture, second: Architecture, rng: random.Random) -> Architecture:
        """A child: each choice from a random parent, random where neither parent has it."""

        def pick(choice: Choice) -> Value:
            inherited = [parent[choice.name] for parent in (first, second) if choice.name in parent]
            return rng.choice(inherited or choice.options)

        return self.decide(pick)

    @final
    def architecture(self, values: Mapping[str, Value]) -> Architecture:
        """The canonical architecture of a mapping, checked.

        Raises:
            ValueError: an unknown or a missing choice, or a value that is not an option.
        """
        self.validate(values)
        return self.canonical(Architecture(values))

    @final
    def validate(self, values: Mapping[str, Value]) -> None:
        """Check that a mapping is an architecture of this space.

        Raises:
            ValueError: an unknown or a missing choice, or a value that is not an option.
        """
        known = {choice.name: choice for choice in self.choices}
        for name in values:
            if name not in known:
                raise ValueError(f"{self._title} has no choice {shown(name)}.{nearest(name, known)}")
        for choice in self.choices:
            exists = choice.exists(values)
            if exists and choice.name not in values:
                raise ValueError(f"{choice.name} is missing. Set it to one of {choice.options}.")
            if not exists and choice.name in values:
                raise ValueError(
                    f"{choice.name} exists only while {choice.needs} is at least {choice.at_least}, got "
                    f"{choice.needs} = {values.get(choice.needs or '')}. Remove {choice.name}."
                )
            if exists and values[choice.name] not in choice.options:
                raise ValueError(f"{choice.name} must be one of {choice.options}, got {values[choice.name]!r}.")

    @final
    def count(self) -> int:
        """The exact number of assignments of the choices; several may be one network (`canonical`)."""
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
        return (architecture for architecture in self.assignments() if self.canonical(architecture) == architecture)

    @final
    def assignments(self) -> Iterator[Architecture]:
        """Every assignment of the choices, depth first in their order; several may be one network (`canonical`)."""

        def extend(values: dict[str, Value], index: int) -> Iterator[Architecture]:
            if index == len(self.choices):
                yield Architecture(values)
                return
            choice = self.choices[index]
            if not choice.exists(values):
                yield from extend(values, index + 1)
                return
            for option in choice.options:
                yield from extend({**values, choice.name: option}, index + 1)

        return extend({}, 0)

    def fitted(self, *, classes: int, image_channels: int, size: tuple[int, int] | None = None) -> Self:
        """The same space for data with other classes and channels.

        Args:
            classes: number of classes.
            image_channels: channels of an image.
            size: height and width of the images, for networks that do not resize them.
        """
        del size
        return dataclasses.replace(self, classes=classes, image_channels=image_channels)

    @property
    def _title(self) -> str:
        return self.name or "this space"


def make_divisible(value: float, divisor: int = 8) -> int:
    """The nearest multiple of `divisor`, at least one, never more than 10 % below `value`.

    Reference: the rounding rule of Sandler et al., MobileNetV2, CVPR 2018, as used by all MobileNet-like spaces.
    """
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded
