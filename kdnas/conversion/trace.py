"""Turning a trained network into an elastic supernet whose largest subnet is that network."""

import contextlib
import io
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from kdnas.conversion.transformer import transformer
from kdnas.randomness import torch_rng
from kdnas.spaces.converted import CHANNELS, CLASSES, UNIT, Converted, Node, Part, PartStage, narrower
from kdnas.spaces.vit import ViT
from kdnas.supernet import Supernet

TOLERANCE = 1e-5
_PLAIN = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "swish",
    nn.Hardswish: "hswish",
    nn.Sigmoid: "sigmoid",
    nn.Hardsigmoid: "hsigmoid",
}
_FUNCTIONS = {
    operator.add: "add",
    operator.iadd: "add",
    torch.add: "add",
    operator.mul: "mul",
    operator.imul: "mul",
    torch.mul: "mul",
    torch.relu: "relu",
    F.relu: "relu",
    F.relu6: "relu6",
    F.silu: "swish",
    F.hardswish: "hswish",
    torch.sigmoid: "sigmoid",
    F.hardsigmoid: "hsigmoid",
}
_ACTIVATIONS = {*_PLAIN.values(), "gelu", "dropout"}
_HEADS = ("pool", "mean", "flatten")


class Row(NamedTuple):
    """One module of the source in the report."""

    module: str
    elastic: bool
    why: str


@final
@dataclass(frozen=True)
class Conversion:
    """A converted network.

    Attributes:
        space: its search space; the largest network is the source.
        supernet: with the source's weights, in evaluation mode.
        report: every module of the source with weights, elastic or fixed, and why; of a transformer also what drops.
        error: largest difference between the logits of the source and of the largest subnet, on random images.
    """

    space: Converted | ViT
    supernet: Supernet
    report: tuple[Row, ...]
    error: float

    def __str__(self) -> str:
        width = max(len(row.module) for row in self.report)
        rows = [f"{r.module:<{width}}  {'elastic' if r.elastic else 'fixed':<7}  {r.why}" for r in self.report]
        elastic = sum(row.elastic for row in self.report)
        rows.append(f"{elastic} of {len(rows)} modules are elastic; {self.space.count():,} subnets; ")
        rows[-1] += f"the largest reproduces the source within {self.error:.1e}"
        return "\n".join(rows)


@dataclass
class _Step:
    """One operation of the source: numbers of its inputs, settings, the source's module, the shape it gives."""

    op: str
    inputs: list[int]
    values: list[Any]
    module: str
    shape: tuple[int, ...]
    # What becomes of its output's channels: the name of a chosen width, or why they are fixed.
    width: str = ""


@dataclass
class _Piece:
    """A part in the making: steps `start` to `end` (numbers of their outputs), fed by output `start - 1`."""

    start: int
    end: int
    widths: list[tuple[int, ...]] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)  # by number: why fixed


def convert(
    module: nn.Module,
    *,
    image: tuple[int, int, int] = (3, 224, 224),
    name: str = "converted",
    needs_choices: bool = True,
) -> Conversion:
    """An elastic supernet from a trained network.

    A plain vision transformer is recognised by its parts (`kdnas.conversion.transformer`). Any other network:

    1. The network is traced to a graph of operations and cut wherever a single tensor carries everything on: the
       chain. What branches between two cuts, a residual block, stays together; so does a run of plain layers up to
       the next block or pooling.
    2. *Depth*: blocks at the end of a row of equal output shapes that add to their own input unchanged may be
       left out, the last first. *Width*: channels that neither enter nor leave their part, such as those inside a
       bottleneck, between two convolutions or between two linear layers, may be narrowed to a half or three
       quarters, in multiples of 8 and of whole groups; what is added, multiplied or normalised together is narrowed
       together. Everything else is fixed.
    3. The weights are copied and the largest subnet is compared with the source.

    Args:
        module: gives logits `[batch, classes]`; convolutions, batch norms, linear layers, pooling, sums, products,
            concatenations and the usual activations, without control flow on values; or a plain vision transformer.
        image: channels, height and width, which are equal.
        name: of the space.
        needs_choices: whether a network in which nothing is elastic is refused; scale factors need no choices.

    Raises:
        ValueError: it cannot be traced, has an operation that is not supported (it is named), nothing in it is
            elastic, the images are not square, or the result differs from the source.
    """
    if image[1] != image[2]:
        raise ValueError(f"a space's images are square, got {image[1]} x {image[2]}. Resize them.")
    module = module.eval()
    found = transformer(module, image, name)
    if found is not None:
        rows = tuple(Row(*row) for row in found.rows)
        _check_elastic(rows, needs_choices)
        return Conversion(found.space, found.supernet, rows, _error(module, found.supernet, image))
    steps = _traced(module, image)
    pieces = _pieces(steps)
    head_start = _head_start(steps, pieces)
    body, head = [p for p in pieces if p.end < head_start], _Piece(head_start, len(steps))
    if not body:
        raise ValueError("nothing precedes the network's pooling, so there is nothing to convert.")
    stem = body.pop(0) if not _branches(steps, body[0]) and len(body) > 1 else _Piece(1, 0)
    for piece in (stem, *body, head):
        _choose_widths(steps, piece)
    stages: list[list[_Piece]] = []
    for piece in body:
        before = stages[-1][-1] if stages else stem
        same = before.end > 0 and steps[piece.end - 1].shape == steps[before.end - 1].shape
        if stages and same:
            stages[-1].append(piece)
        else:
            stages.append([piece])
    depths = [_depths(steps, stage) for stage in stages]
    classes = steps[-1].shape[1]
    space = Converted(
        name=name,
        source="kdnas convert",
        classes=classes,
        image_channels=image[0],
        resolutions=(image[1],),
        stem=_part(steps, stem),
        stages=tuple(
            PartStage(parts=tuple(_part(steps, p) for p in stage), depths=options)
            for stage, options in zip(stages, depths, strict=True)
        ),
        head=_part(steps, head),
    )
    report = _report(steps, stem, stages, depths, head)
    _check_elastic(report, needs_choices)
    supernet = Supernet(space).eval()
    placed = [("stem", stem)] + [(f"stages.{i}.{j}", p) for i, s in enumerate(stages) for j, p in enumerate(s)]
    layers = dict(space.blueprint(space.largest).named())
    for position, piece in [*placed, ("head", head)]:
        bank = supernet.held(position, layers[position])
        for place in range(piece.start, piece.end + 1):
            step = steps[place - 1]
            if step.op in ("conv", "norm", "linear"):
                weights = module.get_submodule(step.module).state_dict()
                bank.get_submodule(f"parts.{place - piece.start}").load_state_dict(weights)
    error = _error(module, supernet, image)
    return Conversion(space, supernet, report, error)


def _check_elastic(report: tuple[Row, ...], needs_choices: bool) -> None:
    if needs_choices and not any(row.elastic for row in report):
        raise ValueError(
            "no elastic module found: no block may be left out and no inner width narrowed. The modules are:\n"
            + "\n".join(f"{row.module}: {row.why}" for row in report)
        )


def _error(module: nn.Module, supernet: Supernet, image: tuple[int, int, int]) -> float:
    images = torch.randn(2, *image, generator=torch_rng("convert"))
    with torch.no_grad():
        source = module(images)
        difference = float((source - supernet(images, supernet.space.largest).logits).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(source.abs().max())):
        raise ValueError(
            f"the largest subnet differs from the source by {difference:.3g}. The source may draw at random or "
            "depend on the batch in evaluation mode."
        )
    return difference


def _traced(module: nn.Module, image: tuple[int, int, int]) -> list[_Step]:
    try:
        traced = fx.symbolic_trace(module)
        # What it raises it prints too.
        with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):
            ShapeProp(traced).propagate(torch.zeros(2, *image))
    except Exception as error:  # a tracer runs the source's own code, which may raise anything
        said = str(error.__cause__ or error).splitlines()[0]
        raise ValueError(
            f"the network cannot be traced for images of {image}: {said}. Its forward must not depend on values, "
            "and the image size must suit it."
        ) from error
    modules, numbers, steps = dict(traced.named_modules()), dict[fx.Node, int](), list[_Step]()
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            if numbers:
                raise ValueError("the network must take one tensor, it takes several.")
            numbers[node] = 0
            continue
        if node.op == "output":
            if not isinstance(node.args[0], fx.Node) or numbers[node.args[0]] != len(steps):
                raise ValueError("the network must give one tensor of logits, as the last thing it computes.")
            continue
        found = _operation(node, modules)
        inputs = [a for a in _flat(node.args) if isinstance(a, fx.Node)]
        if found is None:
            numbers[node] = numbers[inputs[0]]
            continue
        shape = tuple(node.meta["tensor_meta"].shape)
        where = str(node.target) if node.op == "call_module" else node.name
        steps.append(_Step(found[0], [numbers[i] for i in inputs], list(found[1]), where, shape))
        numbers[node] = len(steps)
    if not steps or len(steps[-1].shape) != 2:
        raise ValueError("the network must give logits [batch, classes].")
    return steps


def _flat(arguments: Sequence[Any]) -> list[Any]:
    return [b for a in arguments for b in (_flat(a) if isinstance(a, list | tuple) else [a])]


def _operation(node: fx.Node, modules: dict[str, nn.Module]) -> tuple[str, Sequence[Any]] | None:
    """The graph's operation and its values; None for one that changes nothing."""
    if node.op == "call_module":
        made = modules[str(node.target)]
        found = _of_module(made)
        if found is not _UNKNOWN:
            return found
        what = f"the module {node.target} ({type(made).__name__})"
    elif node.op == "call_function":
        target: Any = node.target
        if target in _FUNCTIONS and (
            _FUNCTIONS[target] not in ("add", "mul")
            or (all(isinstance(a, fx.Node) for a in node.args) and len(node.args) == 2 and not node.kwargs)
        ):
            return _FUNCTIONS[target], ()
        if _FUNCTIONS.get(target) == "add" and any(a == 0 for a in node.args if isinstance(a, int | float)):
            return None  # what stands for a shortcut that is none
        if target is torch.flatten and _argument(node, 1, "start_dim", 0) == 1:
            return "flatten", ()
        if target is F.adaptive_avg_pool2d:
            side = _one(_argument(node, 1, "output_size", None))
            if side:
                return "pool", (side,)
        if target is torch.cat and _argument(node, 1, "dim", 0) == 1:
            return "cat", ()
        if target is F.dropout:
            return "dropout", (_argument(node, 1, "p", 0.5),)
        if getattr(target, "__name__", "") == "stochastic_depth":
            return "drop_path", (float(_argument(node, 1, "p", 0.0)),)
        what = f"the function {getattr(target, '__name__', target)} at {node.name}"
    else:
        if node.target == "flatten" and _argument(node, 1, "start_dim", 0) == 1:
            return "flatten", ()
        if node.target == "mean" and list(_flat([_argument(node, 1, "dim", ())])) in ([2, 3], [-2, -1]):
            if not _argument(node, 2, "keepdim", False):
                return "mean", ()
        if node.target == "contiguous":
            return None
        if node.target in ("relu", "sigmoid"):
            return str(node.target), ()
        if node.target in ("add", "mul") and len(node.args) == 2 and isinstance(node.args[1], fx.Node):
            return str(node.target), ()
        what = f"the operation {node.target} at {node.name}"
    raise ValueError(
        f"{what} cannot be converted. Supported are square convolutions, batch norm, linear layers, pooling by modules "
        "with their default rounding, sums and products of two tensors, concatenations of channels, dropout, "
        "stochastic depth and the usual activations."
    )


_UNKNOWN: Any = object()


def _of_module(made: nn.Module) -> Any:
    for kind, op in _PLAIN.items():
        if type(made) is kind:
            return op, ()
    if isinstance(made, nn.Identity):
        return None
    if isinstance(made, nn.GELU) and made.approximate == "none":
        return "gelu", ()
    if isinstance(made, nn.Dropout):
        return "dropout", (made.p,)
    if isinstance(made, nn.Flatten) and made.start_dim == 1:
        return "flatten", ()
    if isinstance(made, nn.AdaptiveAvgPool2d) and _one(made.output_size):
        return "pool", (_one(made.output_size),)
    if isinstance(made, nn.MaxPool2d | nn.AvgPool2d):
        sides = [_one(made.kernel_size), _one(made.stride), _one(made.padding)]
        if isinstance(made, nn.MaxPool2d):
            op, plain = "max_pool", _one(made.dilation) == 1 and not made.return_indices
        else:
            op, plain = "avg_pool", made.divisor_override is None and (made.count_include_pad or sides[2] == 0)
        if None not in sides and plain and not made.ceil_mode:
            return op, sides
    if type(made) is nn.BatchNorm2d and made.affine and made.track_running_stats and made.momentum is not None:
        return "norm", (made.num_features, made.eps, made.momentum)
    if type(made) is nn.Linear:
        return "linear", (made.in_features, made.out_features, int(made.bias is not None))
    if type(made) is nn.Conv2d and made.padding_mode == "zeros" and not isinstance(made.padding, str):
        sides = [_one(s) for s in (made.kernel_size, made.stride, made.padding, made.dilation)]
        if None not in sides:
            group = made.in_channels // made.groups if made.groups > 1 else 0
            return "conv", (made.in_channels, made.out_channels, *sides, group, int(made.bias is not None))
    return _UNKNOWN


def _argument(node: fx.Node, place: int, name: str, default: Any) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _one(value: Any) -> int | None:
    """The number, where a pair has one number twice."""
    listed = _flat([value])
    return listed[0] if isinstance(listed[0], int) and len(set(listed)) == 1 else None


def _pieces(steps: list[_Step]) -> list[_Piece]:
    """The chain: blocks that branch, and runs of plain layers, which pooling ends."""
    last_use = dict.fromkeys(range(len(steps) + 1), 0)
    for number, step in enumerate(steps, 1):
        for taken in step.inputs:
            last_use[taken] = number
    pieces: list[_Piece] = []
    start, open_until, run = 1, 0, False
    for number in range(1, len(steps) + 1):
        # Only the newest tensor may be used later: here the chain is cut.
        open_until = max(open_until, last_use[number - 1])
        if open_until > number:
            continue
        plain, op = number == start, steps[number - 1].op
        if plain and pieces and not run and op in _ACTIVATIONS:
            pieces[-1].end = number  # the activation behind a residual sum
        elif plain and pieces and run:
            pieces[-1].end = number
        else:
            pieces.append(_Piece(start, number))
            run = plain
        if plain and op in ("max_pool", "avg_pool"):
            run = False
            if number < len(steps):
                pieces.append(_Piece(number + 1, number))
                run = True
        start = number + 1
    return [p for p in pieces if p.start <= p.end]


def _branches(steps: list[_Step], piece: _Piece) -> bool:
    """Whether some step takes more than the one before it gives."""
    return any(steps[n - 1].inputs != [n - 1] for n in range(piece.start, piece.end + 1))


def _head_start(steps: list[_Step], pieces: list[_Piece]) -> int:
    """The number of the first step of the head: pooling or flattening on the chain; a piece it is in is cut there."""
    for index, piece in enumerate(pieces):
        if _branches(steps, piece):
            continue
        for number in range(piece.start, piece.end + 1):
            if steps[number - 1].op in _HEADS:
                if number > piece.start:
                    pieces.insert(index, _Piece(piece.start, number - 1))
                return number
    raise ValueError("the network has no pooling or flattening before its classifier, so its head cannot be told.")


def _choose_widths(steps: list[_Step], piece: _Piece) -> None:
    """Which channels inside a piece are narrowed together, and to what; the others, why not."""
    parent: dict[int, int] = {}
    units: dict[int, int] = {}
    fixed: dict[int, str] = {}

    def root(number: int) -> int:
        while parent.get(number, number) != number:
            number = parent[number]
        return number

    def join(one: int, other: int) -> None:
        a, b = root(one), root(other)
        if a != b:
            parent[b] = a
            units[a] = math.lcm(units.get(a, 1), units.pop(b, 1))
            if b in fixed:
                fixed.setdefault(a, fixed.pop(b))

    before = piece.start - 1
    fixed[before] = "its channels are the block's input, which other blocks share"
    for number in range(piece.start, piece.end + 1):
        step = steps[number - 1]
        if step.op == "cat":
            for taken in (*step.inputs, number):
                fixed.setdefault(root(taken), "its channels are concatenated with others")
        elif step.op in ("conv", "linear") and not (step.op == "conv" and step.values[6]):
            continue  # a dense layer makes channels of its own
        elif step.op == "conv":
            inputs, outputs, group = step.values[0], step.values[1], step.values[6]
            if inputs == outputs:
                join(step.inputs[0], number)
                units[root(number)] = math.lcm(units.get(root(number), 1), group)
            else:
                for one in (step.inputs[0], number):
                    fixed.setdefault(root(one), "a grouped convolution changes the number of channels")
        elif step.op == "flatten" and len(_shape(steps, step.inputs[0])) == 4:
            if math.prod(_shape(steps, step.inputs[0])[2:]) == 1:
                join(step.inputs[0], number)
            else:
                for one in (step.inputs[0], number):
                    fixed.setdefault(root(one), "its positions are flattened into channels")
        else:
            for taken in step.inputs:
                if taken and _shape(steps, taken)[1] != step.shape[1]:
                    fixed.setdefault(root(taken), "its channel is spread over others")
                else:
                    join(taken, number)
    outcome = "its channels are the block's output, which other blocks share"
    fixed.setdefault(root(piece.end), "they are the logits" if piece.end == len(steps) else outcome)
    names: dict[int, str] = {}
    for number in range(piece.start, piece.end + 1):
        group = root(number)
        if group in fixed:
            piece.reasons[number] = fixed[group]
            continue
        if group not in names:
            full, unit = steps[number - 1].shape[1], math.lcm(UNIT, units.get(group, 1))
            options = narrower(full, unit)
            if len(options) == 1:
                fixed[group] = piece.reasons[number] = f"{full} channels in steps of {unit} leave nothing to choose"
                continue
            names[group] = f"w{len(piece.widths)}"
            piece.widths.append(options)
        steps[number - 1].width = names[group]


def _shape(steps: list[_Step], number: int) -> tuple[int, ...]:
    return steps[number - 1].shape if number else ()


def _depths(steps: list[_Step], stage: list[_Piece]) -> tuple[int, ...]:
    """How many parts of a stage may be used: those at the end that keep the shape and add to their input may go."""
    least = len(stage)
    while least > 1 and _adds_to_its_input(steps, stage[least - 1]):
        least -= 1
    return tuple(range(least, len(stage) + 1))


def _adds_to_its_input(steps: list[_Step], piece: _Piece) -> bool:
    end = piece.end
    while end > piece.start and steps[end - 1].op in _ACTIVATIONS:
        end -= 1
    return steps[end - 1].op == "add" and piece.start - 1 in steps[end - 1].inputs


def _part(steps: list[_Step], piece: _Piece) -> Part:
    nodes = []
    for number in range(piece.start, piece.end + 1):
        step, values = steps[number - 1], list(steps[number - 1].values)

        def named(taken: int) -> str:
            return steps[taken - 1].width if taken >= piece.start else ""

        taken = step.inputs[0]
        if step.op in ("conv", "linear"):
            values[0] = (CHANNELS if taken == 0 else named(taken)) or values[0]
            last = number == len(steps) and step.op == "linear"
            values[1] = (CLASSES if last else step.width) or values[1]
        elif step.op == "norm":
            values[0] = step.width or values[0]
        nodes.append(Node(op=step.op, inputs=tuple(i - piece.start + 1 for i in step.inputs), values=tuple(values)))
    return Part(nodes=tuple(nodes), widths=tuple(piece.widths))


def _report(
    steps: list[_Step],
    stem: _Piece,
    stages: list[list[_Piece]],
    depths: list[tuple[int, ...]],
    head: _Piece,
) -> tuple[Row, ...]:
    placed: list[tuple[str, _Piece, str]] = [("stem", stem, "")]
    for index, (stage, options) in enumerate(zip(stages, depths, strict=True)):
        for place, piece in enumerate(stage):
            dropped = f"may be left out (stage{index}.depth)" if place >= options[0] else ""
            placed.append((f"stage{index}.block{place}", piece, dropped))
    rows = []
    for name, piece, dropped in [*placed, ("head", head, "")]:
        for number in range(piece.start, piece.end + 1):
            step = steps[number - 1]
            if step.op not in ("conv", "norm", "linear"):
                continue
            reasons = [dropped] if dropped else []
            for what, one in (("in", step.inputs[0]), ("out", number)):
                width = steps[one - 1].width if one >= piece.start else ""
                if width and not (step.op == "norm" and what == "in"):
                    options = piece.widths[int(width[1:])]
                    reasons.append(f"channels {what} {', '.join(map(str, options))} ({name}.width{width[1:]})")
            why = "; ".join(reasons) if reasons else piece.reasons.get(number, "")
            rows.append(Row(step.module, bool(reasons), why))
    return tuple(rows)
