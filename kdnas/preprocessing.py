"""From images to a network's input: part of every teacher and every student."""

from dataclasses import dataclass
from typing import Annotated, Literal, final

from kdnas.values import Range, Size, check_fields

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

    height: Size
    width: Size
    mean: Annotated[tuple[float, ...], Range()]
    std: Annotated[tuple[float, ...], Range(above=0)]
    interpolation: Interpolation = "bicubic"

    def __post_init__(self) -> None:
        check_fields(self)
        if len(self.mean) != len(self.std):
            raise ValueError(f"`mean` and `std` must have one number per channel, got {self.mean} and {self.std}.")
