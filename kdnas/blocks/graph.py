"""A part of a converted network: a small graph of ordinary operations, as a module."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdnas.blocks.basic import DropPath


class Graph(nn.Module):
    """Operations on numbered tensors: 0 is the input, `i + 1` the output of node `i`; the last one is the output.

    Args:
        nodes: `(operation, numbers of its inputs, *values)` each; empty for the identity. Operations and their values:
            `conv` (inputs, outputs, kernel, stride, padding, dilation, channels per group or 0 for one group, bias),
            `norm` (channels, eps, momentum), `linear` (inputs, outputs, bias), `max_pool` and `avg_pool` (kernel,
            stride, padding), `pool` (side, averaged), `dropout` and `drop_path` (rate); without values `relu`,
            `relu6`, `swish`, `hswish`, `gelu`, `sigmoid`, `hsigmoid`, `flatten`, `mean` (over positions), `add`, `mul`,
            `identity` and `cat` (of channels).
    """

    def __init__(self, nodes: tuple[tuple[Any, ...], ...]) -> None:
        super().__init__()
        self.nodes = nodes
        self.parts = nn.ModuleDict()
        for index, (operation, _, *values) in enumerate(nodes):
            module = self._module(operation, values)
            if module is not None:
                self.parts[str(index)] = module

    def forward(self, x: Tensor) -> Tensor:
        """The last node's output."""
        tensors = [x]
        for index, (operation, numbers, *values) in enumerate(self.nodes):
            first, *others = (tensors[number] for number in numbers)
            if str(index) in self.parts:
                tensors.append(self.parts[str(index)](first))
            elif operation == "add":
                tensors.append(first + others[0])
            elif operation == "mul":
                tensors.append(first * others[0])
            elif operation == "cat":
                tensors.append(torch.cat([first, *others], 1))
            elif operation == "flatten":
                tensors.append(first.flatten(1))
            elif operation == "mean":
                tensors.append(first.mean((2, 3)))
            elif operation == "identity":
                tensors.append(first)
            elif operation == "pool":
                tensors.append(F.adaptive_avg_pool2d(first, values[0]))
            else:
                raise ValueError(f"a graph has no operation {operation!r}.")
        return tensors[-1]

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
            "dropout": nn.Dropout,
            "drop_path": DropPath,
            "max_pool": nn.MaxPool2d,
            "avg_pool": nn.AvgPool2d,
        }
        if operation == "conv":
            inputs, outputs, kernel, stride, padding, dilation, group, bias = values
            groups = inputs // group if group else 1
            return nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, bool(bias))
        if operation == "norm":
            return nn.BatchNorm2d(values[0], eps=values[1], momentum=values[2])
        if operation == "linear":
            return nn.Linear(values[0], values[1], bool(values[2]))
        return plain[operation](*values) if operation in plain else None
