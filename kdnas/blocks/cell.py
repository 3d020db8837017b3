"""Blocks of NAS-Bench-201: the cell, the residual block between stages, the head."""

import torch
from torch import Tensor, nn

from kdnas.blocks.basic import PoolLinear


class ReluConvNorm(nn.Sequential):
    """ReLU, convolution, batch norm: the order of this benchmark."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__(
            nn.ReLU(), nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs)
        )


class Cell(nn.Module):
    """A complete directed graph of four nodes, an operation on each edge, sums at the nodes.

    Args:
        width: channels of every node.
        operations: for each of the edges 0-1, 0-2, 1-2, 0-3, 1-3, 2-3 the names of its operations, joined by `+`:
            `none`, `skip_connect`, `avg_pool_3x3`, `nor_conv_1x1`, `nor_conv_3x3`. A cell of the benchmark has one
            operation per edge; in a supernet's bank, which needs the weights of all, an edge is their sum.

    Reference: Dong & Yang, NAS-Bench-201: Extending the Scope of Reproducible Neural Architecture Search,
    ICLR 2020, section 2.1 and figure 1.
    """

    def __init__(self, width: int, operations: tuple[str, ...]) -> None:
        super().__init__()
        if len(operations) != 6:
            raise ValueError(f"`operations` must have 6 entries, one per edge, got {len(operations)}: {operations}.")
        self.edges = nn.ModuleList(nn.ModuleDict(_edge(names, width)) for names in operations)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, width, height, width]` to the same."""
        nodes, edges = [x], iter(self.edges)
        for _ in range(3):
            inputs = []
            for node, edge in zip(tuple(nodes), edges, strict=False):
                inputs += [operation(node) for operation in edge.children()]
            nodes.append(sum(inputs[1:], inputs[0]) if inputs else torch.zeros_like(x))
        return nodes[-1]


class PooledResidual(nn.Module):
    """Two convolutions that halve the resolution; the shortcut pools, then projects without batch norm.

    Args:
        inputs: channels in.
        outputs: channels out.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(ReluConvNorm(inputs, outputs, 3, 2), ReluConvNorm(outputs, outputs, 3))
        # ceil_mode: an odd side gives the size that the padded convolutions give.
        self.shortcut = nn.Sequential(nn.AvgPool2d(2, 2, ceil_mode=True), nn.Conv2d(inputs, outputs, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, inputs, height, width]` to `[batch, outputs, height / 2, width / 2]`."""
        return self.shortcut(x) + self.branch(x)


class NormPoolLinear(nn.Sequential):
    """Batch norm, ReLU, pooling and the classifier."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__(nn.BatchNorm2d(inputs), nn.ReLU(), PoolLinear(inputs, classes))


def _edge(names: str, width: int) -> dict[str, nn.Module]:
    return {name: _operation(name, width) for name in names.split("+") if name != "none"}


def _operation(name: str, width: int) -> nn.Module:
    if name == "skip_connect":
        return nn.Identity()
    if name == "avg_pool_3x3":
        return nn.AvgPool2d(3, 1, 1, count_include_pad=False)
    if name in ("nor_conv_1x1", "nor_conv_3x3"):
        return ReluConvNorm(width, width, int(name[-1]))
    raise ValueError(
        f"`operations` must be of none, skip_connect, avg_pool_3x3, nor_conv_1x1, nor_conv_3x3, got {name!r}."
    )
