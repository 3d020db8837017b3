"""Blocks of residual networks."""

from torch import Tensor, nn

from kdnas.blocks.basic import ConvNormAct, activation_named


class Residual(nn.Module):
    """The activation of the sum of a branch and a shortcut.

    Args:
        branch: ends in a batch norm.
        shortcut: an identity, a projection or `Zero`.
        activation: of the sum.
        zero_last: whether the branch's last batch norm starts at scale zero, so that the block starts as its shortcut.
    """

    def __init__(self, branch: nn.Sequential, shortcut: nn.Module, activation: str, zero_last: bool) -> None:
        super().__init__()
        self.branch, self.shortcut = branch, shortcut
        self.activation = activation_named(activation)
        if zero_last:
            last = [module for module in branch.modules() if isinstance(module, nn.BatchNorm2d)][-1]
            nn.init.zeros_(last.weight)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, inputs, height, width]` to `[batch, outputs, height / stride, width / stride]`."""
        return self.activation(self.branch(x) + self.shortcut(x))


class BasicBlock(Residual):
    """Two 3x3 convolutions and a shortcut: the block of ResNet-18, ResNet-34 and the CIFAR ResNets.

    Args:
        inputs: channels in.
        outputs: channels out.
        stride: of the first convolution.
        hidden: channels between the convolutions; 0 for as many as `outputs`.
        shortcut: `identity`, `projection` (a 1x1 convolution with batch norm), `none`, or `fitting`: identity where
            the shapes agree, else projection. An elastic space fixes it by position, independent of the widths.
        activation: `relu` in the paper.
        zero_last: as in `Residual`.

    Reference: He et al., Deep Residual Learning for Image Recognition, CVPR 2016, figure 2 and section 3.3 (B).
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int = 1,
        hidden: int = 0,
        shortcut: str = "fitting",
        activation: str = "relu",
        zero_last: bool = False,
    ) -> None:
        hidden = hidden or outputs
        branch = nn.Sequential(
            ConvNormAct(inputs, hidden, 3, stride, activation=activation),
            ConvNormAct(hidden, outputs, 3, activation="none"),
        )
        super().__init__(branch, _shortcut(inputs, outputs, stride, shortcut), activation, zero_last)


class Bottleneck(Residual):
    """1x1, 3x3 and 1x1 convolutions and a shortcut: the block of ResNet-50.

    Args:
        inputs: channels in.
        outputs: channels out.
        hidden: channels of the 3x3 convolution.
        stride: of the 3x3 convolution.
        shortcut: as in `BasicBlock`.
        activation: `relu` in the paper.
        zero_last: as in `Residual`.

    Reference: He et al., Deep Residual Learning for Image Recognition, CVPR 2016, figure 5.
    Differs: the stride is on the 3x3 convolution (ResNet-D's version 1.5), as in today's implementations.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        hidden: int,
        stride: int = 1,
        shortcut: str = "fitting",
        activation: str = "relu",
        zero_last: bool = False,
    ) -> None:
        branch = nn.Sequential(
            ConvNormAct(inputs, hidden, 1, activation=activation),
            ConvNormAct(hidden, hidden, 3, stride, activation=activation),
            ConvNormAct(hidden, outputs, 1, activation="none"),
        )
        super().__init__(branch, _shortcut(inputs, outputs, stride, shortcut), activation, zero_last)


class Zero(nn.Module):
    """No shortcut: zero, so that the block is its branch."""

    def forward(self, x: Tensor) -> float:
        """Zero."""
        return 0.0


def _shortcut(inputs: int, outputs: int, stride: int, shortcut: str) -> nn.Module:
    fits = stride == 1 and inputs == outputs
    if shortcut == "none":
        return Zero()
    if shortcut == "projection" or (shortcut == "fitting" and not fits):
        return ConvNormAct(inputs, outputs, 1, stride, activation="none")
    if shortcut not in ("identity", "fitting"):
        raise ValueError(f"`shortcut` must be one of identity, projection, none, fitting, got {shortcut!r}.")
    if not fits:
        raise ValueError(
            f"an identity shortcut requires stride 1 and equal widths, got stride {stride}, {inputs} channels in and "
            f"{outputs} out. Use fitting or projection."
        )
    return nn.Identity()
