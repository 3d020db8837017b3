"""Which channels of a network belong together: the one answer for conversion, which narrows them, and for removal."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

from kdnas.spaces.converted import Converted

ACTIVATIONS = (
    *("relu", "relu6", "swish", "hswish", "gelu", "tanh_gelu", "sigmoid", "hsigmoid", "tanh", "mish"),
    *("softplus", "elu", "leaky_relu", "clamp"),
)
NORMALISATIONS = ("norm", "vector_norm", "group_norm", "layer_norm", "scale", "shift", "prelu")
"""Operations with weights per channel that mix no channels with trained weights; their first setting is the count."""
Place = tuple[str, int]
"""A layer's position, as in `Blueprint.named_layers`, and the index of a node in its graph."""


class Operation(NamedTuple):
    """A node of `kdnas.blocks.graph`: operation, numbers of its input tensors (0 is the layer's input), settings."""

    op: str
    inputs: tuple[int, ...]
    values: tuple[Any, ...]

    @property
    def mixes(self) -> bool:
        """Whether each output channel depends on all input channels."""
        return self.op == "linear" or (self.op == "conv" and not self.values[6])

    @property
    def passes(self) -> bool:
        """Whether it has weights per channel and keeps the channels: norms, depthwise or grouped convolution."""
        return self.normalises or (self.op == "conv" and not self.mixes and self.values[0] == self.values[1])

    @property
    def normalises(self) -> bool:
        """Whether it has weights per channel and no others; one slope or factor for all channels has none."""
        return self.op in NORMALISATIONS and self.values[0] > (self.op == "prelu")

    def with_channels(self, inputs: Any, outputs: Any) -> "Operation":
        """The same operation with other numbers of channels; None leaves a number as it is."""
        values = list(self.values)
        if self.passes and inputs is None:
            inputs = outputs
        if self.op in ("conv", "linear"):
            values[:2] = (inputs or values[0], outputs or values[1])
        elif self.normalises:
            values[0] = outputs or values[0]
        return self._replace(values=tuple(values))


def operations(space: Converted) -> dict[str, tuple[Operation, ...]]:
    """The nodes of the largest network's layers, by position."""
    nodes: dict[str, Any] = {
        position: dict(layer.make.arguments)["nodes"]
        for position, layer in space.blueprint(space.largest).named_layers()
    }
    return {
        position: tuple(Operation(op, inputs, tuple(values)) for op, inputs, *values in layer)
        for position, layer in nodes.items()
    }


@final
@dataclass(frozen=True)
class ChannelGroup:
    """Channels that every node using them must keep or lose together.

    Attributes:
        size: number of channels.
        multiple: how many of them remain must be a multiple of this: whole groups of grouped convolutions.
        writers: convolutions and linear layers that compute these channels, depthwise and grouped ones included; they
            lose outputs (a depthwise or grouped one also the inputs).
        normalisations: norms, factors and summands of these channels.
        readers: convolutions and linear layers that mix these channels; they lose inputs.
        fixed: why the channels cannot change, or empty.
    """

    size: int
    multiple: int = 1
    writers: tuple[Place, ...] = ()
    normalisations: tuple[Place, ...] = ()
    readers: tuple[Place, ...] = ()
    fixed: str = ""

    @property
    def outputs(self) -> tuple[Place, ...]:
        """Nodes whose output has these channels as its own: writers and normalisations."""
        return (*self.writers, *self.normalisations)

    @property
    def key(self) -> str:
        """A name, also for a parameter: the first writer, marked `stream` where the channels cross layers."""
        position, index = self.writers[0]
        crosses = any(other != position for other, _ in (*self.outputs, *self.readers))
        return f"{position}:{index}{':stream' * crosses}".replace(".", "_")


def channel_groups(
    layers: Mapping[str, Sequence[Operation]],
    channels: int,
    side: int,
    *,
    input_fixed: str = "they are the images'",
    output_fixed: str = "they are the logits",
) -> list[ChannelGroup]:
    """The groups of a chain of layers, in the order in which their channels are first computed.

    Channels continue through activations, batch norm, depthwise and grouped convolutions, pooling, and through sums
    and products: those of a residual stream are one group, from its first convolution to the convolutions that read
    it. Group norm keeps whole groups of them, so that every group has the statistics it had. Fixed are the channels of
    the chain's input and output, those that are concatenated, split, shuffled, flattened from several positions or
    broadcast over others, those that a layer norm averages over, and those around a grouped convolution that changes
    their number.

    Args:
        layers: nodes by position, in order of execution.
        channels: of the chain's input.
        side: height and width of the chain's input; 0 for a vector.
        input_fixed: why the input's channels are fixed.
        output_fixed: why the output's channels are fixed.
    """
    tensors = _Tensors()
    current = tensors.add(channels, side)
    tensors.fix(current, input_fixed)
    for position, nodes in layers.items():
        numbers = [current]
        for index, node in enumerate(nodes):
            numbers.append(tensors.follow((position, index), node, [numbers[number] for number in node.inputs]))
        current = numbers[-1]
    tensors.fix(current, output_fixed)
    return tensors.groups()


_FIXING = {
    "cat": "its channels are concatenated with others",
    "slice": "its channels are split",
    "shuffle": "its channels are shuffled",
    "layer_norm": "a layer norm averages over its channels",
}


class _Tensors:
    """A union-find over a network's tensors: those of one set have the same channels."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, int]] = []
        self.parents: list[int] = []
        # The rest by tensor: of a set, those of its root count.
        self.multiples: dict[int, int] = {}
        self.reasons: dict[int, str] = {}
        self.nodes: dict[str, list[tuple[int, Place]]] = {"writers": [], "normalisations": [], "readers": []}

    def add(self, channels: int, side: int) -> int:
        self.shapes.append((channels, side))
        self.parents.append(len(self.parents))
        return self.parents[-1]

    def root(self, tensor: int) -> int:
        while self.parents[tensor] != tensor:
            tensor = self.parents[tensor]
        return tensor

    def fix(self, tensor: int, reason: str) -> None:
        """Fix the channels of a tensor; the first reason stands."""
        self.reasons.setdefault(self.root(tensor), reason)

    def require(self, tensor: int, multiple: int) -> None:
        root = self.root(tensor)
        self.multiples[root] = math.lcm(self.multiples.get(root, 1), multiple)

    def join(self, first: int, second: int) -> None:
        """Unite two sets; where both have a reason, that of the first stands."""
        parent, child = self.root(first), self.root(second)
        if parent != child:
            self.parents[child] = parent
            self.require(parent, self.multiples.pop(child, 1))
            if child in self.reasons:
                self.fix(parent, self.reasons.pop(child))

    def follow(self, place: Place, node: Operation, inputs: Sequence[int]) -> int:
        """Add a node's output, joined with those of its inputs that have the same channels."""
        source, output = inputs[0], self.add(*output_shape(node, [self.shapes[tensor] for tensor in inputs]))
        if node.mixes:
            self.nodes["readers"].append((source, place))
        if node.op in ("conv", "linear"):
            self.nodes["writers"].append((output, place))
        elif node.normalises:
            self.nodes["normalisations"].append((output, place))
        if node.mixes:
            return output
        reason = _FIXING.get(node.op, "")
        if node.op == "conv" and not node.passes:
            reason = "a grouped convolution changes the number of channels"
        elif node.op == "flatten" and self.shapes[source][1] > 1:
            reason = "its positions are flattened into channels"
        if reason:
            for tensor in (*inputs, output):
                self.fix(tensor, reason)
            return output
        for tensor in inputs:
            if self.shapes[tensor][0] == self.shapes[output][0]:
                self.join(tensor, output)
            else:
                self.fix(tensor, "its channel is spread over others")
        if node.op == "conv":
            self.require(output, node.values[6])
        elif node.op == "group_norm":
            self.require(output, node.values[1])
        return output

    def groups(self) -> list[ChannelGroup]:
        """The sets, by their first tensor."""
        roots = list(dict.fromkeys(map(self.root, range(len(self.parents)))))
        nodes: dict[int, dict[str, tuple[Place, ...]]] = {root: {} for root in roots}
        for role, places in self.nodes.items():
            for tensor, place in places:
                group = nodes[self.root(tensor)]
                group[role] = (*group.get(role, ()), place)
        return [
            ChannelGroup(
                self.shapes[root][0], self.multiples.get(root, 1), fixed=self.reasons.get(root, ""), **nodes[root]
            )
            for root in roots
        ]


def output_shape(node: Operation, inputs: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Channels and side of a node's output, given those of its inputs; a vector's side is 0."""
    channels, side = max(count for count, _ in inputs), max(side for _, side in inputs)
    if node.op == "conv":
        _, channels, kernel, stride, padding, dilation, *_ = node.values
        return channels, (side + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    if node.op in ("max_pool", "avg_pool"):
        return channels, _pooled(side, *node.values[:4])
    if node.op == "linear":
        return node.values[1], side
    if node.op in ("pool", "highest"):
        return channels, node.values[0]
    if node.op == "cat":
        return sum(count for count, _ in inputs), side
    if node.op == "slice":
        return node.values[1], side
    if node.op == "upsample":
        return channels, side * node.values[0]
    if node.op == "pad":
        return channels, side + node.values[0] + node.values[1]
    if node.op == "flatten":
        return channels * max(1, side) ** 2, 0
    return channels, {"mean": 0, "unflatten": 1}.get(node.op, side)


def _pooled(side: int, kernel: int, stride: int, padding: int, ceil: int = 0) -> int:
    span = side + 2 * padding - kernel
    count = (-(-span // stride) if ceil else span // stride) + 1
    return count - (ceil and (count - 1) * stride >= side + padding)  # no window begins in the padding behind


_KEEPING_ZERO = ("drop_path", "dropout", "channel_dropout", "scale", "times")


def branch_end(nodes: Sequence[Operation]) -> int | None:
    """Index of the last weighted node of a residual branch: the batch norm or convolution before the sum, or None.

    The layer must end in a sum with its own input, with or without an activation. Factors and dropout of elements or of
    the whole path may stand between: they pass zeros on as zeros.
    """
    last = len(nodes) - 1
    if last > 0 and nodes[last].op in ACTIVATIONS:
        last -= 1
    if last < 0 or nodes[last].op != "add" or 0 not in nodes[last].inputs:
        return None
    branch, reader = [number for number in nodes[last].inputs if number != 0], last
    while len(branch) == 1 and branch[0]:
        end = branch[0] - 1
        if any(branch[0] in node.inputs for index, node in enumerate(nodes) if index != reader):
            return None
        if nodes[end].op in ("norm", "conv"):
            return end
        branch, reader = (list(nodes[end].inputs) if nodes[end].op in _KEEPING_ZERO else []), end
    return None
