"""Layers added after a stage of a fixed network: the space of KDAS."""

from torch import Tensor, nn

from kdnas.blocks.basic import ConvNormAct


class AddedLayers(nn.Module):
    """A small graph after a stage, with the stage's output as node 0.

    A node is an operation on the sum of its sources. The output is node 0 plus every node that no other node reads.

    Args:
        width: channels of every node.
        nodes: per added node, from 1 on, its operation and the numbers of its sources, such as `("conv_3x3", 0, 1)`.
            Operations are `identity`, `conv_3x3`, `conv_5x5`, `separable_3x3`, `separable_5x5`, `max_pool_3x3` and
            `average_pool_3x3`; joined by `+` they are summed, as in a supernet's bank.

    Raises:
        ValueError: another operation, or a source that does not precede its node.

    Reference: Kang, Mun, Han, Towards Oracle Knowledge Distillation with Neural Architecture Search, AAAI 2020,
    section 4 (the operations).
    """

    def __init__(self, width: int, nodes: tuple[tuple[str | int, ...], ...]) -> None:
        super().__init__()
        self.sources: list[tuple[int, ...]] = []
        for number, (_, *sources) in enumerate(nodes, 1):
            if not sources or not all(isinstance(s, int) and 0 <= s < number for s in sources):
                raise ValueError(f"the sources of node {number} must be from 0 to {number - 1}, got {sources}.")
            self.sources.append(tuple(int(s) for s in sources))
        read = {source for sources in self.sources for source in sources}
        self.unread = [number for number in range(1, len(nodes) + 1) if number not in read]
        names = [str(node[0]).split("+") for node in nodes]
        self.nodes = nn.ModuleList(nn.ModuleDict({name: _operation(name, width) for name in n}) for n in names)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, width, height, width]` to the same."""
        outputs = [x]
        for sources, node in zip(self.sources, self.nodes, strict=True):
            y = _sum([outputs[source] for source in sources])
            outputs.append(_sum([operation(y) for operation in node.children()]))
        return _sum([x, *(outputs[number] for number in self.unread)])


class Separable(nn.Sequential):
    """A depthwise convolution, then a 1x1 convolution with batch norm and ReLU."""

    def __init__(self, width: int, kernel: int) -> None:
        depthwise = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width, bias=False)
        super().__init__(depthwise, ConvNormAct(width, width, 1))


def _sum(tensors: list[Tensor]) -> Tensor:
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total


def _operation(name: str, width: int) -> nn.Module:
    if name == "identity":
        return nn.Identity()
    if name in ("conv_3x3", "conv_5x5"):
        return ConvNormAct(width, width, int(name[-1]))
    if name in ("separable_3x3", "separable_5x5"):
        return Separable(width, int(name[-1]))
    if name == "max_pool_3x3":
        return nn.MaxPool2d(3, 1, 1)
    if name == "average_pool_3x3":
        return nn.AvgPool2d(3, 1, 1, count_include_pad=False)
    raise ValueError(
        "an operation must be one of identity, conv_3x3, conv_5x5, separable_3x3, separable_5x5, max_pool_3x3, "
        f"average_pool_3x3, got {name!r}."
    )
