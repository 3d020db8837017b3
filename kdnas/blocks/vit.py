"""Blocks of vision transformers; the leading corner of every tensor is a narrower transformer's tensor."""

import math

import torch
from torch import Tensor, nn

from kdnas.blocks.basic import AttentionMap, DropPath


class PatchTokens(nn.Module):
    """Patches as tokens with learned positions, after one class token.

    Args:
        inputs: channels of the images.
        width: channels of a token.
        patch: height and width of a patch.
        side: patches along the height, and along the width.

    The positions are a map `[1, width, side, side]`, so that a smaller image uses the centre of a larger one's.
    """

    def __init__(self, inputs: int, width: int, patch: int, side: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(inputs, width, patch, patch)
        self.positions = nn.Parameter(torch.zeros(1, width, side, side))
        self.class_token = nn.Parameter(torch.zeros(width))
        nn.init.trunc_normal_(self.positions, std=0.02)
        nn.init.trunc_normal_(self.class_token, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, inputs, height, width]` to `[batch, 1 + side * side, width]`, the class token first."""
        tokens = (self.patches(x) + self.positions).flatten(2).transpose(1, 2)
        return torch.cat((self.class_token.expand(len(x), 1, -1), tokens), 1)


class RelativePosition(nn.Module):
    """A vector for every pair of tokens, by their distance in rows plus by their distance in columns.

    Args:
        width: of a vector.
        reach: larger distances are clipped to it. The class token has a row of its own in both tables.
    """

    def __init__(self, width: int, reach: int) -> None:
        super().__init__()
        self.reach = reach
        self.rows = nn.Parameter(torch.zeros(2 * reach + 2, width))
        self.columns = nn.Parameter(torch.zeros(2 * reach + 2, width))
        nn.init.trunc_normal_(self.rows, std=0.02)
        nn.init.trunc_normal_(self.columns, std=0.02)

    def forward(self, side: int) -> Tensor:
        """`[tokens, tokens, width]` for a square of `side * side` tokens after a class token."""
        index = torch.arange(side * side, device=self.rows.device)
        vectors = torch.zeros((), device=self.rows.device, dtype=self.rows.dtype)
        for table, at in ((self.rows, index // side), (self.columns, index % side)):
            distance = (at[None] - at[:, None]).clamp(-self.reach, self.reach) + self.reach + 1
            vectors = vectors + table[nn.functional.pad(distance, (1, 0, 1, 0))]
        return vectors


class Attention(nn.Module):
    """Multi-head self-attention with learned relative positions in the keys and in the values.

    Queries, keys and values have a projection each, head after head, so that leading rows are leading heads.
    The output of `softmax` is the attention map, `[batch, heads, tokens, tokens]`.

    Args:
        width: channels of a token.
        heads: number of heads.
        head_width: channels of a head.
        reach: of the relative positions; 0 for none.
        bias: whether queries, keys and values have biases.

    Reference: Vaswani et al., Attention Is All You Need, NeurIPS 2017, section 3.2; Shaw et al., Self-Attention
    with Relative Position Representations, NAACL 2018, equations 3 and 4; Chen et al., AutoFormer, ICCV 2021.
    """

    def __init__(self, width: int, heads: int, head_width: int = 64, reach: int = 0, bias: bool = True) -> None:
        super().__init__()
        self.heads, self.scale, self.reach = heads, head_width**-0.5, reach
        self.queries = nn.Linear(width, heads * head_width, bias)
        self.keys = nn.Linear(width, heads * head_width, bias)
        self.values = nn.Linear(width, heads * head_width, bias)
        self.softmax = AttentionMap(-1)
        self.out = nn.Linear(heads * head_width, width)
        if reach:
            self.key_positions = RelativePosition(head_width, reach)
            self.value_positions = RelativePosition(head_width, reach)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, tokens, width]` to the same."""
        queries, keys, values = (
            project(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for project in (self.queries, self.keys, self.values)
        )
        scores = queries @ keys.transpose(2, 3)
        side = math.isqrt(x.shape[1] - 1)
        if self.reach:
            scores = scores + torch.einsum("bhnd,nmd->bhnm", queries, self.key_positions(side))
        attention = self.softmax(scores * self.scale)
        x = attention @ values
        if self.reach:
            x = x + torch.einsum("bhnm,nmd->bhnd", attention, self.value_positions(side))
        return self.out(x.transpose(1, 2).flatten(2))


class EncoderBlock(nn.Module):
    """Attention, then two linear layers; each with a layer norm before it and a shortcut around it.

    Args:
        width: channels of a token.
        heads: heads of the attention.
        hidden: channels between the linear layers.
        head_width: channels of a head.
        reach: of the relative positions; 0 for none.
        drop_path: rate of stochastic depth for each branch.
        eps: of the layer norms.
        bias: whether queries, keys and values have biases.

    Reference: Dosovitskiy et al., An Image is Worth 16x16 Words, ICLR 2021, equations 2 and 3.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        head_width: int = 64,
        reach: int = 0,
        drop_path: float = 0.0,
        eps: float = 1e-5,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.attention = Attention(width, heads, head_width, reach, bias)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.drop = DropPath(drop_path)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, tokens, width]` to the same."""
        x = x + self.drop(self.attention(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))


class TokensLinear(nn.Module):
    """Layer norm, the class token or the mean of the other tokens, and the classifier.

    Args:
        width: channels of a token.
        classes: number of logits.
        pool: `mean` of the patches' tokens, or the `class` token.
        eps: of the layer norm.
    """

    def __init__(self, width: int, classes: int, pool: str = "mean", eps: float = 1e-5) -> None:
        super().__init__()
        self.pool = pool
        self.norm = nn.LayerNorm(width, eps)
        self.linear = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, tokens, width]` to `[batch, classes]`."""
        if self.pool == "class":
            return self.linear(self.norm(x[:, 0]))
        return self.linear(self.norm(x)[:, 1:].mean(1))
