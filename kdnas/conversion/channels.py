"""Which channels of a network belong together: the one answer for conversion, which narrows them, and for removal."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

from kdnas.spaces.converted import Converted

ACTIVATIONS = (
    *("relu", "relu6", "swish", "hswish", "gelu", "tanh_gelu", "sigmoid", "hsigmoid", "tanh", "mish"),
    *("softplus", "elu", "leaky_relu", "clamp"),
)
NORMALISATIONS = ("norm", "vector_norm", "group_norm", "layer_norm", "scale", "shift", "prelu")
"""Operations with weights per channel that mix no channels with trained weights; their first setting is the count."""
_UNIT, _SMALL_UNIT, _SMALL = 8, 4, 64  # widths are multiples of the unit; of the small one below 64 channels
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

    def without(self, inputs: int, outputs: int) -> "Operation":
        """The same operation with so many fewer channels that it reads and has."""
        if not inputs and not outputs:
            return self
        read, own = (self.values[0], self.values[1]) if self.op in ("conv", "linear") else (self.values[0],) * 2
        return self.with_channels((read - inputs) if inputs else None, (own - outputs) if outputs else None)


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
        concatenated: whether some node has these channels beside others.
        output_starts: the place of the first of these channels among those of each of `outputs`; empty for 0 in all.
        reader_starts: the same among the inputs of each of `readers`.
    """

    size: int
    multiple: int = 1
    writers: tuple[Place, ...] = ()
    normalisations: tuple[Place, ...] = ()
    readers: tuple[Place, ...] = ()
    fixed: str = ""
    concatenated: bool = False
    output_starts: tuple[int, ...] = ()
    reader_starts: tuple[int, ...] = ()

    def unit(self, divisor: int) -> int:
        """What the number of channels that remain is a multiple of: `divisor`, and whole groups.

        Args:
            divisor: 0 for 8, and for 4 below 64 channels.
        """
        return math.lcm(divisor or (_UNIT if self.size >= _SMALL else _SMALL_UNIT), self.multiple)

    @property
    def outputs(self) -> tuple[Place, ...]:
        """Nodes whose output has these channels as its own: writers and normalisations."""
        return (*self.writers, *self.normalisations)

    def written(self) -> Iterator[tuple[Place, slice]]:
        """Each of `outputs`, and where these channels are among its own."""
        return self._slices(self.outputs, self.output_starts)

    def read(self) -> Iterator[tuple[Place, slice]]:
        """Each of `readers`, and where these channels are among its inputs."""
        return self._slices(self.readers, self.reader_starts)

    def _slices(self, places: Sequence[Place], starts: Sequence[int]) -> Iterator[tuple[Place, slice]]:
        return ((p, slice(s, s + self.size)) for p, s in zip(places, starts or [0] * len(places), strict=True))

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
    reads: Sequence[str] = (),
) -> list[ChannelGroup]:
    """The groups of a chain of layers, in the order in which their channels are first computed.

    Channels continue through activations, batch norm, depthwise and grouped convolutions, pooling, and through sums
    and products: those of a residual stream are one group, from its first convolution to the convolutions that read
    it. Group norm keeps whole groups of them, so that every group has the statistics it had. Concatenated channels stay
    groups of their own, behind each other in what reads them. Fixed are the channels of the chain's input and output,
    those that are split, shuffled, flattened from several positions or broadcast over others, those that a layer norm
    averages over, those that are added to others behind each other, and those around a grouped convolution that changes
    their number.

    Args:
        layers: nodes by position, in order of execution.
        channels: of the chain's input.
        side: height or width of the chain's input; 0 for a vector.
        input_fixed: why the input's channels are fixed.
        output_fixed: why the output's channels are fixed.
        reads: of the layer `head`: the stages, `stages.0` for example, whose outputs are its tensors -1, -2 and so on.
    """
    tensors = _Tensors()
    current = tensors.add(channels, side)
    tensors.fix(current, input_fixed)
    ends: dict[str, int] = {}
    for position, nodes in layers.items():
        numbers = {
            0: current,
            **{-1 - place: ends[stage] for place, stage in enumerate(reads if position == "head" else ())},
        }
        for index, node in enumerate(nodes):
            numbers[index + 1] = tensors.follow((position, index), node, [numbers[number] for number in node.inputs])
        current = numbers[len(nodes)]
        ends[position.rpartition(".")[0]] = current
    tensors.fix(current, output_fixed)
    return tensors.groups()


def groups_of(space: Converted) -> list[ChannelGroup]:
    """The groups of the largest network; see `channel_groups`."""
    whole = space.blueprint(space.largest)
    reads = [f"stages.{stage}" for stage in whole.head.reads]
    return channel_groups(operations(space), space.image_channels, whole.image[1], reads=reads)


CONCATENATED = "its channels are concatenated with others"
_FIXING = {
    "slice": "its channels are split",
    "shuffle": "its channels are shuffled",
    "layer_norm": "a layer norm averages over its channels",
}


class _Tensors:
    """A union-find over runs of channels: those of one set have the same channels. A tensor is one run or several."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, int]] = []
        self.runs: list[tuple[int, ...]] = []  # by tensor, its runs in order
        self.sizes: list[int] = []
        self.parents: list[int] = []
        # The rest by run: of a set, those of its root count.
        self.multiples: dict[int, int] = {}
        self.reasons: dict[int, str] = {}
        self.concatenated: set[int] = set()
        self.nodes: dict[str, list[tuple[int, Place, int]]] = {"writers": [], "normalisations": [], "readers": []}

    def add(self, channels: int, side: int, runs: tuple[int, ...] = ()) -> int:
        """A tensor of these runs, or of a new one."""
        if not runs:
            runs = (len(self.sizes),)
            self.sizes.append(channels)
            self.parents.append(runs[0])
        self.shapes.append((channels, side))
        self.runs.append(runs)
        return len(self.runs) - 1

    def root(self, run: int) -> int:
        while self.parents[run] != run:
            run = self.parents[run]
        return run

    def fix(self, tensor: int, reason: str) -> None:
        """Fix the channels of a tensor; the first reason stands."""
        for run in self.runs[tensor]:
            self.reasons.setdefault(self.root(run), reason)

    def require(self, tensor: int, multiple: int) -> None:
        """Let the number of channels of each run be a multiple of this; a run that is none of it is fixed."""
        runs = self.runs[tensor]
        if any(self.sizes[run] % multiple for run in runs):
            self.fix(tensor, CONCATENATED)
            return
        for root in map(self.root, runs):
            self.multiples[root] = math.lcm(self.multiples.get(root, 1), multiple)

    def join(self, first: int, second: int) -> None:
        """Unite the runs of two tensors, one by one; where both have a reason, that of the first stands."""
        pairs = self.runs[first], self.runs[second]
        if [self.sizes[run] for run in pairs[0]] != [self.sizes[run] for run in pairs[1]]:
            for tensor in (first, second):
                self.fix(tensor, "its channels are added to others that are concatenated")
            return
        for own, other in zip(*pairs, strict=True):
            parent, child = self.root(own), self.root(other)
            if parent != child:
                self.parents[child] = parent
                self.multiples[parent] = math.lcm(self.multiples.get(parent, 1), self.multiples.pop(child, 1))
                if child in self.reasons:
                    self.reasons.setdefault(parent, self.reasons.pop(child))

    def follow(self, place: Place, node: Operation, inputs: Sequence[int]) -> int:
        """Add a node's output, whose channels are those of its inputs where it keeps them."""
        channels, side = output_shape(node, [self.shapes[tensor] for tensor in inputs])
        if node.mixes:
            self.note("readers", inputs[0], place)
            output = self.add(channels, side)
            self.note("writers", output, place)
            return output
        if node.op == "cat":
            runs = tuple(run for tensor in inputs for run in self.runs[tensor])
            self.concatenated.update(runs)
            return self.add(channels, side, runs)
        reason = _FIXING.get(node.op, "")
        if node.op == "conv" and not node.passes:
            reason = "a grouped convolution changes the number of channels"
        elif node.op == "flatten" and self.shapes[inputs[0]][1] > 1:
            reason = "its positions are flattened into channels"
        sources = inputs[:1] if node.op == "resize" else inputs
        like = [tensor for tensor in sources if self.shapes[tensor][0] == channels and not reason]
        output = self.add(channels, side, self.runs[like[0]] if like else ())
        if node.op == "conv":
            self.note("writers", output, place)
        elif node.normalises:
            self.note("normalisations", output, place)
        if reason:
            for tensor in (*inputs, output):
                self.fix(tensor, reason)
            return output
        for tensor in sources:
            if tensor in like:
                self.join(tensor, output)
            else:
                self.fix(tensor, "its channel is spread over others")
        if node.op == "conv":
            self.require(output, node.values[6])
        elif node.op == "group_norm":
            self.require(output, node.values[1])
        return output

    def note(self, role: str, tensor: int, place: Place) -> None:
        """Note what a node is to each run of a tensor."""
        start = 0
        for run in self.runs[tensor]:
            self.nodes[role].append((run, place, start))
            start += self.sizes[run]

    def groups(self) -> list[ChannelGroup]:
        """The sets, by their first run."""
        concatenated = set(map(self.root, self.concatenated))
        groups = []
        for root in dict.fromkeys(map(self.root, range(len(self.parents)))):
            rows = {
                role: [(place, start) for run, place, start in entries if self.root(run) == root]
                for role, entries in self.nodes.items()
            }
            outputs, readers = [*rows["writers"], *rows["normalisations"]], rows["readers"]
            twice = any(len({place for place, _ in uses}) < len(uses) for uses in (outputs, readers))
            fixed = self.reasons.get(root, "its channels are concatenated with themselves" if twice else "")
            starts = [tuple(start for _, start in uses) for uses in (outputs, readers)]
            places = {role: tuple(place for place, _ in uses) for role, uses in rows.items()}
            groups.append(
                ChannelGroup(
                    self.sizes[root],
                    self.multiples.get(root, 1),
                    fixed=fixed,
                    concatenated=root in concatenated,
                    output_starts=starts[0] if any(starts[0]) else (),
                    reader_starts=starts[1] if any(starts[1]) else (),
                    **places,
                )
            )
        return groups


def output_shape(node: Operation, inputs: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Channels and side of a node's output, given those of its inputs; a vector's side is 0."""
    channels, side = max(count for count, _ in inputs), max(side for _, side in inputs)
    if node.op == "resize":
        return inputs[0][0], inputs[1][1] if len(inputs) > 1 else node.values[1]
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
