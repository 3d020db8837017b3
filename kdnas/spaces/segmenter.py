"""Networks that classify every pixel: width and depth of each stage, and of the head."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, final

from kdnas.architecture import Architecture, Choice, Value
from kdnas.space import Depths, Layer, Size, SizeOptions, layer
from kdnas.spaces._dense import DenseSpace
from kdnas.spaces.resnet import ResNetStage, elastic, option_of, stage_choices
from kdnas.specs import check_literals

Heads = tuple[Literal["lraspp", "aspp"], ...]
_HEADS = {"lraspp": "kdnas.blocks.dense:LrAspp", "aspp": "kdnas.blocks.dense:Aspp"}


@final
@dataclass(frozen=True, kw_only=True)
class Segmenter(DenseSpace):
    """A backbone of residual or inverted residual blocks, and a head that classifies every position.

    Networks take images of any size; costs are counted at `size`, which is that of the data. A setting with one option
    is no choice. The first block of a stage has no identity shortcut, whatever its widths.

    Attributes:
        block: `basic` (two 3x3 convolutions) or `mbconv` (1x1, depthwise 3x3, 1x1).
        stem_widths: options for the channels of the stem.
        stem_stride: stride of the stem.
        stages: options per stage; a ratio is the inner channels per channel of the output (`basic`) or of the input
            (`mbconv`, above 1).
        heads: options for the head: `lraspp`, `aspp`.
        low_level: whether `lraspp` also reads the last map of a higher resolution than the deepest, if there is one.
        head_widths: options for the channels of the head.
        head_depths: options for the number of 3x3 convolutions before the classifier.

    Reference: Howard et al., Searching for MobileNetV3, ICCV 2019, section 6.4 (LR-ASPP); Chen et al., Rethinking
        Atrous Convolution for Semantic Image Segmentation, 2017, section 3.3 (ASPP).
    Differs: elastic; no dilated backbone, its stride is that of the stages; see the heads.
    """

    block: Literal["basic", "mbconv"] = "basic"
    stem_widths: SizeOptions = (16,)
    stem_stride: Size = 2
    stages: tuple[ResNetStage, ...] = (
        ResNetStage(widths=(16, 24), depths=(1, 2)),
        ResNetStage(widths=(32, 48), depths=(1, 2, 3), stride=2),
        ResNetStage(widths=(64, 96), depths=(1, 2, 3), stride=2),
    )
    heads: Heads = ("lraspp", "aspp")
    low_level: bool = True
    head_widths: SizeOptions = (32, 64)
    head_depths: Depths = (0, 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_literals(type(self), {"block": self.block})
        if not self.stages:
            raise ValueError("`stages` must not be empty.")
        if not self.heads or len(set(self.heads)) < len(self.heads):
            raise ValueError(f"`heads` must be some of {', '.join(_HEADS)}, each once, got {self.heads!r}.")
        if tuple(sorted(set(self.head_depths))) != self.head_depths:
            raise ValueError(f"`head_depths` must be ascending, got {list(self.head_depths)}.")
        ratios = [ratio for stage in self.stages for ratio in stage.ratios]
        if self.block == "mbconv" and min(ratios) <= 1:
            raise ValueError(f"`ratios` of mbconv blocks must be above 1, got {min(ratios)}.")

    @property
    def structure(self) -> tuple[Choice, ...]:
        """Widths, depths and inner widths, stage by stage, then the head's."""
        choices = [
            Choice("stem.width", self.stem_widths),
            *stage_choices(self.stages),
            Choice("head.kind", self.heads),
            Choice("head.width", self.head_widths),
            Choice("head.depth", self.head_depths),
        ]
        return elastic(choices)

    def layers(self, architecture: Architecture) -> tuple[Layer, tuple[tuple[Layer, ...], ...], Layer]:
        """Stem, stages and head."""
        option = partial(option_of, architecture)
        width = option("stem.width", self.stem_widths)
        stem = layer(
            "kdnas.blocks.basic:ConvNormAct", inputs=self.image_channels, outputs=width, stride=self.stem_stride
        )
        stages, widths = [], []
        for index, stage in enumerate(self.stages):
            outputs, blocks = option(f"stage{index}.width", stage.widths), []
            for place in range(option(f"stage{index}.depth", stage.depths)):
                ratio = option(f"stage{index}.block{place}.ratio", stage.ratios)
                blocks.append(self._block(width, outputs, ratio, stage.stride if place == 0 else 1, first=place == 0))
                width = outputs
            stages.append(tuple(blocks))
            widths.append(width)
        kind: Value = option("head.kind", self.heads)
        reads = self._finer if kind == "lraspp" and self.low_level else ()
        low: dict[str, Any] = {"low": widths[reads[0]]} if reads else {}
        head = layer(
            _HEADS[str(kind)],
            bank=str(kind),
            reads=reads,
            **low,
            inputs=width,
            width=option("head.width", self.head_widths),
            classes=self.classes,
            depth=option("head.depth", self.head_depths),
        )
        return stem, tuple(stages), head

    @property
    def _finer(self) -> tuple[int, ...]:
        """The last stage with a map of a higher resolution than the deepest; none where all have its resolution."""
        return tuple(i - 1 for i, stage in enumerate(self.stages) if i > 0 and stage.stride > 1)[-1:]

    def _block(self, inputs: int, outputs: int, ratio: float, stride: int, *, first: bool) -> Layer:
        if self.block == "basic":
            return layer(
                "kdnas.blocks.resnet:BasicBlock",
                inputs=inputs,
                outputs=outputs,
                hidden=max(1, round(outputs * ratio)),
                stride=stride,
                shortcut="projection" if first else "identity",
            )
        return layer(
            "kdnas.blocks.mbconv:MBConv",
            inputs=inputs,
            outputs=outputs,
            expanded=max(inputs + 1, round(inputs * ratio)),
            stride=stride,
            shortcut="none" if first else "identity",
        )
