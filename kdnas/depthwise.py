"""Gradients of depthwise kernels larger than their map, for which PyTorch has no fast code on a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdnas.compilation import forwards, is_compiling

# With fewer channels each sum is shorter than the call of it, and PyTorch's own code is as fast.
_CHANNELS = 16


def kernel_gradient(
    x: Tensor, gradient: Tensor, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
) -> Tensor:
    r"""The gradient of a depthwise convolution's kernel, one sum for each of its entries.

    $\partial L / \partial w_{cij} = \sum_{nyx} g_{ncyx} \, x_{nc,\,s_1 y + i - p_1,\,s_2 x + j - p_2}$ over those
    positions that lie in the map: entries of a large kernel meet few positions of a small map, or none. On a CPU
    PyTorch's own gradient takes up to 80 times as long where the kernel is larger than the map (960 channels of 2x2
    under 7x7, 32 images: 38 ms, this 0.5, the forward pass 0.2), and less where it is not. Differentiable.

    Args:
        x: the map, `[batch, channels, height, width]`.
        gradient: that of the output, `[batch, channels, rows, columns]`.
        kernel: height and width.
        stride: vertical and horizontal.
        padding: zeros above and below, on the left and on the right.

    Returns:
        `[channels, 1, *kernel]`.

    Example:
        >>> x, weight = torch.rand(2, 3, 2, 2), torch.rand(3, 1, 5, 5, requires_grad=True)
        >>> output = F.conv2d(x, weight, padding=2, groups=3)
        >>> (usual,) = torch.autograd.grad(output.sum(), weight)
        >>> torch.allclose(kernel_gradient(x, torch.ones_like(output), (5, 5), (1, 1), (2, 2)), usual)
        True
    """
    # Channels last, so that each sum runs over rows of channels side by side.
    x, gradient = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, gradient))
    none = x.new_zeros(x.shape[1])
    ranges = [
        [_positions(place - before, step, size, count) for place in range(extent)]
        for extent, before, step, size, count in zip(
            kernel, padding, stride, x.shape[2:], gradient.shape[2:], strict=True
        )
    ]
    sums = [
        (x[:, :, rows[0], columns[0]] * gradient[:, :, rows[1], columns[1]]).sum((0, 2, 3))
        if rows and columns
        else none
        for rows in ranges[0]
        for columns in ranges[1]
    ]
    return torch.stack(sums, 1).view(-1, 1, *kernel)


@contextmanager
def fast_depthwise(layer: nn.Module, x: Tensor) -> Iterator[None]:
    """Inside, depthwise convolutions of a layer compute their kernels' gradients by `kernel_gradient` where it pays.

    That is on a CPU, in single or double precision, where a kernel of at least 16 channels is larger than its map. The
    forward pass and all other gradients are PyTorch's own, bit for bit. Outside of a graph nothing changes, and the
    layer is left as it was.

    Args:
        layer: with any modules inside.
        x: its input.
    """
    is_plain = not is_compiling() and not torch.is_autocast_enabled("cpu")
    pays = is_plain and torch.is_grad_enabled() and x.device.type == "cpu"
    modules = layer.modules() if pays else ()
    with forwards({m: _forward for m in modules if type(m) is nn.Conv2d and _is_depthwise(m)}):
        yield


def _is_depthwise(module: nn.Conv2d) -> bool:
    return (
        module.in_channels == module.groups == module.out_channels >= _CHANNELS
        and module.dilation == (1, 1)
        and isinstance(module.padding, tuple)
        and module.padding_mode == "zeros"
        and "forward" not in vars(module)
    )


def _forward(module: nn.Conv2d, x: Tensor) -> Tensor:
    is_small = x.dim() == 4 and (x.shape[2] < module.kernel_size[0] or x.shape[3] < module.kernel_size[1])
    if not is_small or x.dtype not in (torch.float32, torch.float64):
        return nn.Conv2d.forward(module, x)
    return _Depthwise.apply(x, module.weight, module.bias, module.stride, module.padding)


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int], padding: tuple[int, int]
    ) -> Tensor:
        return F.conv2d(x, weight, bias, stride, padding, groups=len(weight))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, ctx.stride, ctx.padding = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (x, weight) = gradients, ctx.saved_tensors
        to_x, to_weight, to_bias, *_ = ctx.needs_input_grad
        return (
            _map_gradient(x, weight, gradient, ctx.stride, ctx.padding) if to_x else None,
            kernel_gradient(x, gradient, weight.shape[2:], ctx.stride, ctx.padding) if to_weight else None,
            gradient.sum((0, 2, 3)) if to_bias else None,
            None,
            None,
        )


def _map_gradient(
    x: Tensor, weight: Tensor, gradient: Tensor, stride: tuple[int, int], padding: tuple[int, int]
) -> Tensor:
    # `torch.nn.grad.conv2d_input` does not know the map's memory format.
    return torch.ops.aten.convolution_backward(
        gradient, x, weight, None, stride, padding, (1, 1), False, (0, 0), len(weight), (True, False, False)
    )[0]


def _positions(offset: int, step: int, size: int, count: int) -> tuple[slice, slice] | None:
    """Where an entry of the kernel meets the map: places in the map and in the output; None if nowhere.

    Args:
        offset: from the first place of the map to that which the entry meets for the first output.
        step: the stride.
        size: of the map.
        count: of outputs.
    """
    first, last = max(0, -(offset // step)), min(count - 1, (size - 1 - offset) // step)
    if first > last:
        return None
    start = step * first + offset
    return slice(start, step * last + offset + 1, step), slice(first, last + 1)
