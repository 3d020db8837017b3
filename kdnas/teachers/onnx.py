"""ONNX graphs as teachers, run by ONNX Runtime."""

import copy
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from kdnas.outputs import Outputs
from kdnas.plain import reason
from kdnas.preprocessing import Preprocessing
from kdnas.runs.files import parse_json
from kdnas.runtimes import joined
from kdnas.specs import nearest
from kdnas.teachers.base import Frozen, Teacher
from kdnas.teachers.feeding import Normalisation, fed
from kdnas.teachers.zoo import with_classes_of
from kdnas.values import Side, shown

_MOST, _BLOCKS = 6, 4
Shape = tuple[int, ...]


def onnx_teacher(
    path: str,
    classes: int,
    preprocessing: Preprocessing,
    stages: tuple[str, ...] = (),
    size: Side = 0,
    normalise: Normalisation = "data",
    select: str = "",
    class_names: tuple[str, ...] = (),
    dense: bool = False,
) -> Teacher:
    """An ONNX graph as a teacher. It runs on the CPU, whatever the student's device.

    Its features are outputs that are added to the graph: of named values, or the last map at each resolution that ends
    a block, at most six, or of a transformer four of the sums that its blocks end in, evenly spread.

    Args:
        path: the `.onnx` file, with its weights inside or beside it.
        classes: number of the data's classes.
        preprocessing: the data's.
        stages: names of values inside the graph.
        size: height and width of its images, where the graph leaves them free; 0 for the data's.
        normalise: how its images are normalised, which the file does not say; see `fed`.
        select: the graph's class of each of the data's, see `columns_of`.
        class_names: the data's.
        dense: whether it answers for every pixel.

    Raises:
        ValueError: no such file or a damaged one, a graph that takes something else than one batch of float images, a
            name that it does not have, or other classes.
    """
    name = f"onnx:{path}"
    model = _model(Path(path), name)
    batch, shape = _input(model, name, size, preprocessing)
    graph = Graph(model, stages, (batch or 2, *shape), name, dense=dense)
    own = fed(shape, preprocessing, normalise, name)
    teacher = Frozen(graph, preprocessing=own, stages=(), classes=classes, batch=batch, dense=dense)
    teacher.note = f"ONNX on the CPU, {f'batches of {batch}' if batch else 'batches of any size'}"
    return with_classes_of(teacher, name, classes, class_names, select, _names(model))


@final
class Graph(nn.Module):
    """An ONNX graph as a module that returns Outputs.

    Args:
        model: the graph, with one input.
        stages: names of values that are its features; empty to choose.
        shape: of the images by which they are chosen.
        name: for messages.
        dense: whether it answers for every pixel.

    Raises:
        ValueError: a name that the graph does not have, or it fails on images of this shape.
    """

    digest: Tensor

    def __init__(self, model: Any, stages: Sequence[str], shape: Shape, name: str, *, dense: bool = False) -> None:
        super().__init__()
        self.input, self.logits = model.graph.input[0].name, model.graph.output[0].name
        values = [output for node in model.graph.node for output in node.output if output]
        for stage in stages:
            if stage not in values:
                raise ValueError(f"the graph {name} has no value {shown(stage)}.{nearest(stage, values)}")
        self.stages = tuple(stages) or _stages(model, self.input, self.logits, np.zeros(shape, np.float32), name)
        # What it says of whole images comes as rows beside the maps; see `joined`.
        second = model.graph.output[1:2] if dense else ()
        self.rows = [output.name for output in second if len(output.type.tensor_type.shape.dim) == 2]
        node = _classifier(model, self.logits) if dense else None
        self.classified, self.is_turned = ("", False) if node is None else (node.input[0], node.op_type == "MatMul")
        more = [self.classified] if self.classified else []
        self.content = _with_outputs(model, (*self.stages, *more)).SerializeToString()
        # What a cache of outputs depends on, as other networks' weights.
        self.digest = nn.Buffer(torch.tensor(list(hashlib.blake2b(self.content, digest_size=16).digest())))
        self.session = _session(self.content, name)

    def __deepcopy__(self, memo: Any) -> "Graph":
        """The same graph and session: neither ever changes."""
        del memo
        return copy.copy(self)

    def forward(self, images: Tensor) -> Outputs:
        """Logits and features, on the images' device."""
        names = [self.logits, *self.stages, *([self.classified] if self.classified else []), *self.rows]
        values = self.session.run(names, {self.input: images.detach().cpu().float().numpy()})
        logits, *features = (torch.from_numpy(value).float().to(images.device) for value in values)
        logits = joined((logits, features.pop())) if self.rows else logits
        classified = features.pop() if self.classified else None
        if classified is not None and classified.dim() == 4 and self.is_turned:
            classified = classified.movedim(-1, 1)
        return Outputs(logits, tuple(features), images=images, classified=classified)


def _model(path: Path, name: str) -> Any:
    if not path.is_file():
        raise ValueError(f"there is no file {path}. Check the path.")
    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
    except Exception as error:  # of a foreign file, anything
        raise ValueError(
            f"{name} is damaged, or no ONNX graph ({reason(error, named=True)}). Export it again."
        ) from error
    return model


def _input(model: Any, name: str, size: int, data: Preprocessing) -> tuple[int, tuple[int, int, int]]:
    """The number of images in a call (0 for any), and channels, height and width."""
    weights = {weight.name for weight in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    kind: Any = inputs[0].type.tensor_type if inputs else None
    sides = [side.dim_value for side in kind.shape.dim] if inputs else []
    if len(inputs) != 1 or len(sides) != 4 or kind.elem_type != onnx.TensorProto.FLOAT:
        given = ", ".join(value.name for value in inputs) or "nothing"
        raise ValueError(
            f"{name} must take one batch of float32 images [batch, channels, height, width], it takes {given} of "
            f"{len(sides)} dimensions. Export it with images as its only input."
        )
    while model.graph.input[0].name != inputs[0].name:  # weights that are listed as inputs, too
        del model.graph.input[0]
    batch, channels, height, width = sides
    if size and height not in (0, size):
        raise ValueError(f"`size` of {name} must be {height}, which is fixed in the graph, got {size}.")
    height, width = height or size or data.height, width or size or data.width
    return batch, (channels or len(data.mean), height, width)


def _with_outputs(model: Any, names: Sequence[str]) -> Any:
    wider = onnx.ModelProto()
    wider.CopyFrom(model)
    known = {output.name for output in wider.graph.output}
    wider.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    return wider


def _session(content: bytes, name: str) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ValueError(f"{name} cannot be run by ONNX Runtime ({reason(error)}). Export it again.") from error


def _stages(model: Any, source: str, logits: str, images: np.ndarray, name: str) -> tuple[str, ...]:
    """The values that are the features, by one run with all values as outputs."""
    nodes = {output: node for node in model.graph.node for output in node.output if output}
    session = _session(_with_outputs(model, list(nodes)).SerializeToString(), name)
    floats = [output.name for output in session.get_outputs() if output.type == "tensor(float)"]
    try:
        values = session.run(floats, {source: images})
    except Exception as error:
        size = " x ".join(map(str, images.shape[1:]))
        raise ValueError(
            f"{name} fails on images of {size} ({reason(error)}). Give its size: {name},size=N."
        ) from error
    shapes = {output: value.shape for output, value in zip(floats, values, strict=True)}
    count = shapes.get(logits, (0, 0))[-1]
    shapes = {output: shape for output, shape in shapes.items() if shape[:1] == images.shape[:1] and output in nodes}
    order = [output for output in nodes if output in shapes]
    sums = _sums(order, shapes, nodes)
    if len(sums) >= 2 * _BLOCKS:  # a block of a transformer ends in two: of its attention, and of its linear layers
        ends = sums[1::2]
        return tuple(ends[(k + 1) * len(ends) // _BLOCKS - 1] for k in range(_BLOCKS))
    only = _alone(model)
    maps = {output: shapes[output] for output in order if output in only and _is_map(shapes[output], images.shape)}
    while maps and shapes[list(maps)[-1]][1] == count:
        maps.popitem()  # a convolution that classifies
    chosen: dict[Shape, str] = {}
    for output, shape in maps.items():
        before = chosen.pop(shape[2:], None)
        # What is twice as wide as the map before belongs to a block that ends at the next resolution.
        is_inner = before is not None and shape[1] >= 2 * shapes[before][1] and shape[2:] != list(maps.values())[-1][2:]
        chosen[shape[2:]] = before if before is not None and is_inner else output
    return tuple(chosen.values())[-_MOST:]


def _classifier(model: Any, logits: str) -> Any:
    """Of the last convolutions or products on the ways to the logits the deepest; None where there is none."""
    nodes = {output: node for node in model.graph.node for output in node.output}

    def before(values: Sequence[str], *, ends: bool) -> list[Any]:
        """The nodes that values depend on; with `ends` none before a convolution or product."""
        needed, chosen = set(values), []
        for node in reversed(model.graph.node):
            if needed & set(node.output):
                chosen.append(node)
                needed |= set() if ends and node.op_type in _MIXING else set(node.input)
        return chosen

    last = [node for node in before([logits], ends=True) if node.op_type in _MIXING and node.input[0] in nodes]
    return max(last, key=lambda node: len(before(node.input[:1], ends=False)), default=None)


_MIXING = ("Conv", "ConvTranspose", "MatMul")


def _is_map(shape: Shape, images: Shape) -> bool:
    """Whether height and width are more than a pixel, in the proportion of the images'."""
    if len(shape) != 4 or shape[2] * shape[3] == 1:
        return False
    return abs(shape[2] * images[3] - shape[3] * images[2]) < max(images[2:])


def _alone(model: Any) -> set[str]:
    """The values from which alone all later ones are computed: the ends of blocks, and what lies on no shortcut."""
    weights = {weight.name for weight in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type not in ("Constant", "Pad")]
    last_use = {value: place for place, node in enumerate(nodes) for value in node.input if value not in weights}
    alive, alone = set[str](), set[str]()
    for place, node in enumerate(nodes):
        alive = {value for value in (*alive, *node.output) if last_use.get(value, -1) > place}
        if len(alive) == 1 and alive <= {*node.output}:
            alone |= alive
    return alone


def _sums(order: Sequence[str], shapes: dict[str, Shape], nodes: dict[str, Any]) -> list[str]:
    """A transformer's shortcuts: sums of two values of one shape `[batch, tokens, channels]`, the most frequent one."""
    sums = [
        output
        for output in order
        if nodes[output].op_type == "Add"
        and len(shapes[output]) == 3
        and all(shapes.get(value) == shapes[output] for value in nodes[output].input)
    ]
    kinds = [shapes[output] for output in sums]
    return [output for output in sums if kinds.count(shapes[output]) == max(map(kinds.count, kinds))]


def _names(model: Any) -> tuple[str, ...] | None:
    """Class names in the metadata of a graph: `class_names` or `names`, a JSON list or a mapping of numbers."""
    for entry in model.metadata_props:
        if entry.key in ("class_names", "names"):
            try:
                value = parse_json(entry.value.encode(), "", "")
                names = [value[key] for key in sorted(value, key=int)] if isinstance(value, dict) else value
            except ValueError:
                continue
            if isinstance(names, list) and all(isinstance(each, str) for each in names):
                return tuple(names)
    return None
