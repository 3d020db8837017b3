"""NAS-Bench-201: one small graph, repeated."""

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

from kdnas.architecture import Architecture, Choice
from kdnas.space import Depth, Layer, SearchSpace, Sizes, layer
from kdnas.specs import nearest
from kdnas.values import shown

_OPERATIONS = ("none", "skip_connect", "avg_pool_3x3", "nor_conv_1x1", "nor_conv_3x3")
_EDGES = tuple((source, target) for target in range(1, 4) for source in range(target))
_NAMES = tuple(f"node{target}.from{source}" for source, target in _EDGES)


@final
@dataclass(frozen=True, kw_only=True)
class Cell(SearchSpace):
    """A cell of four nodes with an operation on each of its six edges; all cells of a network are the same.

    Equal cells are one architecture, by the benchmark's rule (`unique`): the order of a node's inputs does not matter,
    a skip connection equals its source, edges that no path uses do not matter, and an operation on a node whose inputs
    are all `none` outputs nothing. The canonical cell is the first in the order of the operations, edge by edge, so
    all assignments of one network build the same network. A code is the benchmark's string,
    `|op~0|+|op~0|op~1|+|op~0|op~1|op~2|`.

    Every operation of every edge of every cell has its own weights.

    Attributes:
        widths: channels per stage; every stage but the first begins with a residual block that halves the resolution.
        num_cells: cells per stage.
        operations: options of an edge, a subset of none, skip_connect, avg_pool_3x3, nor_conv_1x1, nor_conv_3x3 in
            this order.

    Reference: Dong & Yang, NAS-Bench-201: Extending the Scope of Reproducible Neural Architecture Search, ICLR 2020,
    section 2.
    Differs: a convolution on a node without inputs counts as nothing, as in the rule; in the authors' network its
    batch norm learns a constant there. As in the rule, `none` counts as an input of a sum, so a few cells that differ
    only in how often nothing is added are different architectures.
    """

    widths: Sizes = (16, 32, 64)
    num_cells: Depth = 5
    operations: tuple[str, ...] = _OPERATIONS

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.operations:
            if name not in _OPERATIONS:
                raise ValueError(f"`operations` has an unknown operation {shown(name)}.{nearest(name, _OPERATIONS)}")
        if list(self.operations) != sorted(set(self.operations), key=_OPERATIONS.index):
            raise ValueError(f"`operations` must be in the order {_OPERATIONS}, got {self.operations}.")

    @property
    def structure(self) -> tuple[Choice, ...]:
        """One operation per edge, in the order of the benchmark's string."""
        return tuple(Choice(name, self.operations) for name in _NAMES)

    def canonical(self, architecture: Architecture) -> Architecture:
        """The first of the cells with the same `unique` string."""
        values = dict(architecture)
        cell = tuple(str(values[name]) for name in _NAMES)
        values.update(zip(_NAMES, _first_cells(self.operations).get(_unique(cell), cell), strict=True))
        return Architecture(values)

    def unique(self, architecture: Architecture) -> str:
        """The string by which the benchmark distinguishes networks: 6,466 strings for 15,625 cells.

        The input is `0`, nothing is `#`; `(x)@op` is an operation on x; a node is the sorted sum of its inputs.
        """
        return _unique(tuple(str(architecture[name]) for name in _NAMES))

    def covering(self) -> tuple[Architecture, ...]:
        """One uniform network per operation."""
        return tuple(map(self.uniform, self.operations))

    def bank_layers(self) -> Iterator[tuple[str, Layer]]:
        """The layers of a network with the sum of all operations on every edge, which no architecture is."""
        mixture = dict.fromkeys(_NAMES, "+".join(self.operations))
        yield from self.blueprint(Architecture({**self.largest, **mixture})).named_layers()

    def layers(self, architecture: Architecture) -> tuple[Layer, tuple[tuple[Layer, ...], ...], Layer]:
        """Stem, stages and head."""
        operations = tuple(str(architecture[name]) for name in _NAMES)
        stem = layer(
            "kdnas.blocks.basic:ConvNormAct", inputs=self.image_channels, outputs=self.widths[0], activation="none"
        )
        stages = []
        for before, width in zip((0, *self.widths), self.widths, strict=False):
            between = [layer("kdnas.blocks.cell:PooledResidual", inputs=before, outputs=width)] if before else []
            cell = layer("kdnas.blocks.cell:Cell", width=width, operations=operations)
            stages.append((*between, *[cell] * self.num_cells))
        head = layer("kdnas.blocks.cell:NormPoolLinear", inputs=self.widths[-1], classes=self.classes)
        return stem, tuple(stages), head

    def code(self, architecture: Architecture) -> str:
        """The benchmark's string; with several resolutions, `@` and the resolution after it."""
        nodes = []
        for target in (1, 2, 3):
            edges = [f"{architecture[f'node{target}.from{source}']}~{source}" for source in range(target)]
            nodes.append("|" + "|".join(edges) + "|")
        side = f"@{architecture['resolution']}" if "resolution" in architecture else ""
        return "+".join(nodes) + side

    def parse(self, code: str) -> Architecture:
        """The canonical architecture of a benchmark's string.

        Raises:
            ValueError: another form, or an operation that is not in the space.
        """
        cell, _, side = code.partition("@")
        edges = [edge for node in cell.split("+") for edge in node.strip("|").split("|")]
        values: dict[str, int | float | str] = {
            name: edge.rpartition("~")[0] for name, edge in zip(_NAMES, edges, strict=False)
        }
        if side.isdecimal():
            values["resolution"] = int(side)
        if len(edges) != len(_EDGES) or self.code(Architecture(values)) != code:
            raise ValueError(f"a code of {self._title} must be |op~0|+|op~0|op~1|+|op~0|op~1|op~2|, got {code!r}.")
        return self.architecture(values)


def _unique(cell: Sequence[str]) -> str:
    nodes, edges = ["0"], iter(cell)
    for _ in range(3):
        inputs = []
        for source, operation in zip(tuple(nodes), edges, strict=False):
            if operation == "none" or source == "#":
                inputs.append("#")
            else:
                inputs.append(source if operation == "skip_connect" else f"({source})@{operation}")
        nodes.append("+".join(sorted(inputs)))
    return nodes[-1]


@functools.cache
def _first_cells(operations: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """For every unique string its first cell, in the order of the operations."""
    cells: dict[str, tuple[str, ...]] = {}
    for cell in itertools.product(operations, repeat=len(_EDGES)):
        cells.setdefault(_unique(cell), cell)
    return cells
