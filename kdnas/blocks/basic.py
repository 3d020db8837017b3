"""Stems, heads and the plain convolution. A block imports torch only: its source goes into the exported student."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvNormAct(nn.Sequential):
    """Convolution, batch norm, activation; `none` leaves the activation out.

    Args:
        inputs: channels in.
        outputs: channels out.
        kernel: odd kernel size; padded to keep the resolution.
        stride: stride.
        groups: groups of the convolution.
        activation: `relu`, `swish`, `hswish` or `none`.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1, activation: str = "relu"
    ) -> None:
        layers = [
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(outputs),
        ]
        super().__init__(*layers, *([] if activation == "none" else [activation_named(activation)]))


def chained(parts: Iterable[nn.Module], reads: tuple[int, ...], x: Tensor) -> Tensor:
    """What the last of these modules returns, of which each takes the output of the one before.

    Args:
        parts: in order.
        reads: places of those whose outputs the last one takes before its own input.
        x: the input of the first.
    """
    *parts, last = parts
    outputs = []
    for place, part in enumerate(parts):
        x = part(x)
        if place in reads:
            outputs.append(x)
    return last(*outputs, x)


class Chain(nn.Sequential):
    """Modules one after the other; see `chained`.

    Args:
        parts: in order.
        reads: places of those whose outputs the last one takes before its own input.
    """

    def __init__(self, parts: tuple[nn.Module, ...], reads: tuple[int, ...] = ()) -> None:
        super().__init__(*parts)
        self.reads = reads

    def forward(self, input: Tensor) -> Tensor:
        """The output of the last."""
        return chained(self, self.reads, input)


class PoolLinear(nn.Module):
    """Global average pooling, dropout, linear classifier: the usual head."""

    def __init__(self, inputs: int, classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, channels, height, width]` to `[batch, classes]`."""
        return self.linear(self.dropout(x.mean((2, 3))))


class DropPath(nn.Module):
    """Drops a residual branch per sample, in training only.

    Reference: Huang et al., Deep Networks with Stochastic Depth, ECCV 2016.
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Zero for a dropped sample, scaled by 1/(1 - rate) otherwise."""
        if not self.training or self.rate == 0:
            return x
        keep = torch.rand(x.shape[0], *(1,) * (x.dim() - 1), device=x.device, dtype=x.dtype) >= self.rate
        return x * keep / (1 - self.rate)


class ClassifiedMap(nn.Identity):
    """The map that the classifier of every position reads; losses see its output, `[batch, channels, h, w]`."""


class AttentionMap(nn.Softmax):
    """The softmax of an attention layer; losses see its output, `[batch, heads, tokens, tokens]`."""


def activation_named(name: str) -> nn.Module:
    """The activation layer of that name."""
    activations = {"relu": nn.ReLU, "swish": nn.SiLU, "hswish": nn.Hardswish, "gelu": nn.GELU}
    if name not in activations:
        raise ValueError(f"`activation` must be one of {', '.join(sorted(activations))}, none, got {name!r}.")
    return activations[name]()


def enlarge(x: Tensor, images: Tensor) -> Tensor:
    """A map `[batch, channels, h, w]` in the height and width of the images, bilinear."""
    return F.interpolate(x, (images.shape[2], images.shape[3]), mode="bilinear", align_corners=False)


def split_logits(logits: Tensor, image_outputs: int) -> tuple[Tensor, Tensor]:
    """Logits of pixels, and those of the whole image `[batch, image_outputs]`: the means of the last maps."""
    return logits[:, :-image_outputs], logits[:, -image_outputs:].mean((2, 3))


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """Images `[batch, channels, h, w]` resized to `[batch, channels, height, width]`; of that size, unchanged."""
    if images.shape[2] == height and images.shape[3] == width:
        return images
    return F.interpolate(images, (height, width), mode="bicubic", align_corners=False, antialias=True)
