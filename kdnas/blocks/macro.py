"""Blocks of NAS-Bench-Macro."""

from torch import Tensor, nn

from kdnas.blocks.basic import ConvNormAct, PoolLinear


class InvertedResidual(nn.Module):
    """Expand, depthwise convolution, project; the input is added when the shapes agree.

    Args:
        inputs: channels in.
        outputs: channels out.
        hidden: channels of the depthwise convolution.
        kernel: of the depthwise convolution.
        stride: of the depthwise convolution.
        activation: `relu` in NAS-Bench-Macro.

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
    ) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            ConvNormAct(inputs, hidden, 1, activation=activation),
            ConvNormAct(hidden, hidden, kernel, stride, hidden, activation),
            ConvNormAct(hidden, outputs, 1, activation="none"),
        )
        self.adds = stride == 1 and inputs == outputs

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
