"""Heads of networks that classify every position."""

import torch
from torch import Tensor, nn


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
        self.classifier = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, width, height, width]` to `[batch, classes, height, width]`."""
        return self.classifier(self.layers(x))


class LrAspp(nn.Module):
    """Features of 1x1 times an attention of channels from their mean over the image, then a decoder.

    Args:
        inputs: channels in.
        width: channels inside.
        classes: number of classes.
        depth: number of 3x3 convolutions before the classifier.

    Reference: Howard et al., Searching for MobileNetV3, ICCV 2019, section 6.4 (LR-ASPP).
    Differs: the mean is over the whole image; no branch from an earlier map, as the last one has its resolution; the
        decoder.
    """

    def __init__(self, inputs: int, width: int, classes: int, depth: int = 0) -> None:
        super().__init__()
        self.project = nn.Sequential(nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.scale = nn.Conv2d(inputs, width, 1)
        self.decoder = _Decoder(width, depth, classes)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, inputs, height, width]` to `[batch, classes, height, width]`."""
        scale = torch.sigmoid(self.scale(x.mean((2, 3), keepdim=True)))
        return self.decoder(self.project(x) * scale)


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
