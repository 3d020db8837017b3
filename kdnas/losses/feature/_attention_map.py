"""Spatial attention maps: the activation of a feature map, reduced over channels."""

from typing import Literal

from torch import Tensor

Pool = Literal["sum", "sum_p", "max_p"]

# Below 1 the slope at 0 is infinite; above 4 activations of 1e6 leave float32.
EXPONENTS = "[1, 4]"


def attention_map(feature: Tensor, pool: Pool, p: float) -> Tensor:
    """`[batch, channels, h, w]` to `[batch, 1, h, w]`: sum |f|, sum |f|^p or max |f|^p over channels."""
    size = feature.abs()
    if pool == "sum":
        return size.sum(1, keepdim=True)
    if pool == "sum_p":
        return size.pow(p).sum(1, keepdim=True)
    return size.amax(1, keepdim=True).pow(p)
