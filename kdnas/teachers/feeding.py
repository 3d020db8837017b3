"""How a network takes images whose file says their shape only."""

from typing import Literal

from kdnas.preprocessing import Preprocessing

Normalisation = Literal["data", "imagenet", "none"]

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def fed(shape: tuple[int, int, int], data: Preprocessing, normalise: Normalisation, name: str) -> Preprocessing:
    """The preprocessing of a network for images of this shape.

    Args:
        shape: channels, height and width.
        data: the preprocessing of the data.
        normalise: by mean and standard deviation of the data, by those of ImageNet, or not at all: values in [0, 1],
            for a network that does it inside.
        name: the teacher's, for messages.

    Raises:
        ValueError: the network takes another number of channels than can be normalised so, or another word.

    Example:
        >>> fed((3, 64, 64), Preprocessing(height=8, width=8, mean=(0.5,), std=(0.2,)), "none", "mine").mean
        (0.0, 0.0, 0.0)
    """
    channels, height, width = shape
    ways = {"data": (data.mean, data.std), "imagenet": _IMAGENET, "none": ((0.0,) * channels, (1.0,) * channels)}
    if normalise not in ways:
        raise ValueError(f"`normalise` must be one of {', '.join(ways)}, got {normalise!r}.")
    mean, std = ways[normalise]
    if len(mean) == 1 < channels:  # gray data, repeated
        mean, std = mean * channels, std * channels
    if len(mean) != channels:
        raise ValueError(f"{name} takes {channels} channels, which {normalise!r} cannot normalise. Use normalise=none.")
    return Preprocessing(height=height, width=width, mean=mean, std=std)
