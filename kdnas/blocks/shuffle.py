"""Blocks of the single-path one-shot space: ShuffleNetV2 units."""

import torch
from torch import Tensor, nn

from kdnas.blocks.basic import ConvNormAct, PoolLinear


class ShuffleUnit(nn.Module):
    """A convolutional branch and a shortcut branch, concatenated; with stride 1 each has half of the channels.

    With stride 1 the even channels pass unchanged and the odd ones go through the branch: taking every second channel
    is the shuffle. With stride 2 both branches read all channels.

    Args:
        inputs: channels in; with stride 1 as many as `outputs`.
        outputs: channels out.
        kernel: of the depthwise convolutions.
        stride: 1 or 2.
        depthwise: depthwise convolutions in the branch: 1 for a shuffle unit, 3 for the Xception-like one.

    Reference: Ma et al., ShuffleNet V2, ECCV 2018, figure 3; Guo et al., Single Path One-Shot Neural Architecture
    Search with Uniform Sampling, ECCV 2020, section 4 (the Xception-like unit).
    """

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, depthwise: int = 1) -> None:
        super().__init__()
        if depthwise not in (1, 3):
            raise ValueError(f"`depthwise` must be 1 or 3, got {depthwise}.")
        if stride == 1 and (inputs != outputs or inputs % 2):
            raise ValueError(
                f"a unit with stride 1 must have equal, even widths, got {inputs} channels in and {outputs} out. "
                "Change the width in the first unit of a stage, with stride 2."
            )
        if stride != 1 and outputs <= inputs:
            raise ValueError(
                f"a unit with stride {stride} must have more channels out than in, got {inputs} in and {outputs} out."
            )
        self.splits = stride == 1
        before = inputs // 2 if self.splits else inputs
        after, hidden = outputs - before, outputs // 2
        if depthwise == 1:
            parts = [
                ConvNormAct(before, hidden, 1),
                ConvNormAct(hidden, hidden, kernel, stride, hidden, "none"),
                ConvNormAct(hidden, after, 1),
            ]
        else:
            parts = []
            for width, wide, step in ((before, hidden, stride), (hidden, hidden, 1), (hidden, after, 1)):
                parts += [ConvNormAct(width, width, kernel, step, width, "none"), ConvNormAct(width, wide, 1)]
        self.branch = nn.Sequential(*parts)
        carried = [ConvNormAct(before, before, kernel, stride, before, "none"), ConvNormAct(before, before, 1)]
        self.carried = nn.Identity() if self.splits else nn.Sequential(*carried)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, inputs, height, width]` to `[batch, outputs, height / stride, width / stride]`."""
        carried, changed = (x[:, 0::2], x[:, 1::2]) if self.splits else (x, x)
        return torch.cat((self.carried(carried), self.branch(changed)), 1)


class ShuffleHead(nn.Sequential):
    """A 1x1 convolution, pooling, dropout and a classifier without bias."""

    def __init__(self, inputs: int, hidden: int, classes: int, dropout: float = 0.0) -> None:
        pooled = PoolLinear(hidden, classes, dropout)
        pooled.linear = nn.Linear(hidden, classes, bias=False)
        super().__init__(ConvNormAct(inputs, hidden, 1), pooled)
