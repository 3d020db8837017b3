"""From images to a network's input: part of every teacher and every student."""

from dataclasses import dataclass
from typing import Literal, final, get_args

Interpolation = Literal["bicubic", "bilinear", "nearest"]


@final
@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Images with values in [0, 1] are resized to `height` x `width`, then `(image - mean) / std` per channel.

    Attributes:
        height: pixels.
        width: pixels.
        mean: one number per channel, on the scale [0, 1].
        std: one positive number per channel.
        interpolation: how they are resized: `bicubic` or `bilinear`, both antialiased, or `nearest`.
    """

    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Interpolation = "bicubic"

    def __post_init__(self) -> None:
        if self.interpolation not in get_args(Interpolation):
            known = ", ".join(get_args(Interpolation))
            raise ValueError(f"`interpolation` must be one of {known}, got {self.interpolation!r}.")
        if self.height < 1 or self.width < 1:
            raise ValueError(f"`height` and `width` must be at least 1, got {self.height} and {self.width}.")
        if len(self.mean) != len(self.std) or not self.mean:
            raise ValueError(f"`mean` and `std` must have one number per channel, got {self.mean} and {self.std}.")
        if min(self.std) <= 0:
            raise ValueError(f"`std` must be positive, got {self.std}. A constant channel cannot be normalised.")
