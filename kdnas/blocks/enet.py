"""Blocks of ENet."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdnas.blocks.basic import ClassifiedMap


class EnetStem(nn.Module):
    """A convolution of stride 2 beside the pooled image.

    Args:
        inputs: channels of the image.
        outputs: channels out, more than `inputs`: those of the image first.

    Reference: Paszke et al., ENet: A Deep Neural Network Architecture for Real-Time Semantic Segmentation, 2016,
        figure 2a.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs - inputs, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.activation = nn.PReLU(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, inputs, h, w]` to `[batch, outputs, ceil(h / 2), ceil(w / 2)]`."""
        # The image first: at any width its channels meet the same weights of what follows.
        return self.activation(self.norm(torch.cat([_pooled(x), self.conv(x)], 1)))


class EnetBlock(nn.Module):
    """A bottleneck beside an identity.

    Args:
        width: channels in and out.
        hidden: channels of the middle convolution.
        kernel: its odd size.
        dilation: its dilation.
        asymmetric: whether it is a column and a row of `kernel` instead of a square.
        dropout: rate of channels of the branch that are dropped in training.
        activation: `prelu` (encoder) or `relu` (decoder).

    Reference: as `EnetStem`, figure 2b.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        kernel: int = 3,
        dilation: int = 1,
        asymmetric: bool = False,
        dropout: float = 0.0,
        activation: str = "prelu",
    ) -> None:
        super().__init__()
        pad = dilation * (kernel // 2)
        middle = [nn.Conv2d(hidden, hidden, kernel, 1, pad, dilation, bias=False)]
        if asymmetric:
            middle = [
                nn.Conv2d(hidden, hidden, (kernel, 1), 1, (pad, 0), (dilation, 1), bias=False),
                nn.Conv2d(hidden, hidden, (1, kernel), 1, (0, pad), (1, dilation), bias=False),
            ]
        self.branch = _branch([nn.Conv2d(width, hidden, 1, bias=False)], middle, hidden, width, dropout, activation)
        self.activation = _activation(activation, width)

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        return self.activation(x + self.branch(x))


class EnetDown(nn.Module):
    """A bottleneck of stride 2 beside the pooled map, whose missing channels are zeros.

    Args:
        inputs: channels in.
        outputs: channels out, at least `inputs`.
        hidden: channels of the middle convolution.
        dropout: as in `EnetBlock`.

    Reference: as `EnetStem`, figure 2b.
    Differs: an odd map is padded by a row and a column of zeros below and to the right.
    """

    def __init__(self, inputs: int, outputs: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.more = outputs - inputs
        # Of an even map the convolution does not reach the padding.
        first = [nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(inputs, hidden, 2, 2, bias=False)]
        middle = [nn.Conv2d(hidden, hidden, 3, 1, 1, bias=False)]
        self.branch = _branch(first, middle, hidden, outputs, dropout, "prelu")
        self.activation = nn.PReLU(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, inputs, h, w]` to `[batch, outputs, ceil(h / 2), ceil(w / 2)]`."""
        return self.activation(F.pad(_pooled(x), (0, 0, 0, 0, 0, self.more)) + self.branch(x))


class EnetUp(nn.Module):
    """A bottleneck that doubles height and width, beside an enlarged 1x1 convolution.

    Args:
        inputs: channels of each map.
        outputs: channels out.
        hidden: channels of the transposed convolution.
        maps: how many maps are read, as if their channels were concatenated.

    Reference: as `EnetStem`, figure 2b.
    Differs: the 1x1 convolution is enlarged by repetition, not unpooled to where the encoder's maxima were.
    """

    def __init__(self, inputs: int, outputs: int, hidden: int, maps: int = 1) -> None:
        super().__init__()
        # A convolution of concatenated maps is the sum of one of each; so those of narrower maps are leading channels.
        self.project = nn.ModuleList(nn.Conv2d(inputs, outputs, 1, bias=False) for _ in range(maps))
        self.norm = nn.BatchNorm2d(outputs)
        self.reduce = nn.ModuleList(nn.Conv2d(inputs, hidden, 1, bias=False) for _ in range(maps))
        middle = [nn.ConvTranspose2d(hidden, hidden, 3, 2, 1, 1, bias=False)]
        self.branch = _branch([], middle, hidden, outputs, 0.0, "relu")

    def forward(self, *maps: Tensor) -> Tensor:
        """`[batch, inputs, h, w]` each, to `[batch, outputs, 2 h, 2 w]`."""
        main = self.norm(_sum(self.project, maps))
        return torch.relu(F.interpolate(main, scale_factor=2.0) + self.branch(_sum(self.reduce, maps)))


class EnetDecoder(nn.Module):
    """Three enlargements by two, of the outputs of the last two stages, to the classes of every position.

    Args:
        inputs: channels of each of the two maps.
        width: channels after the first enlargement.
        last: channels after the second.
        classes: number of classes.
        depth: number of bottlenecks after the first enlargement.
        dropout: as in `EnetBlock`.

    Reference: as `EnetStem`, table 1; the two maps: Hou et al., Learning Lightweight Lane Detection CNNs by Self
        Attention Distillation, ICCV 2019, section 3.2.
    """

    def __init__(self, inputs: int, width: int, last: int, classes: int, depth: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        inner, final = max(1, width // 4), max(1, last // 4)
        self.first = EnetUp(inputs, width, inner, maps=2)
        blocks = (EnetBlock(width, inner, dropout=dropout, activation="relu") for _ in range(depth))
        self.blocks = nn.Sequential(*blocks)
        self.second = EnetUp(width, last, final)
        self.refine = EnetBlock(last, final, dropout=dropout, activation="relu")
        self.classified = ClassifiedMap()
        self.classifier = nn.ConvTranspose2d(last, classes, 2, 2)

    def forward(self, third: Tensor, fourth: Tensor) -> Tensor:
        """Two maps `[batch, inputs, h, w]` to `[batch, classes, 8 h, 8 w]`."""
        x = self.blocks(self.first(third, fourth))
        return self.classifier(self.classified(self.refine(self.second(x))))


def _pooled(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 2, 2, ceil_mode=True)


def _sum(layers: nn.ModuleList, maps: tuple[Tensor, ...]) -> Tensor:
    total = layers[0](maps[0])
    for layer, x in zip(layers[1:], maps[1:], strict=True):
        total = total + layer(x)
    return total


def _activation(name: str, width: int) -> nn.Module:
    return nn.PReLU(width) if name == "prelu" else nn.ReLU()


def _branch(
    first: Sequence[nn.Module], middle: Sequence[nn.Module], hidden: int, outputs: int, dropout: float, activation: str
) -> nn.Sequential:
    """Two convolutions to `hidden` channels, each with batch norm and activation, then a 1x1 one with batch norm."""
    return nn.Sequential(
        *first,
        nn.BatchNorm2d(hidden),
        _activation(activation, hidden),
        *middle,
        nn.BatchNorm2d(hidden),
        _activation(activation, hidden),
        nn.Conv2d(hidden, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.Dropout2d(dropout),
    )
