"""Exact parameters, multiply-accumulates and peak memory of a blueprint."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdnas.costs.budget import Cost
from kdnas.network import build
from kdnas.space import Blueprint, Layer
from kdnas.specs import Spec

Shapes = tuple[tuple[int, ...], ...]
"""Of the inputs of a layer; several for a head that reads several stages."""


def cost(blueprint: Blueprint) -> Cost:
    """Exact cost, summed over layers; each layer is measured once per input shape, on tensors without storage.

    Raises:
        ValueError: a layer cannot compute on the output of the one before it.
    """
    return sum_costs(layer_costs(blueprint).values())


def layer_costs(blueprint: Blueprint) -> dict[str, Cost]:
    """The cost of every position of the blueprint."""
    return {name: _measure(layer, shapes)[0] for name, layer, shapes in layer_inputs(blueprint)}


def feature_shapes(blueprint: Blueprint) -> dict[str, tuple[int, ...]]:
    """The output shape of every position for a batch of one."""
    return {name: _measure(layer, shapes)[1] for name, layer, shapes in layer_inputs(blueprint)}


def layer_inputs(blueprint: Blueprint) -> Iterator[tuple[str, Layer, Shapes]]:
    """Every position with its layer and the shapes of the layer's inputs for a batch of one."""
    shape: tuple[int, ...] = (1, *blueprint.image)
    outputs = []
    for name, layer, stage in blueprint.steps():
        shapes = layer.inputs(shape, outputs)
        yield name, layer, shapes
        _, shape = _measure(layer, shapes)
        if stage is not None:
            outputs.append(shape)


def peak_memory(blueprint: Blueprint) -> int:
    """The most bytes of activations alive at once, for one image in float32, in inference.

    Layer after layer as PyTorch runs them without gradients: the layer's input, its live intermediate tensors and its
    output, and the maps that the head reads later. Neither weights nor the workspace of convolution algorithms count; a
    runtime that fuses layers or computes in place needs less.
    """
    peaks, kept, latest = [], 0, 0  # bytes of maps that the head reads: older ones, and the input of this layer
    shapes = feature_shapes(blueprint)
    for (name, layer, stage), (_, _, inputs) in zip(blueprint.steps(), layer_inputs(blueprint), strict=True):
        peaks.append(_peak(layer, inputs) + (kept if name != "head" else 0))
        kept += latest
        latest = 4 * math.prod(shapes[name]) if stage in blueprint.head.reads else 0
    return max(peaks)


def sum_costs(costs: Iterable[Cost]) -> Cost:
    """The sum."""
    listed = list(costs)
    return Cost(sum(c.params for c in listed), sum(c.macs for c in listed))


@contextlib.contextmanager
def counted_macs() -> Iterator[Callable[[], int]]:
    """Counts the multiply-accumulates of what is computed inside; the function returns how many so far."""
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton, which is slow

    with FlopCounterMode(display=False) as counter:
        # The counter counts a multiplication and an addition apart.
        yield lambda: counter.get_total_flops() // 2


_Counts = tuple[Cost, tuple[int, ...]]
"""The cost of a layer, and the shape of its output."""


@functools.cache
def _measure(layer: Layer, shapes: Shapes) -> _Counts:
    if layer.make.make == _GRAPH:
        with contextlib.suppress(ValueError):  # the whole layer's has its name
            return _of_nodes(dict(layer.make.arguments)["nodes"], shapes)
    return _run(layer, shapes)


def _of_nodes(nodes: tuple[tuple[Any, ...], ...], shapes: Shapes) -> _Counts:
    """A graph's, node by node: a search of widths asks for so many graphs that making their modules takes long."""
    *earlier, first = shapes
    outputs, costs = [first], []
    for operation, numbers, *values in nodes:
        inputs = tuple(outputs[number] if number >= 0 else earlier[-1 - number] for number in numbers)
        counts = _by_hand(operation, tuple(values), inputs)
        if counts is None:
            reads = (*range(-1, -len(inputs), -1), 0)
            counts = _run(Layer(Spec(_GRAPH, (("nodes", ((operation, reads, *values),)),))), inputs)
        costs.append(counts[0])
        outputs.append(counts[1])
    return sum_costs(costs), outputs[-1]


def _by_hand(operation: str, values: tuple[Any, ...], shapes: Shapes) -> _Counts | None:
    """The counts of the usual operations of `Graph`; None for others, and where the inputs do not fit."""
    (batch, channels, *sides), *others = shapes
    if operation in _SAME and not others:
        return Cost(0, 0), shapes[0]
    if operation in ("add", "mul") and others == [shapes[0]]:
        return Cost(0, 0), shapes[0]
    if operation == "norm" and channels == values[0] and len(sides) == 2:
        return Cost(2 * channels, 0), shapes[0]
    if operation == "linear" and channels == values[0] and not sides:
        weights = channels * values[1]
        return Cost(weights + bool(values[2]) * values[1], batch * weights), (batch, values[1])
    if operation == "conv" and channels == values[0] and len(sides) == 2:
        _, outputs, kernel, stride, padding, dilation, group, bias, *across = values
        wide = across or (kernel, padding, dilation)
        places = [
            (side + 2 * pad - reach * (size - 1) - 1) // stride + 1
            for side, (size, pad, reach) in zip(sides, ((kernel, padding, dilation), wide), strict=True)
        ]
        is_whole = not group or channels % group == 0 == outputs % (channels // group)
        if min(places) > 0 and is_whole:
            weights = outputs * (group or channels) * kernel * wide[0]
            macs = batch * weights * math.prod(places)
            return Cost(weights + bool(bias) * outputs, macs), (batch, outputs, *places)
    return None


@functools.cache
def _run(layer: Layer, shapes: Shapes) -> _Counts:
    with torch.device("meta"):
        module = build(layer).eval()
        try:
            with counted_macs() as macs, _Alike(), torch.no_grad():
                output = module(*map(torch.empty, shapes))
        except RuntimeError as error:
            sizes = " and ".join(str(list(shape[1:])) for shape in shapes)
            raise ValueError(
                f"the layer {layer} must compute on inputs of shape {sizes}: {str(error).splitlines()[0]}. "
                "Use larger images, or fewer strides."
            ) from error
    return Cost(sum(p.numel() for p in module.parameters()), macs()), tuple(output.shape)


_GRAPH = "kdnas.blocks.graph:Graph"
_SAME = frozenset(
    "relu relu6 swish hswish gelu tanh_gelu sigmoid hsigmoid tanh mish softplus elu leaky_relu clamp dropout "
    "channel_dropout drop_path identity times plus".split()
)
_ALIKE = {
    getattr(torch.ops.aten, name).default
    for base in ("relu", "hardtanh", "hardswish", "hardsigmoid", "silu", "gelu", "sigmoid", "tanh", "leaky_relu", "elu")
    for name in (base, f"{base}_")
}


class _Alike(TorchDispatchMode):
    """Leaves out operations without a multiplication of matrices that return a tensor of the shape they take.

    Shapes and multiply-accumulates stay the same. On tensors without storage these operations run in Python, and take
    longer than all others.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, or return what it would compute on."""
        if func in _ALIKE and args[0].is_floating_point():
            return args[0]
        if func is torch.ops.aten.native_batch_norm.default and not args[5]:  # by its running statistics
            return args[0], args[3], args[4]
        return func(*args, **(kwargs or {}))


@functools.cache
def _peak(layer: Layer, shapes: Shapes) -> int:
    with torch.device("meta"):
        module = build(layer).eval()
        inputs = tuple(map(torch.empty, shapes))
    return peak_activations(lambda: module(*inputs), inputs, module)


def peak_activations(call: Callable[[], Any], inputs: Tensor | tuple[Tensor, ...], module: nn.Module) -> int:
    """The most bytes of the tensors that a call creates and of its inputs at once, without the module's own tensors."""
    with torch.no_grad(), _Alive(inputs, [*module.parameters(), *module.buffers()]) as alive:
        call()
    return alive.peak


class _Alive(TorchDispatchMode):
    """Counts the bytes of the storages that exist after each operation."""

    def __init__(self, inputs: Tensor | tuple[Tensor, ...], own: Iterable[Tensor]) -> None:
        super().__init__()
        self.own = {t.untyped_storage()._cdata for t in own}
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0
        self._count(inputs)

    def _count(self, outputs: Any) -> None:
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.own:
                    self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.storages = {key: (ref, size) for key, (ref, size) in self.storages.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.storages.values()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and count."""
        outputs = func(*args, **(kwargs or {}))
        self._count(outputs)
        return outputs
