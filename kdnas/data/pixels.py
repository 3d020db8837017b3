"""Images in the forms that people hand over, as the tensors of a data set."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdnas.tasks.labels import as_tensor

_FEW = 4  # channels of a gray, gray-alpha, colour or colour-alpha image


def as_pixels(images: Any) -> Tensor:
    """Images as a tensor `[count, channels, height, width]`, uint8 or floats in [0, 1].

    uint8 and floats keep their type, bool becomes 0 and 255, uint16 is divided by 65,535. Channels may be the last axis
    of a numpy array; `[count, height, width]` is gray.

    Args:
        images: a tensor, a numpy array, or a sequence of either.

    Raises:
        ValueError: another type or shape, values outside [0, 1], NaN, or channels that are the last axis of a tensor.

    Example:
        >>> as_pixels(np.zeros((2, 8, 8, 3), np.uint8)).shape
        torch.Size([2, 3, 8, 8])
        >>> as_pixels(torch.full((1, 1, 2, 2), 255.0))
        Traceback (most recent call last):
        ValueError: float `images` must be in [0, 1], got 255 to 255. Divide by 255.
    """
    pixels = _channels_first(as_tensor(images, "images"), isinstance(images, Tensor))
    kind = str(pixels.dtype).removeprefix("torch.")
    if pixels.dtype is torch.uint8 or not len(pixels):
        return pixels
    if pixels.dtype is torch.bool:
        return pixels.to(torch.uint8) * 255
    if pixels.dtype is torch.uint16:
        return pixels.float() / 65_535
    if pixels.is_complex():
        raise ValueError(f"`images` must be uint8, uint16, bool, or floats in [0, 1], got {kind}.")
    if pixels.is_floating_point():
        pixels = pixels if pixels.element_size() > 1 else pixels.float()
        _check_floats(pixels)
        return pixels
    low, high = int(pixels.long().min()), int(pixels.long().max())
    fix = "Convert them to uint8" if 0 <= low and high <= 255 else "Divide by the largest value they can have"
    raise ValueError(
        f"`images` must be uint8, uint16, bool, or floats in [0, 1], got {kind} from {low} to {high}. {fix}."
    )


def _check_floats(pixels: Tensor) -> None:
    broken = ~torch.isfinite(pixels).flatten(1).all(1)
    if broken.any():
        raise ValueError(
            f"`images` must be finite: {int(broken.sum())} of {len(pixels)} hold NaN or infinity, first number "
            f"{int(broken.nonzero()[0])}. Remove or repair them."
        )
    low, high = float(pixels.min()), float(pixels.max())
    if low < 0 or high > 1:
        largest = "255" if high > 128 else "the largest value they can have"
        fix = f"Divide by {largest}" if low >= 0 and high > 2 else "Clamp them" if -0.5 < low and high < 1.5 else ""
        fix = fix or "Hand over pixels that are not normalised: kdnas normalises them"
        raise ValueError(f"float `images` must be in [0, 1], got {low:.3g} to {high:.3g}. {fix}.")


def _channels_first(images: Tensor, as_tensor: bool) -> Tensor:
    """`[count, channels, height, width]`.

    Raises:
        ValueError: another number of axes, an empty one, or it is not clear which one holds the channels.
    """
    if images.dim() == 3:
        images = images[:, None]
    if images.dim() != 4 or 0 in images.shape[1:]:
        raise ValueError(f"`images` must be [count, channels, height, width], got {tuple(images.shape)}.")
    if not channels_are_last(images.shape[1:]):
        return images
    if as_tensor:
        raise ValueError(
            f"`images` must be [count, channels, height, width], got {tuple(images.shape)}, where the channels seem to "
            "be last. Use images.permute(0, 3, 1, 2)."
        )
    return images.permute(0, 3, 1, 2).contiguous()


def channels_are_last(shape: Sequence[int]) -> bool:
    """Whether three axes of an image are height, width and channels rather than channels, height and width.

    Four or fewer channels are recognised by their number, more by the other two axes, if these are equal.

    Example:
        >>> channels_are_last((16, 16, 3)), channels_are_last((3, 16, 16)), channels_are_last((13, 64, 64))
        (True, False, False)
    """
    first, middle, last = shape
    if first <= _FEW or last <= _FEW:
        return first > _FEW
    return first == middle != last
