"""A part of a converted network: a small graph of ordinary operations, as a module."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdnas.blocks.basic import DropPath


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each position, `[batch, channels]` or `[batch, channels, height, width]`."""

    def forward(self, input: Tensor) -> Tensor:
        """The shape of the input."""
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


class Scale(nn.Module):
    """Multiplies channels by numbers, one per channel or one for all.

    Args:
        count: how many numbers; 0 for a single one, whatever the channels.
        learned: whether they are parameters; otherwise they are a buffer.
    """

    start = 1.0
    weight: Tensor

    def __init__(self, count: int, learned: bool) -> None:
        super().__init__()
        values = torch.full((count,) if count else (), self.start)
        if learned:
            self.weight = nn.Parameter(values)
        else:
            self.register_buffer("weight", values)

    def forward(self, x: Tensor) -> Tensor:
        """The shape of the input."""
        return x * self.broadcast(x)

    def broadcast(self, x: Tensor) -> Tensor:
        """The numbers in a shape that broadcasts over `x`."""
        return self.weight.reshape(-1, *(1,) * (x.dim() - 2)) if self.weight.dim() else self.weight


class Shift(Scale):
    """Adds numbers to channels; arguments as for `Scale`."""

    start = 0.0

    def forward(self, x: Tensor) -> Tensor:
        """The shape of the input."""
        return x + self.broadcast(x)


class Graph(nn.Module):
    """Operations on numbered tensors: 0 is the input, `i + 1` the output of node `i`; the last one is the output.

    Of a head that reads outputs of earlier stages these are -1, -2 and so on.

    A map is `[batch, channels, height, width]`, a vector `[batch, channels]`.

    Args:
        nodes: `(operation, numbers of its inputs, *values)` each; empty for the identity. Operations and their values:

            - with weights: `conv` (inputs, outputs, kernel, stride, padding, dilation, channels per group or 0 for one
              group, bias, and where they differ across the width: kernel, padding, dilation), `linear` (inputs,
              outputs, bias), `norm` of a map and `vector_norm` (channels, eps, momentum; batch norms), `group_norm`
              (channels, channels per group, eps), `layer_norm` (channels, eps; over the channels of each position),
              `prelu` (channels, or 1 for one slope), `scale` and `shift` (channels, or 0 for one number; learned or
              not; a number per channel, multiplied or added);
            - on positions: `max_pool` (kernel, stride, padding, rounding up), `avg_pool` (the same, whether zeros of
              the padding count), `pool` and `highest` (side; adaptive average and maximum), `mean` (over positions,
              a vector), `pad` (left, right, top, bottom; by zeros), `upsample` (a whole factor; 0 for the nearest
              position, 1 for bilinear, 2 for bilinear with aligned corners), `resize` (to the size of a second map; the
              last number of `upsample`), `flatten` (a map to a vector),
              `unflatten` (a vector to a map of one position);
            - on channels: `cat`, `slice` (first, count), `shuffle` (groups);
            - of each number: `times` and `plus` (a number), `relu`, `relu6`, `swish`, `hswish`, `sigmoid`, `hsigmoid`,
              `tanh`, `mish`, `gelu`, `tanh_gelu`, `softplus`, `elu` (alpha), `leaky_relu` (slope), `clamp` (least,
              most), `dropout`, `channel_dropout` and `drop_path` (rate), `identity`;
            - of two tensors: `add`, `mul`.
    """

    def __init__(self, nodes: tuple[tuple[Any, ...], ...]) -> None:
        super().__init__()
        self.nodes = nodes
        self.parts = nn.ModuleDict()
        for index, (operation, _, *values) in enumerate(nodes):
            module = self._module(operation, values)
            if module is not None:
                self.parts[str(index)] = module

    def forward(self, *maps: Tensor) -> Tensor:
        """The last node's output; the input comes last, after the outputs of earlier stages."""
        *earlier, x = maps
        tensors = [x]
        for index, (operation, numbers, *values) in enumerate(self.nodes):
            inputs = [tensors[number] if number >= 0 else earlier[-1 - number] for number in numbers]
            if str(index) in self.parts:
                tensors.append(self.parts[str(index)](*inputs))
            else:
                tensors.append(self._compute(operation, inputs, values))
        return tensors[-1]

    @staticmethod
    def _compute(operation: str, inputs: list[Tensor], values: list[Any]) -> Tensor:
        first, *others = inputs
        if operation == "add":
            return first + others[0]
        if operation == "mul":
            return first * others[0]
        if operation == "times":
            return first * values[0]
        if operation == "plus":
            return first + values[0]
        if operation == "cat":
            return torch.cat(inputs, 1)
        if operation == "slice":
            return first[:, values[0] : values[0] + values[1]]
        if operation == "shuffle":
            return first.unflatten(1, (values[0], -1)).transpose(1, 2).flatten(1, 2)
        if operation == "flatten":
            return first.flatten(1)
        if operation == "unflatten":
            return first[:, :, None, None]
        if operation == "mean":
            return first.mean((2, 3))
        if operation == "identity":
            return first
        if operation == "pool":
            return F.adaptive_avg_pool2d(first, values[0])
        if operation == "highest":
            return F.adaptive_max_pool2d(first, values[0])
        if operation == "pad":
            return F.pad(first, values)
        if operation in ("upsample", "resize"):
            mode, aligned = (("nearest", None), ("bilinear", False), ("bilinear", True))[values[-1]]
            size, factor = ((others[0].shape[2], others[0].shape[3]), None) if others else (None, values[0])
            return F.interpolate(first, size, factor, mode, aligned)
        raise ValueError(f"a graph has no operation {operation!r}.")

    @staticmethod
    def _module(operation: str, values: list[Any]) -> nn.Module | None:
        plain = {
            "relu": nn.ReLU,
            "relu6": nn.ReLU6,
            "swish": nn.SiLU,
            "hswish": nn.Hardswish,
            "gelu": nn.GELU,
            "sigmoid": nn.Sigmoid,
            "hsigmoid": nn.Hardsigmoid,
            "tanh": nn.Tanh,
            "mish": nn.Mish,
            "softplus": nn.Softplus,
            "elu": nn.ELU,
            "leaky_relu": nn.LeakyReLU,
            "clamp": nn.Hardtanh,
            "prelu": nn.PReLU,
            "dropout": nn.Dropout,
            "channel_dropout": nn.Dropout2d,
            "drop_path": DropPath,
        }
        if operation == "conv":
            inputs, outputs, kernel, stride, padding, dilation, group, bias, *across = values
            groups = inputs // group if group else 1
            sizes = zip((kernel, padding, dilation), across or (kernel, padding, dilation), strict=True)
            kernels, paddings, dilations = (pair if pair[0] != pair[1] else pair[0] for pair in sizes)
            return nn.Conv2d(inputs, outputs, kernels, stride, paddings, dilations, groups, bool(bias))
        if operation in ("norm", "vector_norm"):
            kind = nn.BatchNorm2d if operation == "norm" else nn.BatchNorm1d
            return kind(values[0], eps=values[1], momentum=values[2])
        if operation == "group_norm":
            return nn.GroupNorm(values[0] // values[1], values[0], values[2])
        if operation == "layer_norm":
            return ChannelNorm(values[0], values[1])
        if operation in ("scale", "shift"):
            return (Scale if operation == "scale" else Shift)(values[0], bool(values[1]))
        if operation == "linear":
            return nn.Linear(values[0], values[1], bool(values[2]))
        if operation == "tanh_gelu":
            return nn.GELU("tanh")
        if operation == "max_pool":
            kernel, stride, padding, *ceil = values
            return nn.MaxPool2d(kernel, stride, padding, ceil_mode=any(ceil))
        if operation == "avg_pool":
            kernel, stride, padding, *more = values
            ceil, counted = more or (0, 1)
            return nn.AvgPool2d(kernel, stride, padding, bool(ceil), bool(counted))
        return plain[operation](*values) if operation in plain else None
