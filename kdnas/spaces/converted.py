"""A trained network as an elastic space; `kdnas convert` writes these tables."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

from kdnas.architecture import Architecture, Choice, Value
from kdnas.space import Layer, SearchSpace, layer

CLASSES, CHANNELS = "classes", "channels"
UNIT = 8  # widths other than the source's are multiples of it
_SHARES = (0.5, 0.75)  # of the source's width


def narrower(full: int, unit: int) -> tuple[int, ...]:
    """Options for a width of the source: about a half and three quarters of it, in multiples of a unit, and all."""
    options = {max(unit, round(full * share / unit) * unit) for share in _SHARES}
    return (*sorted(option for option in options if option < full), full)


@final
@dataclass(frozen=True, kw_only=True)
class Node:
    """One operation of a part; see `kdnas.blocks.graph`.

    Attributes:
        op: the operation.
        inputs: numbers of the tensors it reads; 0 is the part's input.
        values: its settings. A name stands for a number: `w0` for the part's first width, `classes` and `channels`
            for those of the data.
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
    """

    nodes: tuple[Node, ...] = ()
    widths: tuple[tuple[int, ...], ...] = ()


@final
@dataclass(frozen=True, kw_only=True)
class PartStage:
    """Parts whose outputs have one shape.

    Attributes:
        parts: in order.
        depths: options for the number of parts used; the last ones are left out.
    """

    parts: tuple[Part, ...]
    depths: tuple[int, ...]


@final
@dataclass(frozen=True, kw_only=True)
class Converted(SearchSpace):
    """A network cut into parts, some of which may be left out or narrowed inside.

    The widths between parts are the source's, so that parts fit together whatever is chosen inside them. The largest
    network is the source.

    Attributes:
        stem: reads images.
        stages: the parts between stem and head.
        head: returns logits.

    Reference: depth and inner width as in Cai et al., Once-for-All, ICLR 2020, section 3.3; the sharing of leading
        channels is the supernet's.
    """

    stem: Part
    stages: tuple[PartStage, ...]
    head: Part

    @property
    def structure(self) -> tuple[Choice, ...]:
        """The stem's widths, then per stage the depth and each part's widths, then the head's."""
        choices = list(_widths("stem", self.stem))
        for index, stage in enumerate(self.stages):
            name = f"stage{index}.depth"
            if len(stage.depths) > 1:
                choices.append(Choice(name, stage.depths))
            for place, part in enumerate(stage.parts):
                optional = place >= stage.depths[0]
                choices += _widths(f"stage{index}.block{place}", part, name if optional else None, place + 1)
        return (*choices, *_widths("head", self.head))

    def layers(self, architecture: Architecture) -> tuple[Layer, tuple[tuple[Layer, ...], ...], Layer]:
        """Stem, stages and head."""
        stages = []
        for index, stage in enumerate(self.stages):
            chosen = architecture.under(f"stage{index}")
            depth = chosen.integer("depth") if "depth" in chosen else stage.depths[0]
            stages.append(tuple(self._layer(p, chosen.under(f"block{i}")) for i, p in enumerate(stage.parts[:depth])))
        stem, head = (
            self._layer(self.stem, architecture.under("stem")),
            self._layer(self.head, architecture.under("head")),
        )
        return stem, tuple(stages), head

    def _layer(self, part: Part, chosen: Architecture) -> Layer:
        known: dict[Any, Value] = {CLASSES: self.classes, CHANNELS: self.image_channels}
        known |= {f"w{i}": chosen.get(f"width{i}", options[-1]) for i, options in enumerate(part.widths)}
        nodes = tuple((node.op, node.inputs, *(known.get(v, v) for v in node.values)) for node in part.nodes)
        return layer("kdnas.blocks.graph:Graph", nodes=nodes)


def _widths(name: str, part: Part, needs: str | None = None, at_least: int = 0) -> Iterator[Choice]:
    for index, options in enumerate(part.widths):
        yield Choice(f"{name}.width{index}", options, needs, at_least if needs else 0)
