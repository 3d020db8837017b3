"""A student as an ONNX graph."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdnas.preprocessing import Preprocessing
from kdnas.runs.folder import GRAPH
from kdnas.students.source import shortened

_OPSET = 20


def graph_of(student: nn.Module, preprocessing: Preprocessing) -> bytes:
    """A module from images `[batch, channels, height, width]` in [0, 1] to logits as an ONNX graph.

    Raises:
        ValueError: it cannot be expressed, or for one batch size only.
    """
    import onnx  # slow to import, and reading a student does without

    # A batch of one would be taken for a constant.
    example = torch.zeros(2, len(preprocessing.mean), preprocessing.height, preprocessing.width)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own deprecations; the graph is compared below
            program = torch.onnx.export(
                student,
                (example,),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=["images"],
                output_names=["logits"],
                opset_version=_OPSET,
                verbose=False,
            )
            assert program is not None
            model = program.model_proto
    except torch.onnx.OnnxExporterError as error:
        raise ValueError(
            f"the network cannot be written as an ONNX graph: {shortened(error)} Use operations that ONNX has."
        ) from error
    if model.graph.input[0].type.tensor_type.shape.dim[0].HasField("dim_value"):
        raise ValueError(
            f"{GRAPH} would take one batch size only: a layer turns it into a number. Write x.shape[0] or -1 there, "
            "not int(x.shape[0])."
        )
    _remove_notes(model)
    onnx.checker.check_model(model)
    return model.SerializeToString(deterministic=True)


def _remove_notes(message: Any) -> None:
    """Remove, at every depth, the exporter's notes on where the code was: paths of this machine."""
    for descriptor, value in message.ListFields():
        if descriptor.name in ("doc_string", "metadata_props"):
            message.ClearField(descriptor.name)
        elif descriptor.message_type is not None:
            for part in [value] if hasattr(value, "ListFields") else value:
                _remove_notes(part)


def load_graph(path: Path) -> Callable[[Tensor], Tensor]:
    """A function from images to logits that runs a graph in ONNX Runtime on the CPU.

    Raises:
        ValueError: ONNX Runtime cannot load it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ValueError(f"onnxruntime cannot run {path.name} ({shortened(error)}).") from error
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
