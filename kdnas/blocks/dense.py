"""Heads of networks that classify every position."""

import torch
from torch import Tensor, nn

from kdnas.blocks.basic import ClassifiedMap, enlarge


class _Decoder(nn.Module):
    """Convolutions of 3x3 and a classifier of every position."""

    def __init__(self, width: int, depth: int, classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
                for _ in range(depth)
            )
        )
        self.classified = ClassifiedMap()
        self.classifier = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, width, height, width]` to `[batch, classes, height, width]`."""
        return self.classifier(self.classified(self.layers(x)))


class LrAspp(nn.Module):
    r"""The classes of a deep map, weighted channel by channel, and those of an earlier, finer one.

    With $x$ the deep map, $\bar x$ its mean over the image and $l$ the earlier map,
    $z = \mathrm{up}(D(\mathrm{ReLU}(\mathrm{BN}(W x)) \cdot \sigma(V \bar x))) + U l$: 1x1 convolutions $U, V, W$,
    the decoder $D$, and $\mathrm{up}$ bilinear to the size of $l$. Without an earlier map, $z$ is $D(\ldots)$.

    Args:
        inputs: channels of the deep map.
        width: channels inside.
        classes: number of classes.
        depth: number of 3x3 convolutions before the classifier.
        low: channels of the earlier map; 0 for none.

    Reference: Howard et al., Searching for MobileNetV3, ICCV 2019, section 6.4 (LR-ASPP).
    Differs: the mean is over the whole image; the decoder; its map is classified before it is enlarged, which gives the
        same numbers for less.
    """

    def __init__(self, inputs: int, width: int, classes: int, depth: int = 0, low: int = 0) -> None:
        super().__init__()
        self.low = nn.Conv2d(low, classes, 1, bias=False) if low else None
        self.project = nn.Sequential(nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.scale = nn.Conv2d(inputs, width, 1)
        self.decoder = _Decoder(width, depth, classes)

    def forward(self, *maps: Tensor) -> Tensor:
        """The earlier map, `[batch, low, H, W]`, if any, and the deep one, `[batch, inputs, h, w]`.

        Returns:
            `[batch, classes, H, W]`; `[batch, classes, h, w]` without an earlier map.
        """
        *earlier, x = maps
        scale = torch.sigmoid(self.scale(x.mean((2, 3), keepdim=True)))
        logits = self.decoder(self.project(x) * scale)
        return enlarge(logits, earlier[0]) + self.low(earlier[0]) if self.low is not None else logits


class Aspp(nn.Module):
    """The sum of a 1x1 convolution, of 3x3 ones of several dilations and of the image's mean, then a decoder.

    Args:
        inputs: channels in.
        width: channels inside.
        classes: number of classes.
        depth: number of 3x3 convolutions before the classifier.
        dilations: of the 3x3 convolutions.

    Reference: Chen et al., Rethinking Atrous Convolution for Semantic Image Segmentation, 2017, section 3.3.
    Differs: the branches are summed, not concatenated, so that narrower ones share weights; smaller dilations for maps
        of small images; no batch norm in the branch of the mean.
    """

    def __init__(
        self, inputs: int, width: int, classes: int, depth: int = 0, dilations: tuple[int, ...] = (2, 4, 6)
    ) -> None:
        super().__init__()
        self.point = nn.Conv2d(inputs, width, 1, bias=False)
        self.wide = nn.ModuleList(
            nn.Conv2d(inputs, width, 3, padding=dilation, dilation=dilation, bias=False) for dilation in dilations
        )
        self.mean = nn.Conv2d(inputs, width, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.decoder = _Decoder(width, depth, classes)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, inputs, height, width]` to `[batch, classes, height, width]`."""
        total = self.point(x) + self.mean(x.mean((2, 3), keepdim=True))
        for layer in self.wide:
            total = total + layer(x)
        return self.decoder(torch.relu(self.norm(total)))
