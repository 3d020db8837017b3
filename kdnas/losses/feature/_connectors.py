"""Learnable parts between a student's map and a teacher's that are more than a 1x1 convolution."""

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdnas.losses.stage_pairs import Adapter, StagePairs
from kdnas.numerics import as_map
from kdnas.outputs import Outputs


@final
class LeadingConvolution(nn.Conv2d):
    """A convolution that accepts inputs with fewer channels and then uses the leading columns of its weight."""

    def forward(self, input: Tensor) -> Tensor:
        """`[batch, up to in_channels, height, width]` to `[batch, out_channels, ...]`."""
        if input.shape[1] > self.in_channels:
            raise ValueError(
                f"this convolution was prepared for at most {self.in_channels} student channels, got "
                f"{input.shape[1]}. Prepare the loss with the outputs of the largest subnet."
            )
        return self._conv_forward(input, self.weight[:, : input.shape[1]], self.bias)


@final
class BatchNorm(nn.Module):
    """Normalisation of each channel by the batch's own mean and variance, with gain and bias.

    There are no running statistics: those of a supernet's subnets would mix, and a loss is used in training only.
    A channel with a single value becomes its bias.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, channels, height, width]` to the same shape."""
        if x.numel() == x.shape[1]:
            return (x - x) * self.weight[None, :, None, None] + self.bias[None, :, None, None]
        return F.batch_norm(x, None, None, self.weight, self.bias, training=True)


class Projection(nn.Sequential):
    """An `Adapter`, then `BatchNorm`."""

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__(Adapter(student_channels, teacher_channels), BatchNorm(teacher_channels))


def paired_maps(taps: StagePairs, student: Outputs, teacher: Outputs) -> list[tuple[Tensor, Tensor]]:
    """The prepared pairs as maps of their original sizes, from which learnable parts are built.

    Raises:
        ValueError: a feature is neither a map nor tokens; the message has both shapes.
    """
    maps = []
    for i, j in taps.pairs:
        s, t = student.maps[i], teacher.maps[j]
        try:
            maps.append((as_map(s), as_map(t)))
        except ValueError as error:
            raise ValueError(
                f"student stage {i} {tuple(s.shape)} and teacher stage {j} {tuple(t.shape)} cannot be matched: {error}"
            ) from error
    return maps


def part(parts: nn.ModuleList, index: int) -> nn.Module:
    """The learnable part of a pair.

    Raises:
        ValueError: the loss was not prepared.
    """
    if index >= len(parts):
        raise ValueError(
            "the learnable parts of this loss are not built. Call loss.prepare(student, teacher) with the outputs of "
            "the largest student before the optimiser is created."
        )
    return parts[index]
