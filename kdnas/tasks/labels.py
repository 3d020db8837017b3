"""Labels in the forms that people hand over, as tensors."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdnas.plain import reason

VOID = -100
"""The label of what neither is learnt nor counts."""
_MOST_LABEL = 2**62


def as_tensor(values: Any, name: str) -> Tensor:
    """Values as a tensor on the CPU.

    Args:
        values: a tensor, anything that numpy takes for an array, or a sequence of tensors.
        name: of the argument, for messages.

    Raises:
        ValueError: tensors of several shapes, sparse or quantised ones, masked values, or values that are no numbers.
    """
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
        raise ValueError(f"`{name}` must have one shape ({reason(error)}). Resize them.") from error
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
    indices = as_tensor(labels, "labels")
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
