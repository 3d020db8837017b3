"""A module in the forms that other programs run: torch.export, ONNX Runtime, ExecuTorch; each is imported when used."""

import contextlib
import importlib.util
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_OPSET = 20
_EXTRAS = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "executorch": ("executorch",),
    "timm": ("timm",),
    "hub": ("huggingface_hub",),
}
"""The extras of pyproject.toml that are needed here, with the modules that each brings."""

Function = Callable[..., Tensor]


def lacking(extra: str) -> str:
    """A sentence on the modules of an extra that are not installed; empty where all are.

    Example:
        >>> lacking("onnx")
        ''
    """
    absent = [module for module in _EXTRAS[extra] if not _is_installed(module)]
    if not absent:
        return ""
    verb = "are" if len(absent) > 1 else "is"
    return f"{' and '.join(absent)} {verb} not installed. Run: pip install 'kdnas[{extra}]'"


def require(extra: str, purpose: str) -> None:
    """Raise a ValueError where a module of an extra is not installed.

    Args:
        extra: of pyproject.toml.
        purpose: what needs it, such as `student.onnx`.
    """
    if reason := lacking(extra):
        raise ValueError(f"{purpose} needs the extra {extra!r}: {reason}")


def library(module: str, name: str, extra: str) -> Any:
    """A module of an extra.

    Args:
        module: its import path.
        name: of its package.
        extra: of pyproject.toml.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(f"{name} is not installed. Run: pip install 'kdnas[{extra}]'") from None


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def _dynamic(any_batch: bool, any_size: bool, *, names: bool) -> Any:
    """Which axes of an input are free.

    Height and width with names must be free of every bound, else the smallest may be left out: a map of one position.
    """
    dim: Any = torch.export.Dim
    axes = {0: dim("batch")} if any_batch else {}
    if any_size:
        axes |= {2: dim("height"), 3: dim("width")} if names else {2: dim.DYNAMIC, 3: dim.DYNAMIC}
    return (axes,) if axes else None


def exported(
    module: nn.Module, example: Tensor | tuple[Tensor, ...], *, any_batch: bool, any_size: bool = False
) -> torch.export.ExportedProgram:
    """The module as a program of `torch.export`, without notes on where its code was.

    Args:
        module: from tensors to one tensor.
        example: its input or inputs; of at least two images where the batch size is free, as one would be taken for a
            constant. Only of one input is anything free.
        any_batch: whether the batch size is free.
        any_size: whether height and width are.
    """
    shapes = _dynamic(any_batch, any_size, names=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        program = torch.export.export(module, _arguments(example), dynamic_shapes=shapes)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program


def _arguments(example: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (example,) if isinstance(example, Tensor) else example


def pt2_bytes(module: nn.Module, example: Tensor, *, any_size: bool = False) -> bytes:
    """The content of a `.pt2` file for any batch size, and perhaps any height and width."""
    buffer = io.BytesIO()
    torch.export.save(exported(module, example, any_batch=True, any_size=any_size), buffer)
    return buffer.getvalue()


def pt2_function(path: Path) -> Function:
    """The program of a `.pt2` file."""
    module = torch.export.load(path).module()
    return lambda images: joined(module(images))


def onnx_bytes(
    module: nn.Module,
    example: Tensor | tuple[Tensor, ...],
    *,
    any_batch: bool = True,
    any_size: bool = False,
    names: tuple[str, ...] = ("images", "logits"),
    metadata: Mapping[str, str] = {},
) -> bytes:
    """The content of an ONNX file.

    Args:
        module: from tensors to one tensor.
        example: its input or inputs; of at least two images where the batch size is free, which needs one input.
        any_batch: whether the batch size is free.
        any_size: whether height and width are.
        names: of the first input and of each output.
        metadata: texts by name, stored in the file.

    Raises:
        ValueError: the batch size is to be free, and the module turns it into a number.
        torch.onnx.OnnxExporterError: an operation that ONNX does not have.
    """
    import onnx  # slow to import, and all else does without

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations; who writes a graph compares it
        program = torch.onnx.export(
            module,
            _arguments(example),
            dynamo=True,
            dynamic_shapes=_dynamic(any_batch, any_size, names=True),
            input_names=[names[0]],
            output_names=list(names[1:]),
            opset_version=_OPSET,
            verbose=False,
        )
        assert program is not None
        model = program.model_proto
    if any_batch and model.graph.input[0].type.tensor_type.shape.dim[0].HasField("dim_value"):
        raise ValueError(
            "the graph would take one batch size only: a layer turns it into a number. Write x.shape[0] or -1 there, "
            "not int(x.shape[0])."
        )
    _remove_notes(model)
    for name, text in metadata.items():
        model.metadata_props.add(key=name, value=text)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString(deterministic=True))


def _remove_notes(message: Any) -> None:
    """Remove, at every depth, the exporter's notes on where the code was: paths of this machine."""
    for descriptor, value in message.ListFields():
        if descriptor.name in ("doc_string", "metadata_props"):
            message.ClearField(descriptor.name)
        elif descriptor.message_type is not None:
            for part in [value] if hasattr(value, "ListFields") else value:
                _remove_notes(part)


def joined(outputs: Any) -> Tensor:
    """A network's outputs as one tensor: logits, or after those of pixels maps of what it says of the whole image."""
    if isinstance(outputs, Tensor):
        return outputs
    logits, *images = outputs
    maps = [each[:, :, None, None].expand(-1, -1, *logits.shape[2:]) for each in images]
    return torch.cat([logits, *maps], 1) if maps else logits


def onnx_function(graph: bytes | Path, threads: int) -> Function:
    """A graph in ONNX Runtime on the CPU, as a function of its inputs; see `joined`."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def call(*inputs: Tensor) -> Tensor:
        feeds = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        return joined(map(torch.from_numpy, session.run(None, feeds)))

    return call


def input_size(graph: bytes) -> list[int]:
    """Height and width that a graph takes; empty for any."""
    import onnx

    shape = onnx.load_from_string(graph).graph.input[0].type.tensor_type.shape
    return [axis.dim_value for axis in shape.dim[2:] if axis.HasField("dim_value")]


def quantized(graph: bytes, batches: Iterable[np.ndarray]) -> bytes:
    """A graph in 8-bit integers, by ONNX Runtime's static quantisation.

    Weights are symmetric per output channel, activations asymmetric per tensor, their ranges those that the batches
    reach.

    Args:
        graph: of one input.
        batches: what it is calibrated on.
    """
    import onnx
    from onnxruntime import quantization

    name = onnx.load_from_string(graph).graph.input[0].name
    inputs = iter([{name: batch} for batch in batches])

    class Reader(quantization.CalibrationDataReader):
        def get_next(self) -> Any:
            return next(inputs, None)

    with tempfile.TemporaryDirectory() as folder, silenced():
        # The library writes beside the graph that it reads.
        source, draft = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        source.write_bytes(graph)
        quantization.quantize_static(
            str(source),
            str(draft),
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            per_channel=True,
        )
        return draft.read_bytes()


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Inside, libraries print, log and warn of nothing; what is wrong is in their errors."""
    level, nowhere = logging.root.manager.disable, io.StringIO()
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def executorch_bytes(module: nn.Module, example: Tensor | tuple[Tensor, ...]) -> bytes:
    """The content of a `.pte` file for the example's shapes, lowered to XNNPACK where that has the operation."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner  # pyrefly: ignore
    from executorch.exir import to_edge_transform_and_lower  # pyrefly: ignore[missing-import]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = exported(module, example, any_batch=False)
        return bytes(to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch().buffer)


def executorch_function(program: bytes | Path, threads: int) -> Function:
    """The method `forward` of a `.pte` file in ExecuTorch; the number of threads is that of the whole process."""
    from executorch.extension.pybindings import portable_lib  # pyrefly: ignore[missing-import]
    from executorch.runtime import Runtime  # pyrefly: ignore[missing-import]

    portable_lib._unsafe_reset_threadpool(threads)
    content = program.read_bytes() if isinstance(program, Path) else program
    loaded = Runtime.get().load_program(content)
    method = loaded.load_method("forward")

    def call(*inputs: Tensor, keep: Any = (content, loaded)) -> Tensor:  # the method refers to both without owning them
        outputs: Any = method.execute([x.contiguous() for x in inputs])
        return joined([output.clone() for output in outputs])

    return call
