"""Vision transformers: width, depth, heads and inner width."""

import itertools
from dataclasses import dataclass
from typing import Annotated, final

from kdnas.architecture import Architecture, Choice
from kdnas.space import DepthOptions, Factor, Layer, Range, Rate, Ratios, SearchSpace, Size, SizeOptions, layer


@final
@dataclass(frozen=True, kw_only=True)
class ViT(SearchSpace):
    """One token width and depth per network, heads and inner width per layer.

    Weights are shared by leading channels, leading heads and leading layers (AutoFormer's entanglement). A stage's
    feature is its tokens, `[batch, 1 + patches, width]`, the class token first.

    Attributes:
        patch: height and width of a patch; every resolution is a multiple.
        widths: options for the channels of a token.
        depths: options for the number of layers.
        heads: options for the heads of a layer.
        ratios: options for the inner width of a layer, per token width.
        head_width: channels of a head, the same for all token widths.
        reach: largest distance of the relative positions, in patches; 0 for none.
        cuts: layers after which a stage ends; the last stage has the remaining layers.
        drop_path: drop-path rate of the last possible layer; it rises linearly with depth, from 0.
        pool: input of the classifier: the `mean` of the patches' tokens, or the `class` token.
        norm_eps: eps of the layer norms.
        qkv_bias: whether queries, keys and values have biases.

    `kdnas convert` writes tables of this family for the vision transformers of torchvision and timm.

    Reference: Chen et al., AutoFormer: Searching Transformers for Visual Recognition, ICCV 2021, table 1.
    Differs: the bank is as wide as the widest option (the released T supernet has 256 channels, 16 of them never
    used), and leading rows are whole heads of the queries, of the keys and of the values, which the authors
    interleave in one matrix. The class token has one vector, not a token and a position that are only ever added.
    """

    patch: Size = 16
    widths: SizeOptions = (192, 216, 240)
    depths: DepthOptions = (12, 13, 14)
    heads: SizeOptions = (3, 4)
    ratios: Ratios = (3.5, 4.0)
    head_width: Size = 64
    reach: Annotated[int, Range(least=0)] = 14
    cuts: Annotated[tuple[int, ...], Range(least=1, ascending=True, empty=True)] = (4, 8)
    drop_path: Rate = 0.1
    pool: str = "mean"
    norm_eps: Factor = 1e-5
    qkv_bias: bool = True
    resolutions: SizeOptions = (224,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pool not in ("mean", "class"):
            raise ValueError(f"`pool` must be one of mean, class, got {self.pool!r}.")
        for side in self.resolutions:
            if side % self.patch:
                raise ValueError(f"`resolutions` must be multiples of `patch`, {self.patch}, got {side}.")
        if self.cuts and self.cuts[-1] >= self.depths[0]:
            raise ValueError(f"`cuts` must be below the smallest depth, {self.depths[0]}, got {self.cuts}.")

    @property
    def structure(self) -> tuple[Choice, ...]:
        """Width, depth, and per layer heads and ratio."""
        choices = [Choice("width", self.widths), Choice("depth", self.depths)]
        for place in range(self.depths[-1]):
            choices.append(Choice(f"layer{place}.heads", self.heads, "depth", place + 1))
            choices.append(Choice(f"layer{place}.ratio", self.ratios, "depth", place + 1))
        return tuple(choices)

    def layers(self, architecture: Architecture) -> tuple[Layer, tuple[tuple[Layer, ...], ...], Layer]:
        """Stem, stages and head."""
        width, depth = architecture.integer("width"), architecture.integer("depth")
        resolution = architecture.integer("resolution") if "resolution" in architecture else self.resolutions[0]
        stem = layer(
            "kdnas.blocks.vit:PatchTokens",
            inputs=self.image_channels,
            width=width,
            patch=self.patch,
            side=resolution // self.patch,
        )
        blocks = tuple(
            layer(
                "kdnas.blocks.vit:EncoderBlock",
                width=width,
                heads=architecture.integer(f"layer{place}.heads"),
                # Exact where the ratio is a rounded quotient hidden / width.
                hidden=int(width * float(architecture[f"layer{place}.ratio"]) + 1e-6),
                head_width=self.head_width,
                reach=self.reach,
                drop_path=self.drop_path * place / max(1, self.depths[-1] - 1),
                eps=self.norm_eps,
                bias=self.qkv_bias,
            )
            for place in range(depth)
        )
        ends = (0, *self.cuts, depth)
        stages = tuple(blocks[start:end] for start, end in itertools.pairwise(ends))
        head = layer(
            "kdnas.blocks.vit:TokensLinear", width=width, classes=self.classes, pool=self.pool, eps=self.norm_eps
        )
        return stem, stages, head
