"""Images and labels in the forms that people hand over, as the tensors of a data set."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_MOST_LABEL = 2**62
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
    pixels = _channels_first(_tensor(images, "images"), isinstance(images, Tensor))
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


def _tensor(values: Any, name: str) -> Tensor:
    """Values as a tensor on the CPU."""
    if isinstance(values, Tensor):
        if values.layout is not torch.strided or values.is_quantized or values.is_meta:
            kind = "quantized" if values.is_quantized else "on the meta device" if values.is_meta else "sparse"
            raise ValueError(f"`{name}` must be a dense tensor of numbers, got one that is {kind}.")
        return values.detach().cpu()
    if isinstance(values, Sequence) and len(values) and all(isinstance(value, Tensor) for value in values):
        shapes = {tuple(value.shape) for value in values}
        if len(shapes) > 1:
            raise ValueError(f"`{name}` must have one shape, got {sorted(shapes)[:3]}. Resize them.")
        return torch.stack(list(values)).detach().cpu()
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ValueError(f"`{name}` must have one shape ({error}). Resize them.") from error
    if np.ma.is_masked(values):
        raise ValueError(f"`{name}` must have no masked values. Fill them: {name}.filled(0).")
    if array.dtype.kind == "O" and array.size and all(isinstance(v, int | float | np.number) for v in array.flat):
        array = np.array(array.tolist())
    if array.dtype.kind not in "biufc":
        example = str(array.flat[0])[:60] if array.size else ""
        raise ValueError(
            f"`{name}` must be numbers in a tensor or an array, got {example!r} of type {array.dtype}."
            + (" Give each image the place of its class in `class_names`." if name == "labels" else "")
        )
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    # torch knows the machine's byte order and positive strides only, and warns of arrays it may not write to.
    return torch.from_numpy(np.array(array, array.dtype.newbyteorder("="), copy=True, order="C"))


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


def as_labels(labels: Any, count: int) -> Tensor:
    """Class indices `[count]`, int64, from a tensor, an array or a sequence of whole numbers, also as a column.

    Args:
        labels: `[count]` or `[count, 1]`; integers, bool, or floats that are whole numbers.
        count: number of images.

    Raises:
        ValueError: another shape or number, several values per image, or values that are no whole numbers.

    Example:
        >>> as_labels([[2], [0]], 2)
        tensor([2, 0])
        >>> as_labels(torch.eye(3), 3)
        Traceback (most recent call last):
        ValueError: `labels` must be one class index per image, got shape (3, 3), one-hot. Use labels.argmax(1).
    """
    indices = _tensor(labels, "labels")
    if indices.dim() == 2 and indices.shape[1] == 1:
        indices = indices[:, 0]
    if indices.dim() != 1:
        binary = bool(((indices == 0) | (indices == 1)).all())
        one_hot = indices.dim() == 2 and binary and bool((indices.sum(1) == 1).all())
        fix = ", one-hot. Use labels.argmax(1)" if one_hot else ", not one class each. kdnas trains on single labels"
        raise ValueError(f"`labels` must be one class index per image, got shape {tuple(indices.shape)}{fix}.")
    if len(indices) != count:
        raise ValueError(f"`labels` must be as many as images, got {len(indices)} labels for {count} images.")
    if indices.is_complex():
        raise ValueError("`labels` must be whole numbers, got complex ones.")
    if indices.is_floating_point():
        broken = (indices != indices.round()) | ~torch.isfinite(indices)
        if broken.any():
            raise ValueError(
                f"`labels` must be whole numbers, image {int(broken.nonzero()[0])} has {float(indices[broken][0]):g}."
            )
    numbers = indices.double()  # torch compares no unsigned integers of more than 8 bits
    if len(numbers) and float(numbers.abs().max()) > _MOST_LABEL:
        raise ValueError(f"`labels` must be below 2^62, got {float(numbers[numbers.abs().argmax()]):g}.")
    return indices.long()
