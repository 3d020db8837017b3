"""A network as an exported program, or a sentence that says why not."""

import contextlib
from collections.abc import Container
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode

from kdnas.network import hooked
from kdnas.plain import reason
from kdnas.runtimes import silenced

BATCH = 2


def answers_pixels(module: nn.Module, image: tuple[int, int, int]) -> bool:
    """Whether a network returns maps of logits; no where it fails, which `check_forward` tells."""
    if any(map(is_lazy, (*module.parameters(), *module.buffers()))):
        return False  # a forward pass would draw what has no values
    try:
        with torch.no_grad():
            logits = module(torch.zeros(BATCH, *image))
    except Exception:
        return False
    return isinstance(logits, Tensor) and logits.dim() == 4 and logits[0, 0].numel() > 1


def check_forward(module: nn.Module, image: tuple[int, int, int], *, dense: bool = False) -> None:
    """Refuse a network that does not map images of this size to logits, or has parts that cannot be traced.

    Args:
        module: the network.
        image: channels, height and width.
        dense: whether the logits are maps.
    """
    for name, part in module.named_modules():
        kind = _untraceable(part)
        if kind:
            raise ValueError(f"{f'{name} is {kind}, which' if name else kind} cannot be converted. {_FIXES[kind]}")
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(tensor) or tensor.is_meta:
            raise ValueError(f"{name} has no values yet. Run the network on images, or load its weights, before.")
        if (tensor.is_floating_point() and tensor.dtype != torch.float32) or tensor.device.type != "cpu":
            raise ValueError(
                f"{name} must be float32 on the CPU for a conversion, it is {tensor.dtype} on {tensor.device}. "
                "Call .float().cpu() on the network."
            )
    try:
        with torch.no_grad():
            logits = module(torch.zeros(BATCH, *image))
    except Exception as error:  # the source's own code may raise anything
        raise ValueError(
            f"the network does not take images of {' x '.join(map(str, image))} (channels, height, width): "
            f"{_place(error, module)}{_reason(error)}. The image size and the number of channels must be the network's."
        ) from error
    if not isinstance(logits, Tensor) or logits.dim() != (4 if dense else 2) or len(logits) != BATCH:
        what = f"a tensor {list(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        shape = f"[batch, classes{', height, width' * dense}]"
        raise ValueError(f"the network must return one tensor of logits {shape}, it returns {what}.")


_FIXES = {
    "a TorchScript module": "Convert the Python module that it was made from.",
    "a recurrent layer": "Use convolutions and linear layers in its place.",
    "a quantised layer": "Convert the network of floats that it was made from.",
}


def _untraceable(part: nn.Module) -> str:
    """What a module is, where it has no plain tensor operations; empty where it may be traced."""
    if isinstance(part, torch.jit.ScriptModule):
        return "a TorchScript module"
    if isinstance(part, nn.RNNBase):
        return "a recurrent layer"
    return "a quantised layer" if ".quantized" in type(part).__module__ else ""


def export(module: nn.Module, image: tuple[int, int, int]) -> torch.export.ExportedProgram:
    """The network's tensor operations for images of one size.

    Raises:
        ValueError: its forward depends on the values of the images, or `torch.export` cannot follow it.
    """
    paths = [m for m in module.modules() if drop_rate(m)]
    try:
        # Stochastic depth does nothing in evaluation mode; a dropout in its place is recorded.
        with silenced(), torch.no_grad(), hooked(paths, after=_mark_path):
            return torch.export.export(module, (torch.zeros(BATCH, *image),), strict=False)
    except OSError:  # a full disk, not the network
        raise
    except Exception as error:
        reason = _reason(error)
        if "data-dependent" in reason or type(error).__name__.startswith("GuardOnDataDependent"):
            reason = "its forward depends on the values of a tensor"
        elif "fake tensor" in reason:
            reason = "its forward changes its own weights, or keeps a tensor from one call to the next"
        raise ValueError(
            f"the network cannot be traced: {_place(error, module)}{reason}. Its forward must be the same operations "
            "for every image."
        ) from error


def decomposed(program: torch.export.ExportedProgram, known: Container[str]) -> torch.export.ExportedProgram:
    """The program without changes in place, its operations decomposed into simpler ones unless they are known."""
    table = torch.export.default_decompositions()
    for operation in list[Any](table):
        if operation._schema.name.partition("::")[2] in known:
            table.pop(operation)
    with silenced():
        return program.run_decompositions(table)


def drop_rate(module: nn.Module) -> float:
    """The rate of a module that drops whole paths, by the names that torchvision, timm and kdnas use; else 0."""
    if type(module).__name__ not in ("StochasticDepth", "DropPath") or getattr(module, "mode", "row") != "row":
        return 0.0
    rates = (getattr(module, name, None) for name in ("p", "drop_prob", "rate"))
    return float(next((rate for rate in rates if rate is not None), 0.0))


def _mark_path(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    del inputs
    return torch.dropout(output, drop_rate(module), False)


def _place(error: BaseException, module: nn.Module) -> str:
    """The innermost module in whose forward an error was raised, as the beginning of a sentence."""
    paths, place, trace = {id(m): name for name, m in module.named_modules()}, "", error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and paths.get(id(owner)):
            place = f"{paths[id(owner)]} ({type(owner).__name__}): "
        trace = trace.tb_next
    return place


def _reason(error: BaseException) -> str:
    return reason(error.__cause__ or error)


@final
class Windows:
    """The kernel sizes of a network's pooling, at its own image size and at another."""

    def __init__(self, module: nn.Module, image: tuple[int, int, int]) -> None:
        self.module, self.image = module, image
        self.pairs: list[tuple[Any, Any]] | None = None

    def follows(self, index: int) -> bool:
        """Whether the pooling of this index has another kernel for larger images."""
        if self.pairs is None:
            lists = []
            for factor in (1, 2):
                with torch.no_grad(), contextlib.suppress(Exception), _Kernels() as kernels:
                    self.module(torch.zeros(BATCH, self.image[0], *(side * factor for side in self.image[1:])))
                    lists.append(kernels.sizes)
            self.pairs = list(zip(*lists, strict=True)) if len({*map(len, lists)}) == 1 and len(lists) == 2 else []
        return index < len(self.pairs) and self.pairs[index][0] != self.pairs[index][1]


@final
class _Kernels(TorchDispatchMode):
    """Records the kernel size of every pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and record."""
        if func._schema.name.startswith(("aten::avg_pool2d", "aten::max_pool2d")):
            self.sizes.append(args[1])
        return func(*args, **(kwargs or {}))
