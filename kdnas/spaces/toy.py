"""A space of a few dozen small networks, for documentation and tests."""

from dataclasses import dataclass
from typing import final

from kdnas.architecture import Architecture, Choice
from kdnas.space import Depth, DepthOptions, Layer, SearchSpace, SizeOptions, layer


@final
@dataclass(frozen=True, kw_only=True)
class Toy(SearchSpace):
    """Plain convolutions: per stage a depth, per layer a width.

    Attributes:
        widths: options for the width of a layer.
        depths: options for the number of layers of a stage.
        num_stages: stages; each after the first halves the resolution.
    """

    widths: SizeOptions = (4, 8)
    depths: DepthOptions = (1, 2)
    num_stages: Depth = 2
    resolutions: SizeOptions = (8,)

    @property
    def structure(self) -> tuple[Choice, ...]:
        """Depth, then the width of each layer, stage by stage."""
        choices: list[Choice] = []
        for stage in range(self.num_stages):
            depth = f"stage{stage}.depth"
            choices.append(Choice(depth, self.depths))
            choices += [
                Choice(f"stage{stage}.layer{place}.width", self.widths, depth, place + 1)
                for place in range(max(self.depths))
            ]
        return tuple(choices)

    def layers(self, architecture: Architecture) -> tuple[Layer, tuple[tuple[Layer, ...], ...], Layer]:
        """Stem, stages and head."""
        stem = layer(
            "kdnas.blocks.basic:ConvNormAct", inputs=self.image_channels, outputs=self.widths[0], kernel=3, stride=1
        )
        inputs, stages = self.widths[0], []
        for index in range(self.num_stages):
            stage, chosen = [], architecture.under(f"stage{index}")
            for place in range(chosen.integer("depth")):
                width = chosen.integer(f"layer{place}.width")
                stride = 2 if index > 0 and place == 0 else 1
                stage.append(
                    layer("kdnas.blocks.basic:ConvNormAct", inputs=inputs, outputs=width, kernel=3, stride=stride)
                )
                inputs = width
            stages.append(tuple(stage))
        head = layer("kdnas.blocks.basic:PoolLinear", inputs=inputs, classes=self.classes)
        return stem, tuple(stages), head
