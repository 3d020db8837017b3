"""Inverted residual blocks and the heads of the MobileNet family."""

import torch.nn.functional as F
from torch import Tensor, nn

from kdnas.blocks.basic import ConvNormAct, DropPath, PoolLinear, activation_named


class SqueezeExcite(nn.Module):
    """Scales every channel by a gate computed from the averages of all channels.

    Reference: Hu et al., Squeeze-and-Excitation Networks, CVPR 2018.

    Args:
        channels: channels in and out.
        squeezed: channels between the two 1x1 convolutions.
        activation: after the first of them.
        gate: after the second, `sigmoid` or `hardsigmoid`.
    """

    def __init__(self, channels: int, squeezed: int, activation: str = "relu", gate: str = "sigmoid") -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, squeezed, 1)
        self.activation = activation_named(activation)
        self.expand = nn.Conv2d(squeezed, channels, 1)
        self.gate = nn.Hardsigmoid() if gate == "hardsigmoid" else nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        scale = self.expand(self.activation(self.reduce(x.mean((2, 3), keepdim=True))))
        return x * self.gate(scale)


class MBConv(nn.Module):
    """Inverted residual: 1x1 up, depthwise, squeeze and excite, 1x1 down without activation, shortcut.

    Reference: Sandler et al., MobileNetV2, CVPR 2018; Howard et al., Searching for MobileNetV3, ICCV 2019. The
        projecting shortcut: Wang et al., AttentiveNAS, CVPR 2021.

    Args:
        inputs: channels in.
        outputs: channels out.
        expanded: channels between; equal to `inputs` leaves the first convolution out.
        kernel: odd size of the depthwise kernel.
        stride: of the depthwise convolution.
        activation: after the first two convolutions.
        squeezed: channels inside squeeze and excite; 0 leaves it out.
        squeeze_activation: inside squeeze and excite.
        gate: of squeeze and excite, `sigmoid` or `hardsigmoid`.
        shortcut: `none`; `identity`, which averages over windows of the stride where that is above 1; or `project`,
            the same followed by a 1x1 convolution.
        drop_path: rate at which the residual branch is dropped.
        zero_gamma: whether the last batch norm starts at scale zero, so that the block starts as its shortcut.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        expanded: int,
        kernel: int = 3,
        stride: int = 1,
        activation: str = "relu",
        squeezed: int = 0,
        squeeze_activation: str = "relu",
        gate: str = "sigmoid",
        shortcut: str = "none",
        drop_path: float = 0.0,
        zero_gamma: bool = False,
    ) -> None:
        super().__init__()
        self.stride, self.shortcut = stride, shortcut
        self.expand = nn.Identity() if expanded == inputs else ConvNormAct(inputs, expanded, 1, activation=activation)
        self.depthwise = ConvNormAct(expanded, expanded, kernel, stride, groups=expanded, activation=activation)
        self.squeeze = SqueezeExcite(expanded, squeezed, squeeze_activation, gate) if squeezed else nn.Identity()
        self.reduce = ConvNormAct(expanded, outputs, 1, activation="none")
        self.project = nn.Conv2d(inputs, outputs, 1, bias=False) if shortcut == "project" else nn.Identity()
        self.drop_path = DropPath(drop_path)
        if zero_gamma and shortcut != "none":
            norm = self.reduce[1]
            assert isinstance(norm, nn.BatchNorm2d)
            nn.init.zeros_(norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, inputs, h, w]` to `[batch, outputs, ceil(h / stride), ceil(w / stride)]`."""
        y = self.reduce(self.squeeze(self.depthwise(self.expand(x))))
        if self.shortcut == "none":
            return y
        if self.stride > 1:
            # ceil_mode: an odd side gives the size that the padded depthwise convolution gives.
            x = F.avg_pool2d(x, self.stride, ceil_mode=True)
        return self.project(x) + self.drop_path(y)


class ConvPoolLinear(nn.Module):
    """1x1 convolution, pooling, classifier: the head of MobileNetV2, EfficientNet and BigNAS."""

    def __init__(self, inputs: int, width: int, classes: int, activation: str = "relu", dropout: float = 0.0) -> None:
        super().__init__()
        self.widen = ConvNormAct(inputs, width, 1, activation=activation)
        self.classify = PoolLinear(width, classes, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, inputs, height, width]` to `[batch, classes]`."""
        return self.classify(self.widen(x))


class ConvPoolConvLinear(nn.Module):
    """1x1 convolution, pooling, 1x1 convolution without norm or bias, classifier: the head of MobileNetV3."""

    def __init__(
        self, inputs: int, hidden: int, width: int, classes: int, activation: str = "hswish", dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.widen = ConvNormAct(inputs, hidden, 1, activation=activation)
        self.mix = nn.Conv2d(hidden, width, 1, bias=False)
        self.activation = activation_named(activation)
        self.classify = PoolLinear(width, classes, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, inputs, height, width]` to `[batch, classes]`."""
        x = self.widen(x).mean((2, 3), keepdim=True)
        return self.classify(self.activation(self.mix(x)))
