"""NAS-Bench-Macro: an operation per layer, identity among them."""

from dataclasses import dataclass
from typing import final

from kdnas.architecture import Architecture, Choice
from kdnas.space import Layer, SearchSpace, layer

_IDENTITY = "identity"


@final
@dataclass(frozen=True, kw_only=True)
class MacroOperation:
    """One inverted residual that a layer may be.

    Attributes:
        kernel: of the depthwise convolution.
        expansion: hidden channels per channel of the layer's *input*.
    """

    kernel: int
    expansion: int

    @property
    def name(self) -> str:
        """The option's name, such as `k3e3`."""
        return f"k{self.kernel}e{self.expansion}"


@final
@dataclass(frozen=True, kw_only=True)
class Macro(SearchSpace):
    """Stages of layers, each an identity or one of a few inverted residuals.

    The first layer of a stage halves the resolution and changes the width; there, identity is a 1x1 convolution
    with batch norm. Behind it, identity is no layer at all, so it may stand anywhere in its stage: the
    canonical form moves the identities to the end of positions 2 and up, which leaves 3,969 networks of the
    benchmark's 6,561 codes.

    Every operation has its own weights (its own bank) at every position. Positions are those of the canonical
    form, of which nothing but the network remains: an operation that a code puts third, behind an identity, is
    the second layer and uses the second layer's weights. Two codes of one network so have the same
    weights and score, in the supernet as in the benchmark.

    Attributes:
        depths: layers per stage.
        widths: channels per stage.
        stem_width: channels of the stem.
        head_width: channels of the last convolution.
        operations: what a layer may be besides identity; digit 1 of a code is the first of them.
        width_multiplier: scales all widths, rounded, so that the same codes name thinner networks.

    Reference: Su et al., Prioritized Architecture Sampling with Monte-Carlo Tree Search, CVPR 2021, section 5
    and appendix.
    Differs: from a supernet with operations per position of the code, where the spellings of one network have different
    weights and scores.
    """

    depths: tuple[int, ...] = (2, 3, 3)
    widths: tuple[int, ...] = (64, 128, 256)
    stem_width: int = 32
    head_width: int = 1280
    operations: tuple[MacroOperation, ...] = (
        MacroOperation(kernel=3, expansion=3),
        MacroOperation(kernel=5, expansion=6),
    )
    width_multiplier: float = 1.0

    def __post_init__(self) -> None:
        if len(self.depths) != len(self.widths):
            raise ValueError(
                f"depths and widths have one entry per stage, got {len(self.depths)} and {len(self.widths)}."
            )
        if not self.operations or min(self.depths, default=0) < 1:
            raise ValueError("a macro space needs an operation, and at least one layer in every stage.")
        if not self.width_multiplier > 0:
            raise ValueError(f"width_multiplier must be positive, got {self.width_multiplier}.")

    @property
    def structure(self) -> tuple[Choice, ...]:
        """One operation per layer."""
        options = (_IDENTITY, *(operation.name for operation in self.operations))
        return tuple(Choice(name, options) for stage in self._names() for name in stage)

    def canonical(self, architecture: Architecture) -> Architecture:
        """Identities moved behind the other operations, in each stage after its first layer."""
        values = dict(architecture)
        for first, *rest in self._names():
            kept = [values[name] for name in rest if values[name] != _IDENTITY]
            kept += [_IDENTITY] * (len(rest) - len(kept))
            values.update({first: values[first]} | dict(zip(rest, kept, strict=True)))
        return Architecture(values)

    def covering(self) -> tuple[Architecture, ...]:
        """One uniform network per operation."""
        options = self.structure[0].options
        return tuple(
            self.decide(lambda choice, one=one: one if one in choice.options else choice.options[-1]) for one in options
        )

    def layers(self, architecture: Architecture) -> tuple[Layer, tuple[tuple[Layer, ...], ...], Layer]:
        """Stem, stages and head."""
        operations = {operation.name: operation for operation in self.operations}
        inputs = self._scaled(self.stem_width)
        stem = layer("kdnas.blocks.basic:ConvNormAct", inputs=self.image_channels, outputs=inputs)
        stages = []
        for names, stage_width in zip(self._names(), self.widths, strict=True):
            outputs, made = self._scaled(stage_width), []
            for place, name in enumerate(names):
                chosen, stride = str(architecture[name]), 2 if place == 0 else 1
                if chosen != _IDENTITY:
                    made.append(
                        layer(
                            "kdnas.blocks.macro:InvertedResidual",
                            bank=chosen,
                            inputs=inputs,
                            outputs=outputs,
                            kernel=operations[chosen].kernel,
                            hidden=inputs * operations[chosen].expansion,
                            stride=stride,
                        )
                    )
                elif place == 0:
                    made.append(
                        layer(
                            "kdnas.blocks.basic:ConvNormAct",
                            bank=chosen,
                            inputs=inputs,
                            outputs=outputs,
                            kernel=1,
                            stride=stride,
                            activation="none",
                        )
                    )
                inputs = outputs
            stages.append(tuple(made))
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
