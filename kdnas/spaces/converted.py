"""A trained network as an elastic space; `kdnas convert` writes these tables."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self, final

from kdnas.architecture import Architecture, Choice, Value
from kdnas.space import DepthOptions, Layer, Range, SearchSpace, layer
from kdnas.values import LATER

CLASSES, CHANNELS = "classes", "channels"
UNIT = 8  # inner widths of a transformer other than the source's are multiples of it


def narrower(full: int, unit: int, shares: Sequence[float] = (0.5, 0.75)) -> tuple[int, ...]:
    """Options for a width of the source: about these shares of it, in multiples of a unit, and all."""
    options = {max(unit, round(full * share / unit) * unit) for share in shares}
    return (*sorted(option for option in options if option < full), full)


@final
@dataclass(frozen=True, kw_only=True)
class Node:
    """One operation of a part; see `kdnas.blocks.graph`.

    Attributes:
        op: the operation.
        inputs: numbers of the tensors it reads; 0 is the part's input.
        values: its settings. A name stands for a number: `w0` for the part's first width, `s0` for the space's first
            stream, `classes` and `channels` for those of the data.
    """

    op: str
    inputs: tuple[int, ...] = (0,)
    values: tuple[Value, ...] = ()


@final
@dataclass(frozen=True, kw_only=True)
class Part:
    """A segment of the network.

    Attributes:
        nodes: its operations.
        widths: options for each of its inner widths, ascending.
        branch: numbers of the tensors of a residual branch that may be left out; empty for none. The sum that reads the
            branch then passes its other input on.
    """

    nodes: tuple[Node, ...] = ()
    widths: tuple[tuple[int, ...], ...] = ()
    branch: tuple[int, ...] = ()


@final
@dataclass(frozen=True, kw_only=True)
class PartStage:
    """Parts whose outputs have one shape.

    Attributes:
        parts: in order.
        depths: options for the number of parts used; the last ones are left out.
    """

    parts: tuple[Part, ...]
    depths: DepthOptions


@final
@dataclass(frozen=True, kw_only=True)
class Converted(SearchSpace):
    """A network cut into parts, some of which may be left out or narrowed.

    A width inside a part is a choice of that part. A width that several parts share, such as that of a residual
    stream, is one choice of the space, so that parts fit together whatever is chosen. The largest network is the
    source.

    Attributes:
        streams: options for each width that several parts share, ascending.
        stem: reads images.
        stages: the parts between stem and head.
        head: returns logits.
        reads: the stages whose outputs are the head's tensors -1, -2 and so on.
        size: height and width of the images that the costs of a network for every pixel are counted at; empty for
            networks that answer for whole images.

    Reference: depth and inner width as in Cai et al., Once-for-All, ICLR 2020, section 3.3; the sharing of leading
        channels is the supernet's.
    """

    smallest_is_cheapest: ClassVar[bool] = True

    streams: tuple[tuple[int, ...], ...] = ()
    stem: Part
    stages: tuple[PartStage, ...]
    head: Part
    reads: tuple[int, ...] = field(default=(), metadata=LATER)
    size: tuple[int, ...] = field(default=(), metadata=LATER)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.size) not in (0, 2):
            raise ValueError(f"`size` must be height and width, or empty, got {self.size!r}.")
        ascending = Range(least=1, ascending=True)
        widths = {f"streams[{index}]": options for index, options in enumerate(self.streams)}
        for position, part in self._parts():
            widths |= {f"{position}.widths[{index}]": options for index, options in enumerate(part.widths)}
        for name, options in widths.items():
            ascending.check(name, options)

    @property
    def dense(self) -> bool:  # type: ignore[override]
        """Whether its networks answer for every pixel."""
        return bool(self.size)

    def size_of(self, architecture: Architecture) -> tuple[int, int]:
        """The data's, for networks for every pixel."""
        return (self.size[0], self.size[1]) if self.dense else super().size_of(architecture)

    def _extreme(self, end: int) -> Architecture:
        # Every option costs more than the one before it: widths and depths are ascending, a branch adds to its block.
        return self.decide(lambda choice: choice.options[end])

    @property
    def structure(self) -> tuple[Choice, ...]:
        """The streams' widths, the stem's, per stage the depth and each part's choices, then the head's widths."""
        choices = [Choice(f"stream{index}.width", options) for index, options in enumerate(self.streams)]
        choices += _part_choices("stem", self.stem)
        for index, stage in enumerate(self.stages):
            name = f"stage{index}.depth"
            if len(stage.depths) > 1:
                choices.append(Choice(name, stage.depths))
            for place, part in enumerate(stage.parts):
                optional = place >= stage.depths[0]
                choices += _part_choices(f"stage{index}.block{place}", part, name if optional else None, place + 1)
        return (*choices, *_part_choices("head", self.head))

    def fitted(self, *, classes: int, image_channels: int, size: tuple[int, int] | None = None) -> Self:
        """The same space for data with other classes and channels.

        Raises:
            ValueError: the source's classifier or its first layers are such that the number cannot be changed.
        """
        for name, own, number in ((CLASSES, self.classes, classes), (CHANNELS, self.image_channels, image_channels)):
            if own != number and all(name not in node.values for _, part in self._parts() for node in part.nodes):
                what = "classes" if name == CLASSES else "image channels"
                raise ValueError(
                    f"the converted network {self._title} has {own} {what}, the data {number}, and its layers cannot "
                    f"follow. Use data with {own} {what}, or convert a network for {number}."
                )
        if self.dense:
            return replace(self, classes=classes, image_channels=image_channels, size=size or self.size)
        return super().fitted(classes=classes, image_channels=image_channels, size=size)

    def with_number(self, name: str, number: int) -> Self:
        """The space with a number in place of `classes` or `channels`, which the data then cannot change."""

        def changed(part: Part) -> Part:
            nodes = (replace(n, values=tuple(number if v == name else v for v in n.values)) for n in part.nodes)
            return replace(part, nodes=tuple(nodes))

        stages = tuple(replace(stage, parts=tuple(map(changed, stage.parts))) for stage in self.stages)
        return replace(self, stem=changed(self.stem), stages=stages, head=changed(self.head))

    def _parts(self) -> Iterator[tuple[str, Part]]:
        """Every part with its place in the table."""
        yield "stem", self.stem
        for i, stage in enumerate(self.stages):
            yield from ((f"stages[{i}].parts[{j}]", part) for j, part in enumerate(stage.parts))
        yield "head", self.head

    def layers(self, architecture: Architecture) -> tuple[Layer, tuple[tuple[Layer, ...], ...], Layer]:
        """Stem, stages and head."""
        shared: dict[Any, Value] = {CLASSES: self.classes, CHANNELS: self.image_channels}
        shared |= {f"s{i}": architecture[f"stream{i}.width"] for i in range(len(self.streams))}
        stages = []
        for index, stage in enumerate(self.stages):
            chosen = architecture.under(f"stage{index}")
            depth = chosen.integer("depth") if "depth" in chosen else stage.depths[0]
            stages.append(
                tuple(_layer(part, chosen.under(f"block{i}"), shared) for i, part in enumerate(stage.parts[:depth]))
            )
        stem, head = (_layer(getattr(self, name), architecture.under(name), shared) for name in ("stem", "head"))
        return stem, tuple(stages), replace(head, reads=self.reads)


def _layer(part: Part, chosen: Architecture, shared: dict[Any, Value]) -> Layer:
    known = shared | {f"w{i}": chosen.get(f"width{i}", options[-1]) for i, options in enumerate(part.widths)}
    nodes: list[tuple[Any, ...]] = []
    gone = set() if chosen.get("branch", 1) else {*part.branch}
    for number, node in enumerate(part.nodes, 1):
        left = tuple(tensor for tensor in node.inputs if tensor not in gone)
        if number in gone:
            nodes.append(("identity", (0,)))  # keeps the numbers of the others, and so the names of their weights
        elif len(left) < len(node.inputs):
            nodes.append(("identity", left))
        else:
            nodes.append((node.op, node.inputs, *(known.get(value, value) for value in node.values)))
    return layer("kdnas.blocks.graph:Graph", nodes=tuple(nodes))


def _part_choices(name: str, part: Part, needs: str | None = None, at_least: int = 0) -> Iterator[Choice]:
    if part.branch:
        yield Choice(f"{name}.branch", (0, 1), needs, at_least if needs else 0)
    for index, options in enumerate(part.widths):
        users = {number for number, node in enumerate(part.nodes, 1) if f"w{index}" in node.values}
        if part.branch and users <= {*part.branch}:
            yield Choice(f"{name}.width{index}", options, f"{name}.branch", 1)
        else:
            yield Choice(f"{name}.width{index}", options, needs, at_least if needs else 0)
