"""Exact parameters, multiply-accumulates and peak memory of a blueprint."""

import contextlib
import functools
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


def cost(blueprint: Blueprint) -> Cost:
    """Exact cost, summed over layers; each layer is measured once per input shape, on tensors without storage.

    Raises:
        ValueError: a layer cannot compute on the output of the one before it.
    """
    return sum_costs(layer_costs(blueprint).values())


def layer_costs(blueprint: Blueprint) -> dict[str, Cost]:
    """The cost of every position of the blueprint."""
    return {name: _measure(layer, shape)[0] for name, layer, shape in layer_inputs(blueprint)}


def feature_shapes(blueprint: Blueprint) -> dict[str, tuple[int, ...]]:
    """The output shape of every position for a batch of one."""
    return {name: _measure(layer, shape)[1] for name, layer, shape in layer_inputs(blueprint)}


def layer_inputs(blueprint: Blueprint) -> Iterator[tuple[str, Layer, tuple[int, ...]]]:
    """Every position with its layer and the shape of the layer's input for a batch of one."""
    shape: tuple[int, ...] = (1, *blueprint.image)
    for name, layer in blueprint.named_layers():
        yield name, layer, shape
        _, shape = _measure(layer, shape)


def peak_memory(blueprint: Blueprint) -> int:
    """The most bytes of activations alive at once, for one image in float32, in inference.

    Layer after layer as PyTorch runs them without gradients: the layer's input, its live intermediate tensors and its
    output. Neither weights nor the workspace of convolution algorithms count; a runtime that fuses layers or computes
    in place needs less.
    """
    return max(_peak(layer, shape) for _, layer, shape in layer_inputs(blueprint))


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


@functools.cache
def _measure(layer: Layer, shape: tuple[int, ...]) -> tuple[Cost, tuple[int, ...]]:
    with torch.device("meta"):
        module = build(layer).eval()
        try:
            with counted_macs() as macs, _Alike(), torch.no_grad():
                output = module(torch.empty(shape))
        except RuntimeError as error:
            raise ValueError(
                f"the layer {layer} must compute on inputs of shape {list(shape[1:])}: {str(error).splitlines()[0]}. "
                "Use larger images, or fewer strides."
            ) from error
    return Cost(sum(p.numel() for p in module.parameters()), macs()), tuple(output.shape)


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
def _peak(layer: Layer, shape: tuple[int, ...]) -> int:
    with torch.device("meta"):
        module = build(layer).eval()
        image = torch.empty(shape)
    return peak_activations(lambda: module(image), image, module)


def peak_activations(call: Callable[[], Any], image: Tensor, module: nn.Module) -> int:
    """The most bytes of the tensors that a call creates and of its image at once, without the module's own tensors."""
    with torch.no_grad(), _Alive(image, [*module.parameters(), *module.buffers()]) as alive:
        call()
    return alive.peak


class _Alive(TorchDispatchMode):
    """Counts the bytes of the storages that exist after each operation."""

    def __init__(self, image: Tensor, own: Iterable[Tensor]) -> None:
        super().__init__()
        self.own = {t.untyped_storage()._cdata for t in own}
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0
        self._count(image)

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
