"""Spatial attention maps: the activation of a feature map, reduced over channels."""

from typing import Literal

from torch import Tensor

Pool = Literal["sum", "sum_p", "max_p"]


def check_exponent(p: float) -> None:
    """Raise a ValueError for an exponent outside [1, 4]."""
    # Below 1 the slope at 0 is infinite; above 4 activations of 1e6 leave float32.
    if not 1 <= p <= 4:
        raise ValueError(f"`p` must be in [1, 4], got {p}.")


def attention_map(feature: Tensor, pool: Pool, p: float) -> Tensor:
    """`[batch, channels, h, w]` to `[batch, 1, h, w]`: sum |f|, sum |f|^p or max |f|^p over channels."""
    size = feature.abs()
    if pool == "sum":
        return size.sum(1, keepdim=True)
    if pool == "sum_p":
        return size.pow(p).sum(1, keepdim=True)
    return size.amax(1, keepdim=True).pow(p)
