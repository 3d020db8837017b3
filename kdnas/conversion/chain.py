"""A traced network as a chain of parts, some of which may be left out or narrowed."""

import dataclasses
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn

from kdnas.conversion.base import Conversion, ModuleReport, compare
from kdnas.conversion.channels import ACTIVATIONS, CONCATENATED, Operation, channel_groups
from kdnas.conversion.importance import Importance, sort_by_importance
from kdnas.conversion.reader import TracedOperation
from kdnas.conversion.trace import trace
from kdnas.costs.count import feature_shapes
from kdnas.spaces.converted import CHANNELS, CLASSES, Converted, Node, Part, PartStage, narrower
from kdnas.supernet import Supernet

_ELEMENTWISE = (*ACTIVATIONS, "dropout", "channel_dropout", "times", "plus")
_HEADS = ("pool", "highest", "mean", "flatten")
_SHARES = tuple(eighth / 8 for eighth in range(1, 8))  # of the source's width
_FLOOR = 8  # channels that every elastic width keeps
_IMAGES, _LOGITS = "they are the images'", "they are the logits"


@dataclass
class _Segment:
    """A part under construction: traced operations `start` to `end`, whose input is the output of `start - 1`.

    Attributes:
        start: number of its first operation.
        end: number of its last operation.
        widths: options of each inner width.
        branch: numbers of the operations that may be left out together.
        inputs: by an operation's number, the name of the width it reads, as in `kdnas.spaces.converted.Node`.
        outputs: by an operation's number, the name of the width it has.
        reasons: by an operation's number, why the channels of its output are fixed.
    """

    start: int
    end: int
    widths: list[tuple[int, ...]] = field(default_factory=list)
    branch: list[int] = field(default_factory=list)
    inputs: dict[int, str] = field(default_factory=dict)
    outputs: dict[int, str] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)

    @property
    def numbers(self) -> range:
        return range(self.start, self.end + 1)


@dataclass(frozen=True)
class _Chain:
    """Stem, stages, head, per stage how many of its segments may be used, and the stages that the head reads."""

    stem: _Segment
    stages: list[list[_Segment]]
    depths: list[tuple[int, ...]]
    head: _Segment
    reads: tuple[int, ...] = ()

    @property
    def tensors_read(self) -> list[int]:
        """Numbers of the operations whose outputs the head reads, besides that before it."""
        return [self.stages[stage][-1].end for stage in self.reads]

    def segments(self) -> Iterator[tuple[str, str, _Segment]]:
        """A segment's position, the prefix of its choices, and the segment, in order."""
        yield "stem", "stem", self.stem
        for i, stage in enumerate(self.stages):
            for j, segment in enumerate(stage):
                yield f"stages.{i}.{j}", f"stage{i}.block{j}", segment
        yield "head", "head", self.head


def chain(
    module: nn.Module,
    image: tuple[int, int, int],
    name: str,
    importance: Importance,
    divisor: int = 0,
    *,
    dense: bool = False,
) -> Conversion:
    """An elastic supernet from a network that can be traced.

    1. The network is traced to a graph of operations and cut wherever a single tensor carries everything on. What
       branches between two cuts, a residual block, stays together; so does a run of plain layers up to the next block
       or pooling. The head of a network for every pixel may read maps of earlier stages; it begins where most cuts are
       before it, and at the latest with the classifier.
    2. *Depth*: blocks at the end of a row of equal output shapes that add to their own input unchanged may be
       left out, the last first; of any other block that ends in a sum, the residual branch, so that its input or its
       projection remains. *Width*: channels that belong together (`kdnas.conversion.channels`) are narrowed together,
       to any eighth of the source's: inside a part, or along a residual stream through all its parts. Widths are
       multiples of 8 (of 4 below 64 channels) and of whole groups, and at least 8. Everything else is fixed.
    3. The channels are sorted by importance (`kdnas.conversion.importance`), so that every narrower network has the
       most important ones.

    Args:
        module: in evaluation mode.
        image: channels, height and width, which are equal unless for `dense`.
        name: of the space.
        importance: by which channels are sorted.
        divisor: narrower widths are multiples of it; 0 for 8, and for 4 below 64 channels.
        dense: whether the logits are maps.

    Raises:
        ValueError: see `kdnas.conversion.convert.convert`.
    """
    traced = trace(module, image, dense=dense)
    parts = _cut(traced, dense=dense)
    streams = _choose_widths(traced, parts, divisor)
    space = _space(traced, parts, streams, name, image[1:] if dense else ())
    supernet = Supernet(space).eval()
    layers = dict(space.blueprint(space.largest).named_layers())
    for position, _, segment in parts.segments():
        bank = supernet.bank_module(position, layers[position])
        for number in segment.numbers:
            if traced[number].weights:
                part = bank.get_submodule(f"parts.{number - segment.start}")
                part.load_state_dict({**part.state_dict(), **traced[number].weights})
    sort_by_importance(supernet, importance)
    report = (*_report(traced, parts, streams), *_without_effect(module, traced))
    return Conversion(space, supernet, report, compare(module, supernet))


def _without_effect(module: nn.Module, traced: list[TracedOperation]) -> Iterator[ModuleReport]:
    """The source's modules with parameters of which the network's operations have none."""
    used = {origin for operation in traced for origin in operation.origins}
    for path, part in module.named_modules():
        own = [tensor for tensor in part.parameters(recurse=False) if tensor.numel()]
        if own and used.isdisjoint(tensor.data_ptr() for tensor in own):
            yield ModuleReport(path, False, "no logit depends on it, so it is left out")


def _space(
    traced: list[TracedOperation], parts: _Chain, streams: list[tuple[int, ...]], name: str, size: tuple[int, ...]
) -> Converted:
    """The space of the parts; where the numbers of classes or channels cannot follow the data, they are fixed."""
    whole_images = {} if size else {"resolutions": (traced[0].shape[2],)}
    space = Converted(
        name=name,
        source="kdnas convert",
        classes=traced[-1].shape[1],
        image_channels=traced[0].shape[1],
        **whole_images,
        streams=tuple(streams),
        stem=_part(traced, parts.stem),
        stages=tuple(
            PartStage(parts=tuple(_part(traced, segment) for segment in stage), depths=depths)
            for stage, depths in zip(parts.stages, parts.depths, strict=True)
        ),
        head=_part(traced, parts.head, parts.tensors_read),
        reads=parts.reads,
        size=size,
    )
    for width, own in ((CLASSES, "classes"), (CHANNELS, "image_channels")):
        sizes = {"classes": space.classes, "image_channels": space.image_channels}
        sizes[own] += 1
        other = dataclasses.replace(space, **sizes)
        try:
            logits = feature_shapes(other.blueprint(other.largest))["head"]
        except (RuntimeError, ValueError):
            logits = ()
        if logits[:2] != (1, sizes["classes"]):
            space = space.with_number(width, getattr(space, own))
    return space


def _cut(traced: list[TracedOperation], *, dense: bool = False) -> _Chain:
    """The network cut into stem, stages of equal output shape, and head."""
    if dense:
        head_start, ends = _dense_head(traced)
        segments = _segments(traced[:head_start], ends)
    else:
        ends, segments = set[int](), _segments(traced)
        head_start = _head_start(traced, segments)
    body, head = [segment for segment in segments if segment.end < head_start], _Segment(head_start, len(traced) - 1)
    if not body:
        before = "classifier" if dense else "pooling"
        raise ValueError(f"the network has no layer before its {before}, so there is nothing to convert.")
    has_stem = not _branches(traced, body[0]) and len(body) > 1 and body[0].end not in ends
    stem = body.pop(0) if has_stem else _Segment(1, 0)
    stages: list[list[_Segment]] = []
    for segment in body:
        before = stages[-1][-1] if stages else stem
        same = before.end not in {0, *ends} and traced[segment.end].shape == traced[before.end].shape
        if stages and same:
            stages[-1].append(segment)
        else:
            stages.append([segment])
    depths = [_depths(traced, stage) for stage in stages]
    for stage, options in zip(stages, depths, strict=True):
        for segment in stage[: options[0]]:
            segment.branch = _branch(traced, segment)
    reads = tuple(index for index, stage in enumerate(stages) if stage[-1].end in ends)
    return _Chain(stem, stages, depths, head, reads)


def _dense_head(traced: list[TracedOperation]) -> tuple[int, set[int]]:
    """The number of the first operation of a head, and the numbers of those whose outputs it reads besides the last.

    These are places where the chain before it can be cut, and maps that are finer than the one before the head: others
    belong to a block. Of several numbers that leave as many cuts, the largest.
    """
    uses = [(tensor, number) for number, row in enumerate(traced) for tensor in row.operation.inputs]
    nodes = {"": [row.operation for row in traced[1:]]}
    groups = channel_groups(nodes, *traced[0].shape[1:3], output_fixed=_LOGITS)
    classifiers = [index + 1 for group in groups if group.fixed == _LOGITS for _, index in group.writers]
    best = (0, 1, set[int]())
    for start in range(2, min(classifiers, default=len(traced) - 1) + 1):
        crossed = {n for tensor, number in uses if number < start for n in range(tensor + 1, number)}
        cuts = {n for n in range(1, start) if n not in crossed}
        ends = {tensor for tensor, number in uses if number >= start and tensor < start - 1}
        sides = [traced[tensor].shape[2:3] for tensor in (start - 1, *ends)]
        if start - 1 in cuts and ends <= cuts and all(side > sides[0] > (1,) for side in sides[1:]):
            best = max(best, (len(cuts), start, ends), key=lambda row: row[:2])
    return best[1:]


def _segments(traced: list[TracedOperation], ends: Container[int] = ()) -> list[_Segment]:
    """Blocks that branch, and runs of plain layers, which pooling ends, and any operation among `ends`."""
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
        if segments and segments[-1].end in ends:
            segments.append(_Segment(start, number))
            run = plain
        elif plain and segments and not run and op in _ELEMENTWISE:
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
    return segments[-1].start


def _choose_widths(traced: list[TracedOperation], parts: _Chain, divisor: int) -> list[tuple[int, ...]]:
    """Options for the channel groups inside each segment; returns those of the groups that cross segments.

    Of groups without options, the segments have the reasons.
    """
    streams: list[tuple[int, ...]] = []
    owners = {number: segment for _, _, segment in parts.segments() for number in segment.numbers}
    _, channels, side, _ = traced[0].shape
    nodes = {"": [source.operation for source in traced[1:]]}
    for group in channel_groups(nodes, channels, side, input_fixed=_IMAGES, output_fixed=_LOGITS):
        outputs, readers = (
            [index + 1 for (_, index), _ in places if not group.concatenated or _is_alone(nodes[""][index], group.size)]
            for places in (group.written(), group.read())
        )
        data, size = {_IMAGES: (CHANNELS, channels), _LOGITS: (CLASSES, traced[-1].shape[1])}.get(group.fixed, ("", 0))
        if group.size == size:  # classes that are concatenated cannot follow the data
            _name_widths(traced, owners, outputs, readers, data)
        unit = group.unit(divisor)
        options = tuple(width for width in narrower(group.size, unit, _SHARES) if width >= min(_FLOOR, group.size))
        reason = group.fixed or CONCATENATED * group.concatenated
        if not reason and len(options) == 1:
            reason = f"{group.size} channels in steps of {unit}, at least {_FLOOR}, leave nothing to choose"
        if reason:
            for _, index in group.outputs:
                owners[index + 1].reasons[index + 1] = reason
            continue
        inside = {owners[number].start for number in (*outputs, *readers)}
        widths = owners[outputs[0]].widths if len(inside) == 1 else streams
        name = f"{'s' if widths is streams else 'w'}{len(widths)}"
        widths.append(options)
        _name_widths(traced, owners, outputs, readers, name)
    return streams


def _is_alone(operation: Operation, size: int) -> bool:
    """Whether a node that has or reads a group of this size has or reads no other channels."""
    return operation.values[0] == size or (operation.op in ("conv", "linear") and operation.values[1] == size)


def _name_widths(
    traced: list[TracedOperation], owners: dict[int, _Segment], outputs: list[int], readers: list[int], name: str
) -> None:
    """Note the name of a width with the operations that have or read it."""
    for number in outputs:
        owners[number].outputs[number] = name
        if traced[number].operation.passes:
            owners[number].inputs[number] = name
    for number in readers:
        owners[number].inputs[number] = name


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


def _branch(traced: list[TracedOperation], segment: _Segment) -> list[int]:
    """The operations that compute one side of the sum at a segment's end and not the other; the larger of both."""
    end = segment.end
    while end > segment.start and traced[end].operation.op in _ELEMENTWISE:
        end -= 1
    inputs = traced[end].operation.inputs
    if traced[end].operation.op != "add" or traced[inputs[0]].shape != traced[inputs[1]].shape:
        return []
    first, second = (_ancestors(traced, number, segment.start) for number in inputs)
    if first | second != {*range(segment.start, end)}:
        return []
    branch = sorted(max(first - second, second - first, key=len))
    return branch if any(traced[number].weights for number in branch) else []


def _ancestors(traced: list[TracedOperation], number: int, start: int) -> set[int]:
    """An operation and all it depends on, from `start` on."""
    ancestors = {number}
    for later in range(number, start - 1, -1):
        if later in ancestors:
            ancestors.update(traced[later].operation.inputs)
    return {ancestor for ancestor in ancestors if ancestor >= start}


def _part(traced: list[TracedOperation], segment: _Segment, read: Sequence[int] = ()) -> Part:
    """A segment as a part; of a head with the numbers of the operations whose outputs it reads."""
    numbers = {tensor: -1 - place for place, tensor in enumerate(read)}
    numbers |= {number: number - segment.start + 1 for number in range(segment.start - 1, segment.end + 1)}
    nodes = []
    for number in segment.numbers:
        operation = traced[number].operation
        inputs, outputs = segment.inputs.get(number), segment.outputs.get(number)
        op, tensors, values = operation.with_channels(inputs, outputs)
        nodes.append(Node(op=op, inputs=tuple(numbers[tensor] for tensor in tensors), values=values))
    branch = tuple(number - segment.start + 1 for number in segment.branch)
    return Part(nodes=tuple(nodes), widths=tuple(segment.widths), branch=branch)


def _report(traced: list[TracedOperation], parts: _Chain, streams: list[tuple[int, ...]]) -> Iterator[ModuleReport]:
    """Every weighted module with its choices, or why it has none."""
    optional = {
        segment.start: f"may be left out (stage{i}.depth)"
        for i, (stage, depths) in enumerate(zip(parts.stages, parts.depths, strict=True))
        for segment in stage[depths[0] :]
    }
    for _, prefix, segment in parts.segments():
        for number in segment.numbers:
            if not traced[number].weights:
                continue
            choices = [optional[segment.start]] if segment.start in optional else []
            if number in segment.branch:
                choices.append(f"may be left out ({prefix}.branch)")
            for side, names in (("in", segment.inputs), ("out", segment.outputs)):
                if names.get(number, CLASSES) not in (CLASSES, CHANNELS):
                    kind, index = names[number][0], int(names[number][1:])
                    widths = (streams if kind == "s" else segment.widths)[index]
                    choice = f"stream{index}.width" if kind == "s" else f"{prefix}.width{index}"
                    choices.append(f"channels {side} {', '.join(map(str, widths))} ({choice})")
            reason = "; ".join(choices) or segment.reasons.get(number, "")
            reason += f"; {traced[number].note}" if traced[number].note else ""
            yield ModuleReport(traced[number].module, bool(choices), reason)
