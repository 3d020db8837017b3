"""Channel-Bench-Macro: the width of every layer of a fixed network."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, final

from kdnas.architecture import Architecture, Choice
from kdnas.space import Layer, Range, Ratios, SearchSpace, Size, Sizes, layer

_BLOCKS = ("basic", "inverted")


@final
@dataclass(frozen=True, kw_only=True)
class ChannelStage:
    """Blocks on one skip path.

    Attributes:
        hidden: the full width inside each block.
        width: the full width of the skip path, or 0 for the path of the stage before; a new path begins with a block
            without shortcut.
        stride: of the first block.
    """

    hidden: Sizes
    width: Annotated[int, Range(least=0)] = 0
    stride: Size = 1


@final
@dataclass(frozen=True, kw_only=True)
class Channels(SearchSpace):
    """Residual or inverted residual blocks, each width chosen on its own.

    Each block's inner width is a choice; the width of a skip path is one choice of all blocks on it, at the path's
    first block. So shortcuts are identities whatever the widths are. Weights are shared by leading channels. A code
    has digit i for the i-th of `ratios`, counted from 1, in the order of execution.

    Attributes:
        block: `basic` (two 3x3 convolutions) or `inverted` (depthwise between two 1x1 convolutions).
        stem_width: full width of the stem.
        stem_stride: stride of the stem.
        stages: the blocks.
        head_width: full width of a last 1x1 convolution, or 0 for none.
        ratios: factors of a full width, ascending.

    Reference: Su et al., BCNet: Searching for Network Width with Bilaterally Coupled Network, CVPR 2021;
    released model and tables.
    Differs: the released README's table lists 16x16 feature maps after the stride of the third block; its costs, which
    are those of this space, are of 8x8 ones.
    """

    block: str = "basic"
    stem_width: Size = 256
    stem_stride: Size = 2
    stages: tuple[ChannelStage, ...] = (
        ChannelStage(hidden=(256, 256)),
        ChannelStage(hidden=(512, 512, 512), width=512, stride=2),
    )
    head_width: Annotated[int, Range(least=0)] = 0
    ratios: Ratios = (0.25, 0.5, 0.75, 1.0)
    digits: ClassVar[str] = "123456789"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block not in _BLOCKS:
            raise ValueError(f"`block` must be one of {', '.join(_BLOCKS)}, got {self.block!r}.")
        if len(self.ratios) > len(self.digits):
            raise ValueError(f"`ratios` must be at most {len(self.digits)} numbers, got {len(self.ratios)}.")
        if not self.stages:
            raise ValueError("`stages` must not be empty.")
        for index, stage in enumerate(self.stages):
            if stage.stride != 1 and not stage.width:
                raise ValueError(
                    f"`stages[{index}].width` must be set: a stride of {stage.stride} begins a new skip path."
                )

    @property
    def structure(self) -> tuple[Choice, ...]:
        """Widths in the order of execution."""
        choices = [Choice("stem.width", self._widths(self.stem_width))]
        for index, stage in enumerate(self.stages):
            for place, full in enumerate(stage.hidden):
                choices.append(Choice(f"stage{index}.block{place}.hidden", self._widths(full)))
                if place == 0 and stage.width:
                    choices.append(Choice(f"stage{index}.width", self._widths(stage.width)))
        if self.head_width:
            choices.append(Choice("head.width", self._widths(self.head_width)))
        return tuple(choices)

    def layers(self, architecture: Architecture) -> tuple[Layer, tuple[tuple[Layer, ...], ...], Layer]:
        """Stem, stages and head."""
        width = architecture.integer("stem.width")
        stem = layer(
            "kdnas.blocks.basic:ConvNormAct",
            inputs=self.image_channels,
            outputs=width,
            kernel=3,
            stride=self.stem_stride,
        )
        stages = []
        for index, stage in enumerate(self.stages):
            blocks = []
            for place in range(len(stage.hidden)):
                hidden = architecture.integer(f"stage{index}.block{place}.hidden")
                begins = place == 0 and stage.width > 0
                outputs = architecture.integer(f"stage{index}.width") if begins else width
                shapes = {
                    "inputs": width,
                    "outputs": outputs,
                    "hidden": hidden,
                    "stride": stage.stride if place == 0 else 1,
                    "shortcut": "none" if begins else "identity",
                }
                make = "macro:InvertedResidual" if self.block == "inverted" else "resnet:BasicBlock"
                blocks.append(layer(f"kdnas.blocks.{make}", **shapes))
                width = outputs
            stages.append(tuple(blocks))
        if self.head_width:
            head = layer(
                "kdnas.blocks.macro:ConvPoolLinear",
                inputs=width,
                hidden=architecture.integer("head.width"),
                classes=self.classes,
            )
        else:
            head = layer("kdnas.blocks.basic:PoolLinear", inputs=width, classes=self.classes)
        return stem, tuple(stages), head

    def _widths(self, full: int) -> tuple[int, ...]:
        return tuple(max(1, round(ratio * full)) for ratio in self.ratios)
