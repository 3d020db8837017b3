"""The single-path one-shot space: ShuffleNetV2 units, an operation per layer."""

from dataclasses import dataclass
from typing import final

from kdnas.architecture import Architecture, Choice
from kdnas.space import Depth, KernelOptions, Layer, Rate, SearchSpace, Size, SizeOptions, layer

_XCEPTION = "xception"


@final
@dataclass(frozen=True, kw_only=True)
class ShuffleStage:
    """Layers of one width.

    Attributes:
        width: channels of the stage's output.
        depth: number of layers.
    """

    width: Size
    depth: Depth


@final
@dataclass(frozen=True, kw_only=True)
class Shuffle(SearchSpace):
    """Per layer a shuffle unit with one of the kernels or the Xception-like unit, each with weights of its own.

    Each stage halves the resolution in its first layer. A code has a digit per layer: the index of the kernel; the
    digit after the last kernel is Xception.

    Attributes:
        stem_width: channels of the stem.
        stem_stride: stride of the stem.
        stages: widths and depths.
        head_width: channels of the last convolution.
        kernels: kernel sizes of the shuffle units.
        dropout: rate before the classifier.

    Reference: Guo et al., Single Path One-Shot Neural Architecture Search with Uniform Sampling, ECCV 2020,
    table 1 and section 4.
    Differs: batch norm has a scale and an offset in the supernet too; the authors leave them out there.
    """

    stem_width: Size = 16
    stem_stride: Size = 2
    stages: tuple[ShuffleStage, ...] = (
        ShuffleStage(width=64, depth=4),
        ShuffleStage(width=160, depth=4),
        ShuffleStage(width=320, depth=8),
        ShuffleStage(width=640, depth=4),
    )
    head_width: Size = 1024
    kernels: KernelOptions = (3, 5, 7)
    dropout: Rate = 0.1
    resolutions: SizeOptions = (224,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.stages:
            raise ValueError("`stages` must not be empty.")
        before = self.stem_width
        for index, stage in enumerate(self.stages):
            if stage.width <= before or stage.width % 2:
                raise ValueError(
                    f"`stages[{index}].width` must be even and above {before}, the width before it, got {stage.width}."
                )
            before = stage.width

    @property
    def structure(self) -> tuple[Choice, ...]:
        """One unit per layer."""
        return tuple(
            Choice(f"stage{index}.layer{place}", tuple(self._units()))
            for index, stage in enumerate(self.stages)
            for place in range(stage.depth)
        )

    def covering(self) -> tuple[Architecture, ...]:
        """One uniform network per unit."""
        return tuple(map(self.uniform, self._units()))

    def layers(self, architecture: Architecture) -> tuple[Layer, tuple[tuple[Layer, ...], ...], Layer]:
        """Stem, stages and head."""
        width, units, stages = self.stem_width, self._units(), []
        stem = layer(
            "kdnas.blocks.basic:ConvNormAct", inputs=self.image_channels, outputs=width, stride=self.stem_stride
        )
        for index, stage in enumerate(self.stages):
            blocks = []
            for place in range(stage.depth):
                unit = str(architecture[f"stage{index}.layer{place}"])
                kernel, depthwise = units[unit]
                blocks.append(
                    layer(
                        "kdnas.blocks.shuffle:ShuffleUnit",
                        bank=unit,
                        inputs=width,
                        outputs=stage.width,
                        kernel=kernel,
                        stride=2 if place == 0 else 1,
                        depthwise=depthwise,
                    )
                )
                width = stage.width
            stages.append(tuple(blocks))
        head = layer(
            "kdnas.blocks.shuffle:ShuffleHead",
            inputs=width,
            hidden=self.head_width,
            classes=self.classes,
            dropout=self.dropout,
        )
        return stem, tuple(stages), head

    def _units(self) -> dict[str, tuple[int, int]]:
        """Kernel and number of depthwise convolutions of every option."""
        return {f"shuffle{kernel}": (kernel, 1) for kernel in self.kernels} | {_XCEPTION: (3, 3)}
