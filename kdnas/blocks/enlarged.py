"""Layers added behind a stage of a fixed network: the space of KDAS."""

from torch import Tensor, nn

from kdnas.blocks.basic import ConvNormAct


class AddedLayers(nn.Module):
    """A small graph behind a stage: node 0 is what comes in, and stays in what goes out.

    A node is an operation on the sum of its sources. Out goes node 0 plus every node that no other takes.

    Args:
        width: channels of every node.
        nodes: per added node, from 1 on, its operation and the numbers of its sources, such as `("conv_3x3", 0, 1)`.
            Operations are `identity`, `conv_3x3`, `conv_5x5`, `separable_3x3`, `separable_5x5`, `max_pool_3x3` and
            `average_pool_3x3`; joined by `+` they stand side by side, which holds the weights of each.

    Raises:
        ValueError: another operation, or a source that is not before its node.

    Reference: Kang, Mun, Han, Towards Oracle Knowledge Distillation with Neural Architecture Search, AAAI 2020,
    section 4 (the operations).
    """

    def __init__(self, width: int, nodes: tuple[tuple[str | int, ...], ...]) -> None:
        super().__init__()
        self.sources: list[tuple[int, ...]] = []
        for place, (_, *sources) in enumerate(nodes, 1):
            if not sources or not all(isinstance(s, int) and 0 <= s < place for s in sources):
                raise ValueError(f"node {place} takes nodes 0 to {place - 1}, at least one, got {sources}.")
            self.sources.append(tuple(int(s) for s in sources))
        taken = {source for sources in self.sources for source in sources}
        self.loose = [place for place in range(1, len(nodes) + 1) if place not in taken]
        names = [str(node[0]).split("+") for node in nodes]
        self.nodes = nn.ModuleList(nn.ModuleDict({name: _operation(name, width) for name in n}) for n in names)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, width, height, width]` to the same."""
        held = [x]
        for sources, node in zip(self.sources, self.nodes, strict=True):
            given = _sum([held[source] for source in sources])
            held.append(_sum([operation(given) for operation in node.children()]))
        return _sum([x, *(held[place] for place in self.loose)])


class Separable(nn.Sequential):
    """A depthwise convolution and a 1x1 convolution, with batch norm and ReLU behind."""

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
        "an operation is identity, conv_3x3, conv_5x5, separable_3x3, separable_5x5, max_pool_3x3 or "
        f"average_pool_3x3, got {name!r}."
    )
