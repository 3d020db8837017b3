"""Residual networks: width, depth and inner width of each stage."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar, final

from kdnas.architecture import Architecture, Choice
from kdnas.space import DepthOptions, Kernel, Layer, Ratios, SearchSpace, Size, SizeOptions, layer

_BLOCKS = {"basic": "BasicBlock", "bottleneck": "Bottleneck"}
_Option = TypeVar("_Option", int, float, str)


@final
@dataclass(frozen=True, kw_only=True)
class ResNetStage:
    """Options of one stage.

    Attributes:
        widths: channels of the stage's output.
        depths: number of blocks.
        ratios: channels inside a block per channel of the stage's output, chosen block by block.
        stride: of the first block.
    """

    widths: SizeOptions
    depths: DepthOptions
    ratios: Ratios = (1.0,)
    stride: Size = 1


@final
@dataclass(frozen=True, kw_only=True)
class ResNet(SearchSpace):
    """Stages of residual blocks, sharing weights by leading channels and leading blocks.

    A setting with one option is no choice. The first block of a stage has a projecting shortcut, except where stride 1
    and one fixed width before and in the stage make it an identity for every architecture: it never depends on the
    chosen widths. The digits of a code are the options themselves where all are whole numbers below ten (DisWOT's
    `557`), otherwise their indices.

    Attributes:
        block: `basic` (two 3x3 convolutions) or `bottleneck` (1x1, 3x3, 1x1).
        stem_widths: options for the channels of the stem.
        stem_kernel: kernel of the stem.
        stem_stride: stride of the stem.
        stages: options per stage.
        zero_last: whether the last batch norm of every block starts at scale zero, so that the block is its shortcut.

    Reference: He et al., Deep Residual Learning for Image Recognition, CVPR 2016, section 4.2.
    Differs: shortcuts between different widths project (option B); the paper's CIFAR networks pad with zeros (A).
    """

    block: str = "basic"
    stem_widths: SizeOptions = (16,)
    stem_kernel: Kernel = 3
    stem_stride: Size = 1
    stages: tuple[ResNetStage, ...] = (
        ResNetStage(widths=(16,), depths=(1, 3, 5, 7)),
        ResNetStage(widths=(32,), depths=(1, 3, 5, 7), stride=2),
        ResNetStage(widths=(64,), depths=(1, 3, 5, 7), stride=2),
    )
    zero_last: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block not in _BLOCKS:
            raise ValueError(f"`block` must be one of {', '.join(_BLOCKS)}, got {self.block!r}.")
        if not self.stages:
            raise ValueError("`stages` must not be empty.")

    @property
    def structure(self) -> tuple[Choice, ...]:
        """Widths, depths and inner widths, stage by stage."""
        choices = [Choice("stem.width", self.stem_widths), *stage_choices(self.stages)]
        return elastic(choices)

    def layers(self, architecture: Architecture) -> tuple[Layer, tuple[tuple[Layer, ...], ...], Layer]:
        """Stem, stages and head."""
        width = option_of(architecture, "stem.width", self.stem_widths)
        stem = layer(
            "kdnas.blocks.basic:ConvNormAct",
            inputs=self.image_channels,
            outputs=width,
            kernel=self.stem_kernel,
            stride=self.stem_stride,
        )
        stages, before = [], self.stem_widths
        for index, stage in enumerate(self.stages):
            outputs = option_of(architecture, f"stage{index}.width", stage.widths)
            same = stage.stride == 1 and before == stage.widths and len(before) == 1
            blocks = []
            for place in range(option_of(architecture, f"stage{index}.depth", stage.depths)):
                ratio = option_of(architecture, f"stage{index}.block{place}.ratio", stage.ratios)
                blocks.append(
                    layer(
                        f"kdnas.blocks.resnet:{_BLOCKS[self.block]}",
                        inputs=width,
                        outputs=outputs,
                        hidden=max(1, round(outputs * ratio)),
                        stride=stage.stride if place == 0 else 1,
                        shortcut="projection" if place == 0 and not same else "identity",
                        zero_last=self.zero_last,
                    )
                )
                width = outputs
            stages.append(tuple(blocks))
            before = stage.widths
        head = layer("kdnas.blocks.basic:PoolLinear", inputs=width, classes=self.classes)
        return stem, tuple(stages), head

    def code(self, architecture: Architecture) -> str:
        """A compact name; the options themselves where they are digits."""
        if self._digits:
            return "".join(str(architecture[choice.name]) for choice in self.choices)
        return super().code(architecture)

    def parse(self, code: str) -> Architecture:
        """The architecture of a code.

        Raises:
            ValueError: the code has another length, or a digit without an option.
        """
        if not self._digits:
            return super().parse(code)
        if len(code) != len(self.choices) or not (code.isascii() and code.isdecimal()):
            raise ValueError(f"a code of {self._title} must have {len(self.choices)} digits, got {code!r}.")
        return self.architecture({choice.name: int(digit) for choice, digit in zip(self.choices, code, strict=True)})

    @property
    def _digits(self) -> bool:
        return all(
            choice.needs is None and all(isinstance(o, int) and 0 <= o <= 9 for o in choice.options)
            for choice in self.choices
        )


def stage_choices(stages: Sequence[ResNetStage]) -> Iterator[Choice]:
    """Width, depth and the blocks' ratios of each stage; those with one option too."""
    for index, stage in enumerate(stages):
        depth = f"stage{index}.depth"
        yield Choice(f"stage{index}.width", stage.widths)
        yield Choice(depth, stage.depths)
        needs = depth if len(stage.depths) > 1 else None
        for place in range(stage.depths[-1]):
            yield Choice(f"stage{index}.block{place}.ratio", stage.ratios, needs, place + 1 if needs else 0)


def elastic(choices: Sequence[Choice]) -> tuple[Choice, ...]:
    """Those with more than one option."""
    return tuple(choice for choice in choices if len(choice.options) > 1)


def option_of(architecture: Architecture, name: str, options: tuple[_Option, ...]) -> _Option:
    """The option of a choice; the last one where there is nothing to choose."""
    return architecture[name] if name in architecture else options[-1]  # type: ignore[return-value]
