"""A traced network as a chain of parts, some of which may be left out or narrowed inside."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from kdnas.conversion.base import Conversion, ModuleReport, compare
from kdnas.conversion.channels import ACTIVATIONS, channel_groups
from kdnas.conversion.trace import TracedOperation, trace
from kdnas.spaces.converted import CHANNELS, CLASSES, UNIT, Converted, Node, Part, PartStage, narrower
from kdnas.supernet import Supernet

_ELEMENTWISE = (*ACTIVATIONS, "dropout")
_HEADS = ("pool", "mean", "flatten")
_WEIGHTED = ("conv", "norm", "linear")


@dataclass
class _Segment:
    """A part under construction: traced operations `start` to `end`, whose input is the output of `start - 1`.

    Attributes:
        start: number of its first operation.
        end: number of its last operation.
        widths: options of each inner width.
        inputs: by an operation's number, the index of the width it reads.
        outputs: by an operation's number, the index of the width it has.
        reasons: by an operation's number, why the channels of its output are fixed.
    """

    start: int
    end: int
    widths: list[tuple[int, ...]] = field(default_factory=list)
    inputs: dict[int, int] = field(default_factory=dict)
    outputs: dict[int, int] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)

    @property
    def numbers(self) -> range:
        return range(self.start, self.end + 1)


@dataclass(frozen=True)
class _Chain:
    """Stem, stages, head, and per stage how many of its segments may be used."""

    stem: _Segment
    stages: list[list[_Segment]]
    depths: list[tuple[int, ...]]
    head: _Segment

    def segments(self) -> Iterator[tuple[str, str, _Segment]]:
        """A segment's position, the prefix of its choices, and the segment, in order."""
        yield "stem", "stem", self.stem
        for i, stage in enumerate(self.stages):
            for j, segment in enumerate(stage):
                yield f"stages.{i}.{j}", f"stage{i}.block{j}", segment
        yield "head", "head", self.head


def chain(module: nn.Module, image: tuple[int, int, int], name: str) -> Conversion:
    """An elastic supernet from a network that can be traced.

    1. The network is traced to a graph of operations and cut wherever a single tensor carries everything on. What
       branches between two cuts, a residual block, stays together; so does a run of plain layers up to the next block
       or pooling.
    2. *Depth*: blocks at the end of a row of equal output shapes that add to their own input unchanged may be
       left out, the last first. *Width*: channels that neither enter nor leave their part, such as those inside a
       bottleneck, between two convolutions or between two linear layers, may be narrowed to a half or three
       quarters, in multiples of 8 and of whole groups. A channel group (`kdnas.conversion.channels`) is narrowed
       together. Everything else is fixed.

    Args:
        module: in evaluation mode.
        image: channels, height and width, which are equal.
        name: of the space.

    Raises:
        ValueError: see `kdnas.conversion.convert.convert`.
    """
    traced = trace(module, image)
    parts = _cut(traced)
    for _, _, segment in parts.segments():
        _choose_widths(traced, segment)
    space = Converted(
        name=name,
        source="kdnas convert",
        classes=traced[-1].shape[1],
        image_channels=image[0],
        resolutions=(image[1],),
        stem=_part(traced, parts.stem),
        stages=tuple(
            PartStage(parts=tuple(_part(traced, segment) for segment in stage), depths=depths)
            for stage, depths in zip(parts.stages, parts.depths, strict=True)
        ),
        head=_part(traced, parts.head),
    )
    supernet = Supernet(space).eval()
    layers = dict(space.blueprint(space.largest).named_layers())
    for position, _, segment in parts.segments():
        bank = supernet.bank_module(position, layers[position])
        for number in segment.numbers:
            if traced[number].operation.op in _WEIGHTED:
                weights = module.get_submodule(traced[number].module).state_dict()
                bank.get_submodule(f"parts.{number - segment.start}").load_state_dict(weights)
    return Conversion(space, supernet, tuple(_report(traced, parts)), compare(module, supernet))


def _cut(traced: list[TracedOperation]) -> _Chain:
    """The network cut into stem, stages of equal output shape, and head."""
    segments = _segments(traced)
    head_start = _head_start(traced, segments)
    body, head = [segment for segment in segments if segment.end < head_start], _Segment(head_start, len(traced) - 1)
    if not body:
        raise ValueError("the network has no layer before its pooling, so there is nothing to convert.")
    stem = body.pop(0) if not _branches(traced, body[0]) and len(body) > 1 else _Segment(1, 0)
    stages: list[list[_Segment]] = []
    for segment in body:
        before = stages[-1][-1] if stages else stem
        same = before.end > 0 and traced[segment.end].shape == traced[before.end].shape
        if stages and same:
            stages[-1].append(segment)
        else:
            stages.append([segment])
    return _Chain(stem, stages, [_depths(traced, stage) for stage in stages], head)


def _segments(traced: list[TracedOperation]) -> list[_Segment]:
    """Blocks that branch, and runs of plain layers, which pooling ends."""
    last_use = dict.fromkeys(range(len(traced)), 0)
    for number, source in enumerate(traced):
        for tensor in source.operation.inputs:
            last_use[tensor] = number
    segments: list[_Segment] = []
    start, open_until, run = 1, 0, False
    for number in range(1, len(traced)):
        # Only the newest tensor may be used later: here the chain is cut.
        open_until = max(open_until, last_use[number - 1])
        if open_until > number:
            continue
        plain, op = number == start, traced[number].operation.op
        if plain and segments and not run and op in _ELEMENTWISE:
            segments[-1].end = number  # the activation after a residual sum
        elif plain and segments and run:
            segments[-1].end = number
        else:
            segments.append(_Segment(start, number))
            run = plain
        if plain and op in ("max_pool", "avg_pool"):
            run = False
            if number < len(traced) - 1:
                segments.append(_Segment(number + 1, number))
                run = True
        start = number + 1
    return [segment for segment in segments if segment.start <= segment.end]


def _branches(traced: list[TracedOperation], segment: _Segment) -> bool:
    """Whether some operation reads another tensor than the one before it."""
    return any(traced[n].operation.inputs != (n - 1,) for n in segment.numbers)


def _head_start(traced: list[TracedOperation], segments: list[_Segment]) -> int:
    """The number of the head's first output: pooling or flattening on the chain; a segment around it is cut there."""
    for index, segment in enumerate(segments):
        if _branches(traced, segment):
            continue
        for number in segment.numbers:
            if traced[number].operation.op in _HEADS:
                if number > segment.start:
                    segments.insert(index, _Segment(segment.start, number - 1))
                return number
    raise ValueError("the network has no pooling or flattening before its classifier, so its head cannot be located.")


def _choose_widths(traced: list[TracedOperation], segment: _Segment) -> None:
    """Options for the channel groups inside a segment; for the others, why they are fixed."""
    before = segment.start - 1
    _, channels, *sides = traced[before].shape
    nodes = [
        source.operation._replace(inputs=tuple(number - before for number in source.operation.inputs))
        for source in traced[segment.start : segment.end + 1]
    ]
    groups = channel_groups(
        {"": nodes},
        channels,
        sides[0] if sides else 0,
        input_fixed="its channels are the block's input, which other blocks share",
        output_fixed="they are the logits"
        if segment.end == len(traced) - 1
        else "its channels are the block's output, which other blocks share",
    )
    for group in groups:
        reason, unit = group.fixed, math.lcm(UNIT, group.multiple)
        options = narrower(group.size, unit)
        if not reason and len(options) == 1:
            reason = f"{group.size} channels in steps of {unit} leave nothing to choose"
        if reason:
            segment.reasons.update((segment.start + index, reason) for _, index in group.outputs)
            continue
        grouped = [(position, index) for position, index in group.writers if nodes[index].passes]
        for indices, places in ((segment.outputs, group.outputs), (segment.inputs, (*group.readers, *grouped))):
            indices.update((segment.start + index, len(segment.widths)) for _, index in places)
        segment.widths.append(options)


def _depths(traced: list[TracedOperation], stage: list[_Segment]) -> tuple[int, ...]:
    """How many parts of a stage may be used: those at the end that keep the shape and add to their input may go."""
    least = len(stage)
    while least > 1 and _adds_to_its_input(traced, stage[least - 1]):
        least -= 1
    return tuple(range(least, len(stage) + 1))


def _adds_to_its_input(traced: list[TracedOperation], segment: _Segment) -> bool:
    end = segment.end
    while end > segment.start and traced[end].operation.op in _ELEMENTWISE:
        end -= 1
    return traced[end].operation.op == "add" and segment.start - 1 in traced[end].operation.inputs


def _part(traced: list[TracedOperation], segment: _Segment) -> Part:
    nodes = []
    for number in segment.numbers:
        operation = traced[number].operation
        inputs, outputs = (
            f"w{widths[number]}" if number in widths else None for widths in (segment.inputs, segment.outputs)
        )
        if operation.inputs[0] == 0:
            inputs = CHANNELS
        if number == len(traced) - 1 and operation.op == "linear":
            outputs = CLASSES
        op, tensors, values = operation.with_channels(inputs, outputs)
        nodes.append(Node(op=op, inputs=tuple(tensor - segment.start + 1 for tensor in tensors), values=values))
    return Part(nodes=tuple(nodes), widths=tuple(segment.widths))


def _report(traced: list[TracedOperation], parts: _Chain) -> Iterator[ModuleReport]:
    """Every weighted module with its choices, or why it has none."""
    optional = {
        segment.start: f"may be left out (stage{i}.depth)"
        for i, (stage, depths) in enumerate(zip(parts.stages, parts.depths, strict=True))
        for segment in stage[depths[0] :]
    }
    for _, prefix, segment in parts.segments():
        for number in segment.numbers:
            op = traced[number].operation.op
            if op not in _WEIGHTED:
                continue
            choices = [optional[segment.start]] if segment.start in optional else []
            for side, widths in (("in", segment.inputs), ("out", segment.outputs)):
                if number in widths:
                    options = ", ".join(map(str, segment.widths[widths[number]]))
                    choices.append(f"channels {side} {options} ({prefix}.width{widths[number]})")
            reason = "; ".join(choices) or segment.reasons.get(number, "")
            yield ModuleReport(traced[number].module, bool(choices), reason)
