"""Blocks of NAS-Bench-Macro."""

from torch import Tensor, nn

from kdnas.blocks.basic import ConvNormAct, PoolLinear


class InvertedResidual(nn.Module):
    """1x1 convolution up, depthwise convolution, 1x1 convolution down; the input is added.

    Args:
        inputs: channels in.
        outputs: channels out.
        hidden: channels of the depthwise convolution.
        kernel: of the depthwise convolution.
        stride: of the depthwise convolution.
        activation: `relu` in NAS-Bench-Macro.
        shortcut: `fitting` adds the input where the shapes agree, `none` never, `identity` requires that they agree.

    Reference: Sandler et al., MobileNetV2: Inverted Residuals and Linear Bottlenecks, CVPR 2018, figure 4.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        hidden: int,
        kernel: int = 3,
        stride: int = 1,
        activation: str = "relu",
        shortcut: str = "fitting",
    ) -> None:
        super().__init__()
        fits = stride == 1 and inputs == outputs
        if shortcut not in ("fitting", "none", "identity") or (shortcut == "identity" and not fits):
            raise ValueError(
                "`shortcut` must be fitting or none, or, with stride 1 and equal widths, identity, got "
                f"{shortcut!r} with stride {stride}, {inputs} channels in and {outputs} out."
            )
        self.branch = nn.Sequential(
            ConvNormAct(inputs, hidden, 1, activation=activation),
            ConvNormAct(hidden, hidden, kernel, stride, hidden, activation),
            ConvNormAct(hidden, outputs, 1, activation="none"),
        )
        self.adds = fits and shortcut != "none"

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, inputs, height, width]` to `[batch, outputs, height / stride, width / stride]`."""
        return x + self.branch(x) if self.adds else self.branch(x)


class ConvPoolLinear(nn.Sequential):
    """A 1x1 convolution with batch norm and activation, then pooling and the classifier.

    Args:
        inputs: channels in.
        hidden: channels of the convolution.
        classes: number of classes.
        dropout: before the classifier.
        activation: after the convolution.
    """

    def __init__(self, inputs: int, hidden: int, classes: int, dropout: float = 0.0, activation: str = "relu") -> None:
        super().__init__(ConvNormAct(inputs, hidden, 1, activation=activation), PoolLinear(hidden, classes, dropout))
