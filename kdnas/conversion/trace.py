"""A trained network as a list of operations, by torch.fx."""

import contextlib
import io
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from kdnas.conversion.channels import Operation

_PLAIN: dict[type[nn.Module], str] = {
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


class TracedOperation(NamedTuple):
    """One operation of the source network.

    Attributes:
        operation: with the numbers of its input tensors, which are the numbers of the operations that compute them.
        module: path of the source's module, or the name of the function's node.
        shape: of its output, batch first.
    """

    operation: Operation
    module: str
    shape: tuple[int, ...]


def trace(module: nn.Module, image: tuple[int, int, int]) -> list[TracedOperation]:
    """The operations of a network in order of execution, from 1 on; number 0 stands for the images.

    Operations that change nothing are left out.

    Raises:
        ValueError: the network cannot be traced, has an unsupported operation, has several inputs or outputs, or does
            not return logits `[batch, classes]`.
    """
    graph = _graph(module, image)
    modules, numbers = dict(graph.named_modules()), dict[fx.Node, int]()
    traced = [TracedOperation(Operation("images", (), ()), "", (2, *image))]
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            if numbers:
                raise ValueError("the network must have one input tensor, it has several.")
            numbers[node] = 0
        elif node.op == "output":
            if not isinstance(node.args[0], fx.Node) or numbers[node.args[0]] != len(traced) - 1:
                raise ValueError("the network must return one tensor of logits, computed by its last operation.")
        else:
            settings = _operation(node, modules)
            inputs = [numbers[a] for a in _flat(node.args) if isinstance(a, fx.Node)]
            if settings is None:
                numbers[node] = inputs[0]
                continue
            operation = Operation(settings[0], tuple(inputs), tuple(settings[1]))
            path = str(node.target) if node.op == "call_module" else node.name
            numbers[node] = len(traced)
            traced.append(TracedOperation(operation, path, tuple(node.meta["tensor_meta"].shape)))
    if len(traced[-1].shape) != 2:
        raise ValueError("the network must return logits [batch, classes].")
    return traced


def _graph(module: nn.Module, image: tuple[int, int, int]) -> fx.GraphModule:
    """The traced module, each node with the shape of its output."""
    try:
        graph = fx.symbolic_trace(module)
        # ShapeProp prints what it raises.
        with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):
            ShapeProp(graph).propagate(torch.zeros(2, *image))
    except Exception as error:  # a tracer runs the source's own code, which may raise anything
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ValueError(
            f"the network cannot be traced for images of {image}: {reason}. Its forward must not depend on values, "
            "and the image size must suit it."
        ) from error
    return graph


def _flat(arguments: Sequence[Any]) -> list[Any]:
    return [b for a in arguments for b in (_flat(a) if isinstance(a, list | tuple) else [a])]


def _operation(node: fx.Node, modules: dict[str, nn.Module]) -> tuple[str, Sequence[Any]] | None:
    """The graph's operation and its settings; None for one that changes nothing."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        settings = _of_module(module)
        described = f"the module {node.target} ({type(module).__name__})"
    elif node.op == "call_function":
        settings = _of_function(node)
        described = f"the function {getattr(node.target, '__name__', node.target)} at {node.name}"
    else:
        settings = _of_method(node)
        described = f"the operation {node.target} at {node.name}"
    if settings is _UNKNOWN:
        raise ValueError(
            f"{described} cannot be converted. Supported are square convolutions, batch norm, linear layers, pooling "
            "by modules with their default rounding, sums and products of two tensors, concatenations of channels, "
            "dropout, stochastic depth and the usual activations."
        )
    return settings


_UNKNOWN: Any = object()


def _of_function(node: fx.Node) -> Any:
    target: Any = node.target
    if target in _FUNCTIONS and (
        _FUNCTIONS[target] not in ("add", "mul")
        or (all(isinstance(a, fx.Node) for a in node.args) and len(node.args) == 2 and not node.kwargs)
    ):
        return _FUNCTIONS[target], ()
    if _FUNCTIONS.get(target) == "add" and any(a == 0 for a in node.args if isinstance(a, int | float)):
        return None  # a block without shortcut adds 0
    if target is torch.flatten and _argument(node, 1, "start_dim", 0) == 1:
        return "flatten", ()
    if target is F.adaptive_avg_pool2d:
        side = _single(_argument(node, 1, "output_size", None))
        if side:
            return "pool", (side,)
    if target is torch.cat and _argument(node, 1, "dim", 0) == 1:
        return "cat", ()
    if target is F.dropout:
        return "dropout", (_argument(node, 1, "p", 0.5),)
    if getattr(target, "__name__", "") == "stochastic_depth":
        return "drop_path", (float(_argument(node, 1, "p", 0.0)),)
    return _UNKNOWN


def _of_method(node: fx.Node) -> Any:
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
    return _UNKNOWN


def _of_module(module: nn.Module) -> Any:
    if type(module) in _PLAIN:
        return _PLAIN[type(module)], ()
    if isinstance(module, nn.Identity):
        return None
    if isinstance(module, nn.GELU) and module.approximate == "none":
        return "gelu", ()
    if isinstance(module, nn.Dropout):
        return "dropout", (module.p,)
    if isinstance(module, nn.Flatten) and module.start_dim == 1:
        return "flatten", ()
    if isinstance(module, nn.AdaptiveAvgPool2d) and _single(module.output_size):
        return "pool", (_single(module.output_size),)
    if isinstance(module, nn.MaxPool2d | nn.AvgPool2d):
        sides = [_single(module.kernel_size), _single(module.stride), _single(module.padding)]
        if isinstance(module, nn.MaxPool2d):
            op, plain = "max_pool", _single(module.dilation) == 1 and not module.return_indices
        else:
            op, plain = "avg_pool", module.divisor_override is None and (module.count_include_pad or sides[2] == 0)
        if None not in sides and plain and not module.ceil_mode:
            return op, sides
    if type(module) is nn.BatchNorm2d and module.affine and module.track_running_stats and module.momentum is not None:
        return "norm", (module.num_features, module.eps, module.momentum)
    if type(module) is nn.Linear:
        return "linear", (module.in_features, module.out_features, int(module.bias is not None))
    if type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str):
        sides = [_single(s) for s in (module.kernel_size, module.stride, module.padding, module.dilation)]
        if None not in sides:
            group = module.in_channels // module.groups if module.groups > 1 else 0
            return "conv", (module.in_channels, module.out_channels, *sides, group, int(module.bias is not None))
    return _UNKNOWN


def _argument(node: fx.Node, index: int, name: str, default: Any) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def _single(value: Any) -> int | None:
    """The number, where a pair has the same number twice."""
    listed = _flat([value])
    return listed[0] if isinstance(listed[0], int) and len(set(listed)) == 1 else None
