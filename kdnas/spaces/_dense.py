"""What families of networks that classify every pixel have in common."""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

from kdnas.architecture import Architecture
from kdnas.space import SearchSpace, Sizes


@dataclass(frozen=True, kw_only=True)
class DenseSpace(SearchSpace):
    """Networks that take images of any size.

    Attributes:
        size: height and width of the images that costs are counted at.
    """

    size: Sizes = (128, 128)

    dense: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resolutions != (32,):
            raise ValueError(
                "`resolutions` (--size) must be left out for networks that take images of any size: the data give "
                "their size."
            )
        if len(self.size) != 2:
            raise ValueError(f"`size` must be height and width, got {self.size!r}.")

    def size_of(self, architecture: Architecture) -> tuple[int, int]:
        """The size of the data's images."""
        del architecture
        height, width = self.size
        return height, width

    def fitted(self, *, classes: int, image_channels: int, size: tuple[int, int] | None = None) -> Self:
        """The same space for data with other classes, channels and size."""
        return replace(self, classes=classes, image_channels=image_channels, size=size or self.size)
