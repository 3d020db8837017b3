"""What can be taken out of a converted network: channels that are made, passed on and mixed together, whole blocks."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, final

from kdnas.costs.budget import Cost
from kdnas.costs.count import cost
from kdnas.space import Blueprint, Layer, layer
from kdnas.spaces.converted import Converted

DENSE = ("conv", "linear")
ACTIVATIONS = ("relu", "relu6", "swish", "hswish", "gelu", "sigmoid", "hsigmoid")
Place = tuple[str, int]
"""A layer's position, as in `Blueprint.named`, and a node's place in its graph."""


class Operation(NamedTuple):
    """A node of `kdnas.blocks.graph`."""

    op: str
    inputs: tuple[int, ...]
    values: tuple[Any, ...]

    @property
    def mixes(self) -> bool:
        """Whether each output channel is made of all input channels."""
        return self.op == "linear" or (self.op == "conv" and not self.values[6])

    @property
    def passes(self) -> bool:
        """Whether it has numbers of its own for each channel, and passes channels on."""
        depthwise = self.op == "conv" and self.values[6] == 1 and self.values[0] == self.values[1]
        return self.op == "norm" or depthwise

    def narrowed(self, inputs: int | None, outputs: int | None) -> "Operation":
        """The same with other numbers of channels, where they are given."""
        values = list(self.values)
        if self.mixes:
            values[:2] = (inputs or values[0], outputs or values[1])
        elif self.passes:
            values[: 1 if self.op == "norm" else 2] = [outputs or values[0]] * (1 if self.op == "norm" else 2)
        return self._replace(values=tuple(values))


def operations(space: Converted) -> dict[str, tuple[Operation, ...]]:
    """The largest network's nodes, by position."""
    found = {}
    for position, one in space.blueprint(space.largest).named():
        nodes: Any = dict(one.make.arguments)["nodes"]
        found[position] = tuple(Operation(op, inputs, tuple(values)) for op, inputs, *values in nodes)
    return found


@final
@dataclasses.dataclass(frozen=True)
class Unit:
    """Channels that come and go together, with one factor each, or a whole block with one.

    Attributes:
        key: a name, also for a parameter: where the channels are first made, or the block's position.
        size: number of factors.
        writes: nodes that make or pass on these channels: they lose outputs.
        takes: nodes that mix them: they lose inputs, and what is multiplied are their weights' columns.
        block: position of the block, or empty.
    """

    key: str
    size: int
    writes: tuple[Place, ...] = ()
    takes: tuple[Place, ...] = ()
    block: str = ""


class _Groups:
    """Sets of tensors whose channels are the same, merged as they are found to be."""

    def __init__(self) -> None:
        self.parents: list[int] = []
        self.channels: list[int] = []
        self.fixed: set[int] = set()
        self.writes: dict[int, list[Place]] = {}
        self.takes: dict[int, list[Place]] = {}

    def new(self, channels: int) -> int:
        self.parents.append(len(self.parents))
        self.channels.append(channels)
        return self.parents[-1]

    def root(self, label: int) -> int:
        while self.parents[label] != label:
            label = self.parents[label]
        return label

    def join(self, labels: Sequence[int]) -> int:
        """One label for all; the first that was made, so that groups keep the network's order.

        Fewer channels than the others' are spread over those, and stay as they are.
        """
        roots = sorted({self.root(label) for label in labels})
        most = max(self.channels[root] for root in roots)
        first, *others = [root for root in roots if self.channels[root] in (0, most)]
        self.fixed.update(set(roots) - {first, *others})
        for other in others:
            self.parents[other] = first
            self.writes[first] = self.writes.get(first, []) + self.writes.pop(other, [])
            self.takes[first] = self.takes.get(first, []) + self.takes.pop(other, [])
            if other in self.fixed:
                self.fixed.add(first)
        return first

    def fix(self, label: int) -> int:
        self.fixed.add(self.root(label))
        return label


def units(space: Converted) -> list[Unit]:
    """What can be removed, in the network's order: groups of channels, then blocks that add to their input.

    Channels run on through activations, normalisation, depthwise convolutions, pooling, and over every sum and product:
    those of a residual stream are one group, from where it begins to where a convolution makes another. The
    image's channels and the logits stay, and what is concatenated, flattened from several positions, or enters a
    grouped convolution that is not depthwise.
    """
    groups, nodes = _Groups(), operations(space)
    incoming, single = groups.fix(groups.new(0)), False
    for position, held in nodes.items():
        incoming, single = _followed(groups, position, held, incoming, single)
    groups.fix(incoming)
    made = []
    for label in sorted({groups.root(label) for label in range(len(groups.parents))} - groups.fixed):
        writes, takes = groups.writes.get(label, []), groups.takes.get(label, [])
        if writes and takes:
            position, place = writes[0]
            inside = {p for p, _ in (*writes, *takes)} == {position}
            key = f"{position}:{place}" if inside else f"{position}:{place}:stream"
            size = nodes[position][place].values[1]
            made.append(Unit(key.replace(".", "_"), size, tuple(writes), tuple(takes)))
    for position, held in nodes.items():
        if position.startswith("stages") and branch_end(held) is not None:
            made.append(Unit(f"{position}:block".replace(".", "_"), 1, block=position))
    return made


def _followed(
    groups: _Groups, position: str, nodes: Sequence[Operation], incoming: int, single: bool
) -> tuple[int, bool]:
    """The label of a layer's output, and whether it has one position only, given those of its input."""
    labels, singles = [incoming], [single]
    for place, node in enumerate(nodes):
        given, one = [labels[n] for n in node.inputs], all(singles[n] for n in node.inputs)
        label, here = groups.root(given[0]), (position, place)
        if node.mixes:
            groups.takes.setdefault(label, []).append(here)
            label = groups.new(node.values[1])
            groups.writes[label] = [here]
        elif node.passes:
            groups.writes.setdefault(label, []).append(here)
        elif node.op in ("conv", "cat") or (node.op == "flatten" and not one):
            for other in given:
                groups.fix(other)
            label = groups.fix(groups.new(0))  # how many they are need not be known: they stay
        elif node.op in ("add", "mul"):
            label = groups.join(given)
        labels.append(label)
        singles.append(one or node.op == "mean" or (node.op == "pool" and node.values[0] == 1))
    return labels[-1], singles[-1]


def branch_end(nodes: Sequence[Operation]) -> int | None:
    """The place of the node before the sum of a layer with its own input: a normalisation or a convolution, or None.

    Dropout of elements or of the whole path may stand between: it hands on zeros as zeros.
    """
    last = len(nodes) - 1
    if last > 0 and nodes[last].op in ACTIVATIONS:
        last -= 1
    if last < 0 or nodes[last].op != "add" or 0 not in nodes[last].inputs:
        return None
    others, taker = [number for number in nodes[last].inputs if number != 0], last
    while len(others) == 1 and others[0]:
        end = others[0] - 1
        if any(others[0] in n.inputs for place, n in enumerate(nodes) if place != taker):
            return None
        if nodes[end].op in ("norm", "conv"):
            return end
        others, taker = (list(nodes[end].inputs) if nodes[end].op in ("drop_path", "dropout") else []), end
    return None


def blueprint_of(space: Converted, of: Sequence[Unit], kept: Mapping[str, int]) -> Blueprint:
    """The network with the kept channels and blocks alone.

    Args:
        space: of the whole network.
        of: its units.
        kept: how many factors of each unit stay, by its key; of a block none or one.
    """
    whole = space.blueprint(space.largest)
    gives = {place: kept[unit.key] for unit in of for place in unit.writes}
    mixes = {place: kept[unit.key] for unit in of for place in unit.takes}
    gone = {unit.block for unit in of if unit.block and not kept[unit.key]}
    layers: dict[str, Layer] = {}
    for position, nodes in operations(space).items():
        left = tuple(n.narrowed(mixes.get((position, i)), gives.get((position, i))) for i, n in enumerate(nodes))
        if position in gone:
            # What stood behind the sum stays: it acts on the input alone then.
            left = (Operation(nodes[-1].op, (0,), ()),) if nodes[-1].op in ACTIVATIONS else ()
        layers[position] = layer("kdnas.blocks.graph:Graph", nodes=tuple((n.op, n.inputs, *n.values) for n in left))
    stages = tuple(tuple(layers[f"stages.{i}.{j}"] for j in range(len(s))) for i, s in enumerate(whole.stages))
    return Blueprint(layers["stem"], stages, layers["head"], whole.image)


def saved(space: Converted, of: Sequence[Unit]) -> dict[str, Cost]:
    """What removing one factor of each unit saves, by its key."""
    whole = cost(space.blueprint(space.largest))
    kept = {unit.key: unit.size for unit in of}
    found = {}
    for unit in of:
        left = cost(blueprint_of(space, of, {**kept, unit.key: unit.size - 1}))
        found[unit.key] = Cost(whole.params - left.params, whole.macs - left.macs)
    return found
