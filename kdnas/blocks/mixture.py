"""An ensemble as one network: its members in parallel, and the weighted sum of their logits."""

import torch
from torch import Tensor, nn

from kdnas.blocks.basic import Chain, resize


class Member(Chain):
    """A whole network from images to logits.

    Args:
        parts: its layers, in order.
        height: of the images it computes on.
        width: of the images it computes on.
        reads: as in `Chain`.
    """

    def __init__(self, parts: tuple[nn.Module, ...], height: int, width: int, reads: tuple[int, ...] = ()) -> None:
        super().__init__(parts, reads)
        self.height, self.width = height, width

    def forward(self, input: Tensor) -> Tensor:
        """`[batch, channels, height, width]` of any size to `[batch, classes]`."""
        return super().forward(resize(input, self.height, self.width))


class Members(nn.Module):
    """Several networks on the same images.

    Args:
        members: modules from images to logits.
    """

    def __init__(self, members: tuple[nn.Module, ...]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images: Tensor) -> Tensor:
        """`[batch, channels, height, width]` to every member's logits, `[batch, members, classes]`."""
        return torch.stack([member(images) for member in self.members], 1)


class Mixture(nn.Module):
    """The weighted sum over members, initially their mean.

    Args:
        count: number of members.

    Reference: Cortes et al., AdaNet: Adaptive Structural Learning of Artificial Neural Networks, ICML 2017, section 3.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.full((count,), 1 / count))

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, members, classes]` to `[batch, classes]`."""
        return (x * self.weights[:, None]).sum(1)
