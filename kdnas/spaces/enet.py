"""ENet: bottlenecks at an eighth of the image, and a small decoder."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, final

from kdnas.architecture import Architecture, Choice
from kdnas.space import DepthOptions, Layer, Rate, Ratios, SizeOptions, layer
from kdnas.spaces._dense import DenseSpace
from kdnas.spaces.resnet import elastic, option_of

_MIDDLES: tuple[dict[str, Any], ...] = (
    {},
    {"dilation": 2},
    {"kernel": 5, "asymmetric": True},
    {"dilation": 4},
    {},
    {"dilation": 8},
    {"kernel": 5, "asymmetric": True},
    {"dilation": 16},
)
"""The middle convolutions of the blocks of a stage after the first, in turn."""


@final
@dataclass(frozen=True, kw_only=True)
class ENet(DenseSpace):
    """Four stages of an encoder, E1 to E4, and a decoder that reads the outputs of E3 and E4.

    E1 is a quarter of the image, E2 to E4 are an eighth; logits are enlarged to the image's size where that is no
    multiple of 8. Networks take images of any size; costs are counted at `size`, which is that of the data. A setting
    with one option is no choice.

    Attributes:
        stem_widths: options for the channels of the stem, more than those of an image.
        first_widths: options for the channels of E1, at least those of the stem.
        first_depths: options for the number of blocks of E1 after the one that halves the resolution.
        widths: options for the channels of E2, E3 and E4, at least those of E1.
        depths: options for the number of blocks of each of E2 (after the one that halves the resolution), E3 and E4.
        ratios: channels inside a block per channel of its output, chosen block by block.
        decoder_widths: options for the channels after the first enlargement.
        decoder_depths: options for the number of blocks after it.
        last_widths: options for the channels after the second enlargement.
        dropout: rate of channels of a branch that are dropped in training; a tenth of it in E1.

    Reference: Paszke et al., ENet: A Deep Neural Network Architecture for Real-Time Semantic Segmentation, 2016,
        table 1; Hou et al., Learning Lightweight Lane Detection CNNs by Self Attention Distillation, ICCV 2019: a
        fourth stage like the third, and the third's output beside the fourth's.
    Differs: elastic; see the blocks.
    """

    stem_widths: SizeOptions = (16,)
    first_widths: SizeOptions = (48, 64)
    first_depths: DepthOptions = (2, 4)
    widths: SizeOptions = (96, 128)
    depths: DepthOptions = (4, 8)
    ratios: Ratios = (0.125, 0.25)
    decoder_widths: SizeOptions = (48, 64)
    decoder_depths: DepthOptions = (1, 2)
    last_widths: SizeOptions = (16,)
    dropout: Rate = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.stem_widths) <= self.image_channels:
            raise ValueError(
                f"`stem_widths` must be above the {self.image_channels} channels of an image, got "
                f"{list(self.stem_widths)}."
            )
        for narrow, wide in (("stem_widths", "first_widths"), ("first_widths", "widths")):
            most, least = max(getattr(self, narrow)), min(getattr(self, wide))
            if least < most:
                raise ValueError(f"`{wide}` must be at least {most}, the largest of `{narrow}`, got {least}.")

    @property
    def structure(self) -> tuple[Choice, ...]:
        """Widths, depths and inner widths from the stem to the decoder."""
        choices = [
            Choice("stem.width", self.stem_widths),
            Choice("stage0.width", self.first_widths),
            *self._blocks(0, self.first_depths),
            Choice("encoder.width", self.widths),
            *(choice for stage in (1, 2, 3) for choice in self._blocks(stage, self.depths)),
            Choice("head.width", self.decoder_widths),
            Choice("head.depth", self.decoder_depths),
            Choice("head.last_width", self.last_widths),
        ]
        return elastic(choices)

    def layers(self, architecture: Architecture) -> tuple[Layer, tuple[tuple[Layer, ...], ...], Layer]:
        """Stem, four stages and head."""
        option = partial(option_of, architecture)
        inputs = option("stem.width", self.stem_widths)
        stem = layer("kdnas.blocks.enet:EnetStem", inputs=self.image_channels, outputs=inputs)
        stages = []
        for stage in range(4):
            outputs = option("encoder.width", self.widths) if stage else option("stage0.width", self.first_widths)
            dropout = self.dropout if stage else self.dropout / 10
            blocks = []
            if stage < 2:
                hidden = self._hidden(architecture, f"stage{stage}.down", outputs)
                down = {"inputs": inputs, "outputs": outputs, "hidden": hidden, "dropout": dropout}
                blocks.append(layer("kdnas.blocks.enet:EnetDown", **down))
            depth = option(f"stage{stage}.depth", self.depths if stage else self.first_depths)
            for place in range(depth):
                hidden = self._hidden(architecture, f"stage{stage}.block{place}", outputs)
                middle = _MIDDLES[place % len(_MIDDLES)] if stage else {}
                blocks.append(
                    layer("kdnas.blocks.enet:EnetBlock", width=outputs, hidden=hidden, dropout=dropout, **middle)
                )
            stages.append(tuple(blocks))
            inputs = outputs
        head = layer(
            "kdnas.blocks.enet:EnetDecoder",
            reads=(2,),
            inputs=inputs,
            width=option("head.width", self.decoder_widths),
            last=option("head.last_width", self.last_widths),
            depth=option("head.depth", self.decoder_depths),
            classes=self.classes,
            dropout=self.dropout,
        )
        return stem, tuple(stages), head

    def _blocks(self, stage: int, depths: tuple[int, ...]) -> Iterator[Choice]:
        """The inner width of the block that halves the resolution, the depth, and the other blocks' inner widths."""
        if stage < 2:
            yield Choice(f"stage{stage}.down.ratio", self.ratios)
        depth = f"stage{stage}.depth"
        yield Choice(depth, depths)
        needs = depth if len(depths) > 1 else None
        for place in range(depths[-1]):
            yield Choice(f"stage{stage}.block{place}.ratio", self.ratios, needs, place + 1 if needs else 0)

    def _hidden(self, architecture: Architecture, block: str, outputs: int) -> int:
        return max(1, round(outputs * option_of(architecture, f"{block}.ratio", self.ratios)))
