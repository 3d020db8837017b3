"""An exported student in 8-bit integers, for ONNX Runtime, compared with the float one before it is written."""

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdnas.checkpoint import write_atomically
from kdnas.data import Images
from kdnas.files import present
from kdnas.student import GRAPH

_BATCH = 64
MOST_LOST = 0.02


def quantize(student: Path, out: Path, calibration: Images, test: Images, most: float = MOST_LOST) -> dict[str, float]:
    """Write an int8 graph of a student folder's `student.onnx`: static post-training quantisation.

    Weights are symmetric per output channel, activations asymmetric per tensor, their ranges those that the calibration
    images reach; the graph holds quantise and dequantise nodes, which ONNX Runtime fuses into integer kernels.

    Args:
        student: a student folder with a graph.
        out: the file to write.
        calibration: training images.
        test: what both graphs are compared on.
        most: largest loss of accuracy that is accepted, a share of the test images.

    Returns:
        `error` (Euclidean norm of the difference of all logits over that of the float ones), `agreement` (share of
        images with one prediction), `accuracy` of the int8 graph and `float accuracy`, `bytes` and `float bytes`.

    Raises:
        ValueError: no graph there, the student cannot be quantised, or the accuracy falls by more than `most`.
            Then nothing is written.

    Reference: Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
        Inference, CVPR 2018, section 3; the passes are ONNX Runtime's.
    """
    graph = present(student) / GRAPH
    if not graph.is_file():
        raise ValueError(f"{student} has no {GRAPH}. Export it, or retrain it, with every form.")
    if out.suffix != ".onnx":
        raise ValueError(f"the int8 graph is an .onnx file, got {out.name}.")
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / "int8.onnx"
        try:
            with _quietly():
                _quantized(graph, draft, calibration)
            ours, theirs = (_logits(path, test) for path in (draft, graph))
        except Exception as error:  # the library raises whatever an operator it does not know makes it raise
            raise ValueError(f"{graph} cannot be quantised by ONNX Runtime: {error}") from error
        found = _compared(ours, theirs, test.labels.numpy())
        found |= {"bytes": float(draft.stat().st_size), "float bytes": float(graph.stat().st_size)}
        lost = found["float accuracy"] - found["accuracy"]
        if lost > most:
            raise ValueError(
                f"in int8 the student loses {lost:.2%} of accuracy (logits differ by {found['error']:.3f}), more than "
                f"{most:.2%}. Give more calibration images (--num-images), or allow more (--most)."
            )
        content = draft.read_bytes()
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, lambda path: path.write_bytes(content))
    return found


def _quantized(graph: Path, draft: Path, images: Images) -> None:
    import onnx
    from onnxruntime import quantization

    name = onnx.load(graph, load_external_data=False).graph.input[0].name
    batches = iter([{name: batch} for batch in _batches(images)])

    class Reader(quantization.CalibrationDataReader):
        def get_next(self) -> Any:
            return next(batches, None)

    quantization.quantize_static(
        str(graph),
        str(draft),
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        per_channel=True,
    )


def _logits(graph: Path, images: Images) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return np.concatenate([np.asarray(session.run(None, {name: batch})[0]) for batch in _batches(images)])


def _batches(images: Images) -> Iterator[np.ndarray]:
    for chunk in torch.arange(len(images)).split(_BATCH):
        yield images.take(chunk).contiguous().numpy()


def _compared(ours: np.ndarray, theirs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return {
        "error": float(np.linalg.norm(ours - theirs) / max(np.linalg.norm(theirs), 1e-12)),
        "agreement": float((ours.argmax(1) == theirs.argmax(1)).mean()),
        "accuracy": float((ours.argmax(1) == labels).mean()),
        "float accuracy": float((theirs.argmax(1) == labels).mean()),
    }


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the library's advice to preprocess, which the exporter has done already."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
