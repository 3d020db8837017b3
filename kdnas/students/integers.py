"""An exported student in 8-bit integers, for ONNX Runtime, compared with the float one before it is written."""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kdnas.blocks.basic import resize
from kdnas.data.base import Data, Images, TensorImages, normalise
from kdnas.network import Network
from kdnas.plain import reason
from kdnas.preprocessing import Preprocessing
from kdnas.randomness import torch_rng
from kdnas.runs.files import current_folder, write_atomically, write_bytes
from kdnas.runs.folder import GRAPH, INTEGERS
from kdnas.runtimes import input_size, joined, quantized, require
from kdnas.students.card import form_of
from kdnas.students.graph import graph_of
from kdnas.tasks.base import Task
from kdnas.tasks.classification import CLASSIFICATION

_BATCH = 64
MOST_LOST = 0.02
# Sums are rounded in another order, which moves a few activations to the next integer.
MOST_APART = 0.1


def quantize(
    student: Path,
    out: Path,
    calibration: Images,
    test: Images,
    most: float = MOST_LOST,
    task: Task = CLASSIFICATION,
) -> dict[str, float]:
    """Write an int8 graph of a student folder's `student.onnx`: static post-training quantisation.

    Weights are symmetric per output channel, activations asymmetric per tensor, their ranges those that the calibration
    images reach; the graph holds quantise and dequantise nodes, which ONNX Runtime fuses into integer kernels.

    Args:
        student: a student folder with a graph.
        out: the file to write.
        calibration: training images.
        test: what both graphs are compared on.
        most: largest accepted loss of accuracy, a share of the test images.
        task: of the images' labels.

    Returns:
        `error` (Euclidean norm of the difference of all logits over that of the float ones), `agreement` (share of
        images with one prediction), `accuracy` of the int8 graph and `float accuracy`, `bytes` and `float bytes`.

    Raises:
        ValueError: no graph there, the student cannot be quantised, or the accuracy falls by more than `most`.
            Then nothing is written.

    Reference: Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
        Inference, CVPR 2018, section 3; the passes are ONNX Runtime's.
    """
    require("onnx", "quantisation")
    graph = form_of(student, GRAPH)
    if out.suffix != ".onnx":
        raise ValueError(f"`out` must be an .onnx file, got {out.name}.")
    if current_folder(out.parent) == current_folder(student):
        raise ValueError(f"`out` must lie outside of the student {student}, which stays as it is, got {out}.")
    content = graph.read_bytes()
    try:
        integers = integers_of(content, calibration)
        ours, theirs = _logits(integers, test), _logits(content, test)
    except OSError:  # a full disk, not the graph
        raise
    except Exception as error:  # for an unsupported operator the library may raise anything
        raise ValueError(f"{graph} cannot be quantised by ONNX Runtime: {reason(error)}.") from error
    comparison = _compare(ours, theirs, test, task)
    _check_loss(comparison, most, task.measure)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, lambda path: write_bytes(path, integers))
    return comparison | {"bytes": float(len(integers)), "float bytes": float(len(content))}


def _check_loss(comparison: dict[str, float], most: float, measure: str) -> None:
    loss = comparison["float accuracy"] - comparison["accuracy"]
    if loss > most:
        raise ValueError(
            f"in int8 the student loses {loss:.2%} of {measure} (relative error of the logits "
            f"{comparison['error']:.3f}), more than {most:.2%}. Calibrate on more images (--num-images), or accept "
            "more (--most)."
        )


def calibration_images(images: Images, count: int = 256, seed: int = 0) -> Images:
    """Some images of a part, for the ranges of activations."""
    indices = torch.randperm(len(images), generator=torch_rng("calibration", seed))[:count]
    return TensorImages(images.take(indices), torch.zeros(len(indices)))  # nothing reads their labels


def write_integers(path: Path, graph: bytes, data: Data) -> dict[str, float]:
    """Write an int8 graph of a float one, calibrated on training images and compared on the search part.

    Returns:
        `error`, `agreement`, `accuracy` and `float accuracy` of `quantize`, on the search part.

    Raises:
        ValueError: the accuracy falls by more than `MOST_LOST`.
    """
    integers = integers_of(graph, calibration_images(data.train))
    ours, theirs = _logits(integers, data.search), _logits(graph, data.search)
    comparison = _compare(ours, theirs, data.search, data.task)
    _check_loss(comparison, MOST_LOST, data.task.measure)
    write_bytes(path, integers)
    return comparison


def integers_of(graph: bytes, calibration: Images) -> bytes:
    """A graph in 8-bit integers, by ONNX Runtime's static quantisation."""
    return quantized(graph, _batches(calibration, input_size(graph)))


class _Pixels(torch.nn.Module):
    """A graph of normalised images as one of pixels in [0, 1], with logits alone."""

    def __init__(self, graph: torch.nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.inner, self.preprocessing = graph, preprocessing  # a traced module's `graph` is something else

    def forward(self, images: Tensor) -> Tensor:
        return self.inner(normalise(images, self.preprocessing))[0]


def _unshared(content: bytes) -> bytes:
    """A graph in which every node has initializers of its own.

    The exporter shares equal ones, such as zero points, and ONNX Runtime refuses to change a shared one into unsigned
    integers when it is configured for sums that do not saturate.
    """
    import onnx

    model = onnx.load_from_string(content)
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    used: set[str] = set()
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            if name in initializers and name in used:
                tensor = onnx.TensorProto()
                tensor.CopyFrom(initializers[name])
                tensor.name = node.input[place] = f"{name}_{len(model.graph.initializer)}"
                model.graph.initializer.append(tensor)
            used.add(name)
    return model.SerializeToString(deterministic=True)


def write_trained(prepared: torch.fx.GraphModule, folder: Path, data: Data, network: Network) -> dict[str, float]:
    """Write `student-int8.onnx`: a network trained with simulated integers, as one that computes with them.

    Args:
        prepared: torchao's graph with its simulated roundings, in evaluation mode, on a CPU; it is changed.
        folder: of the student.
        data: its test part is for the comparison.
        network: the same weights in float.

    Returns:
        `int8 error`: Euclidean norm of the difference between the logits of ONNX Runtime and of the simulation over
        the latter's; `int8 agreement`: the share of images with one prediction; `int8 accuracy`, `float accuracy` (of
        the same weights without rounding), `int8 bytes`.

    Raises:
        ValueError: the graph cannot be written, or ONNX Runtime's logits differ by more than `MOST_APART`.
    """
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        simulated = _Pixels(prepared, data.preprocessing)
        theirs = np.concatenate([simulated(torch.from_numpy(batch)).numpy() for batch in _batches(data.test)])
        logits = [
            network(normalise(torch.from_numpy(batch), data.preprocessing)).logits for batch in _batches(data.test)
        ]
        content = graph_of(_Pixels(convert_pt2e(prepared), data.preprocessing), data.preprocessing)
    content = _unshared(content)
    write_bytes(folder / INTEGERS, content)
    comparison = _compare(_logits(content, data.test), theirs, data.test, data.task)
    if not comparison["error"] <= MOST_APART:
        raise ValueError(
            f"{INTEGERS} gives other logits in ONNX Runtime than in training: the relative error is "
            f"{comparison['error']:.3f}, the tolerance {MOST_APART}. Train longer with fixed ranges (a lower `freeze`)."
        )
    float_accuracy = _quality(torch.cat(logits), data.test, data.task)
    measurements = {f"int8 {name}": comparison[name] for name in ("error", "agreement", "accuracy")}
    return measurements | {"float accuracy": float_accuracy, "int8 bytes": float(len(content))}


def _logits(graph: bytes, images: Images) -> np.ndarray:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # Without the newest integer instructions, sums of two products saturate at 16 bits unless this is set.
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    entry = session.get_inputs()[0]
    batches = _batches(images, [side for side in entry.shape[2:] if isinstance(side, int)])
    outputs = (session.run(None, {entry.name: batch}) for batch in batches)
    return np.concatenate([joined(map(torch.from_numpy, each)).numpy() for each in outputs])


def _batches(images: Images, size: Sequence[int] = ()) -> Iterator[np.ndarray]:
    """All images, resized to the height and width of a graph's input."""
    for pixels, _ in images.batches(_BATCH):
        yield (resize(pixels, *size) if size else pixels).contiguous().numpy()


def _compare(ours: np.ndarray, theirs: np.ndarray, part: Images, task: Task) -> dict[str, float]:
    answers, others = (each[:, : each.shape[1] - task.image_outputs].argmax(1) for each in (ours, theirs))
    return {
        "error": float(np.linalg.norm(ours - theirs) / max(np.linalg.norm(theirs), 1e-12)),
        "agreement": float((answers == others).mean()),
        "accuracy": _quality(torch.from_numpy(ours), part, task),
        "float accuracy": _quality(torch.from_numpy(theirs), part, task),
    }


def _quality(logits: Tensor, part: Images, task: Task) -> float:
    """The task's measure of the logits of all images of a part."""
    return float(task.quality(task.grades(logits, part.truths(torch.arange(len(part)))).double().mean(0)))
