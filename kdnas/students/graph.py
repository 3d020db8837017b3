"""A student as an ONNX graph."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from kdnas.preprocessing import Preprocessing
from kdnas.runtimes import onnx_bytes, onnx_function, require
from kdnas.students.source import shortened


def example_of(preprocessing: Preprocessing, batch: int = 2) -> Tensor:
    """Images of a student's size, all zero."""
    return torch.zeros(batch, len(preprocessing.mean), preprocessing.height, preprocessing.width)


def graph_of(
    student: nn.Module,
    preprocessing: Preprocessing,
    output: str = "logits",
    metadata: Mapping[str, str] = {},
    *,
    any_size: bool = False,
    has_image_outputs: bool = False,
) -> bytes:
    """A module from images `[batch, channels, height, width]` to logits as an ONNX graph.

    Args:
        student: the module.
        preprocessing: gives the images' size.
        output: name of the output.
        metadata: texts by name, stored in the file.
        any_size: whether height and width are free.
        has_image_outputs: whether a second output is of the whole image; its name is `image_logits`, for example.

    Raises:
        ValueError: it cannot be expressed, or for one batch size only; or the extra `onnx` is not installed.
    """
    require("onnx", "an ONNX graph")
    more = (f"image_{output.removeprefix('coarse_')}",) if has_image_outputs else ()
    names = ("images", output, *more)
    try:
        return onnx_bytes(student, example_of(preprocessing), names=names, metadata=metadata, any_size=any_size)
    except torch.onnx.OnnxExporterError as error:
        raise ValueError(
            f"the network cannot be written as an ONNX graph: {shortened(error)} Use operations that ONNX has."
        ) from error


def load_graph(path: Path) -> Callable[[Tensor], Tensor]:
    """A function from images to logits that runs a graph in ONNX Runtime on the CPU.

    Raises:
        ValueError: ONNX Runtime cannot load it.
    """
    try:
        return onnx_function(path, torch.get_num_threads())
    except Exception as error:
        raise ValueError(f"onnxruntime cannot run {path.name} ({shortened(error)}).") from error
