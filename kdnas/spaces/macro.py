"""NAS-Bench-Macro: an operation per layer, identity among them."""

from dataclasses import dataclass
from typing import final

from kdnas.architecture import Architecture, Choice
from kdnas.space import Factor, Kernel, Layer, SearchSpace, Size, Sizes, layer

_IDENTITY = "identity"


@final
@dataclass(frozen=True, kw_only=True)
class MacroOperation:
    """One of the inverted residuals a layer may be.

    Attributes:
        kernel: of the depthwise convolution.
        expansion: hidden channels per channel of the layer's *input*.
    """

    kernel: Kernel
    expansion: Size

    @property
    def name(self) -> str:
        """The option's name, such as `k3e3`."""
        return f"k{self.kernel}e{self.expansion}"


@final
@dataclass(frozen=True, kw_only=True)
class Macro(SearchSpace):
    """Stages of layers, each an identity or one of a few inverted residuals.

    The first layer of a stage halves the resolution and changes the width; there, identity is a 1x1 convolution with
    batch norm. After it, identity is no layer at all, so its position does not matter: the canonical form moves the
    identities to the end of positions 2 and up, which leaves 3,969 networks of the benchmark's 6,561 codes.

    Every operation has its own weights (its own bank) at every position of the canonical form: an operation that a
    code has third, after an identity, is the second layer and uses the second layer's weights. Two codes of one
    network therefore have the same weights and score, in the supernet as in the benchmark.

    Attributes:
        depths: layers per stage.
        widths: channels per stage.
        stem_width: channels of the stem.
        head_width: channels of the last convolution.
        operations: options of a layer beside identity; digit 1 of a code is the first of them.
        width_multiplier: factor of all widths, rounded; the same codes then name thinner networks.

    Reference: Su et al., Prioritized Architecture Sampling with Monte-Carlo Tree Search, CVPR 2021, section 5
    and appendix.
    Differs: there a supernet has operations per position of the code, so that codes of one network have different
    weights and scores.
    """

    depths: Sizes = (2, 3, 3)
    widths: Sizes = (64, 128, 256)
    stem_width: Size = 32
    head_width: Size = 1280
    operations: tuple[MacroOperation, ...] = (
        MacroOperation(kernel=3, expansion=3),
        MacroOperation(kernel=5, expansion=6),
    )
    width_multiplier: Factor = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.depths) != len(self.widths):
            raise ValueError(
                f"`depths` and `widths` must have one entry per stage, got {len(self.depths)} and {len(self.widths)}."
            )
        if not self.operations:
            raise ValueError("`operations` must not be empty.")

    @property
    def structure(self) -> tuple[Choice, ...]:
        """One operation per layer."""
        options = (_IDENTITY, *(operation.name for operation in self.operations))
        return tuple(Choice(name, options) for stage in self._names() for name in stage)

    def canonical(self, architecture: Architecture) -> Architecture:
        """In each stage, after its first layer, identities are moved to the end."""
        values = dict(architecture)
        for first, *rest in self._names():
            operations = [values[name] for name in rest if values[name] != _IDENTITY]
            operations += [_IDENTITY] * (len(rest) - len(operations))
            values.update({first: values[first]} | dict(zip(rest, operations, strict=True)))
        return Architecture(values)

    def covering(self) -> tuple[Architecture, ...]:
        """One uniform network per operation."""
        return tuple(map(self.uniform, self.structure[0].options))

    def layers(self, architecture: Architecture) -> tuple[Layer, tuple[tuple[Layer, ...], ...], Layer]:
        """Stem, stages and head."""
        operations = {operation.name: operation for operation in self.operations}
        inputs = self._scaled(self.stem_width)
        stem = layer("kdnas.blocks.basic:ConvNormAct", inputs=self.image_channels, outputs=inputs)
        stages = []
        for names, stage_width in zip(self._names(), self.widths, strict=True):
            outputs, blocks = self._scaled(stage_width), []
            for place, name in enumerate(names):
                operation, stride = str(architecture[name]), 2 if place == 0 else 1
                if operation != _IDENTITY:
                    blocks.append(
                        layer(
                            "kdnas.blocks.macro:InvertedResidual",
                            bank=operation,
                            inputs=inputs,
                            outputs=outputs,
                            kernel=operations[operation].kernel,
                            hidden=inputs * operations[operation].expansion,
                            stride=stride,
                        )
                    )
                elif place == 0:
                    blocks.append(
                        layer(
                            "kdnas.blocks.basic:ConvNormAct",
                            bank=operation,
                            inputs=inputs,
                            outputs=outputs,
                            kernel=1,
                            stride=stride,
                            activation="none",
                        )
                    )
                inputs = outputs
            stages.append(tuple(blocks))
        head = layer(
            "kdnas.blocks.macro:ConvPoolLinear",
            inputs=inputs,
            hidden=self._scaled(self.head_width),
            classes=self.classes,
        )
        return stem, tuple(stages), head

    def _names(self) -> list[list[str]]:
        return [[f"stage{stage}.layer{place}" for place in range(depth)] for stage, depth in enumerate(self.depths)]

    def _scaled(self, width: int) -> int:
        return max(1, round(width * self.width_multiplier))
