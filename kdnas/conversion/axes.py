"""The axes of a traced tensor by their origin, so that views and permutations need no operation."""

from collections.abc import Sequence
from typing import NamedTuple


class Factor(NamedTuple):
    """A part of a dimension of an operation's output; an axis of a view is a product of such parts.

    Attributes:
        dim: `B` (batch), `C` (channels), `H` or `W`.
        size: number of its positions.
        stride: distance of two neighbours in the dimension; 1 for a whole dimension.
    """

    dim: str
    size: int
    stride: int = 1


Axes = tuple[tuple[Factor, ...], ...]
"""One entry per axis of a view, outer factors first; an axis of size 1 that no dimension stands behind is empty."""


def whole(channels: int, side: int, batch: int) -> Axes:
    """The axes of an operation's output: `[batch, channels, side, side]`, or `[batch, channels]` for side 0."""
    sizes = {"B": batch, "C": channels, **({"H": side, "W": side} if side else {})}
    return tuple((Factor(dim, size),) for dim, size in sizes.items())


def axis_size(axis: Sequence[Factor]) -> int:
    """The number of positions of an axis."""
    size = 1
    for factor in axis:
        size *= factor.size
    return size


def reshaped(axes: Axes, shape: Sequence[int]) -> Axes | None:
    """The axes of a view with another shape; None where an axis would take an uneven part of a dimension.

    Example:
        >>> x = whole(6, 2, batch=2)
        >>> [[f.dim for f in axis] for axis in reshaped(x, (2, 24))]
        [['B'], ['C', 'H', 'W']]
        >>> reshaped(x, (2, 4, 6)) is None
        True
    """
    if tuple(map(axis_size, axes)) == tuple(shape):
        return axes
    rest = [factor for axis in axes for factor in axis]
    views: list[list[Factor]] = []
    for size in shape:
        axis: list[Factor] = []
        if size == 1 and rest and rest[0].size == 1:
            axis.append(rest.pop(0))
        while size > 1:
            if not rest:
                return None
            factor = rest.pop(0)
            if size % factor.size == 0:
                axis.append(factor)
                size //= factor.size
            elif factor.size % size == 0:
                inner = factor.size // size
                axis.append(factor._replace(size=size, stride=factor.stride * inner))
                rest.insert(0, factor._replace(size=inner))
                size = 1
            else:
                return None
        views.append(axis)
    if axis_size(rest) > 1 or not views:
        return None
    views[-1] += rest
    return tuple(tuple(_merged(axis)) for axis in views)


def significant(axes: Axes) -> Axes:
    """The axes without factors of size 1."""
    return tuple(tuple(factor for factor in axis if factor.size > 1) for axis in axes)


def with_channels(axes: Axes, channels: int) -> Axes:
    """The axes with another number of channels, which must be one axis of their own."""
    return tuple((Factor("C", channels),) if any(f.dim == "C" for f in axis) else axis for axis in axes)


def channel_axis(axes: Axes, channels: int) -> int | None:
    """The axis that is all channels in their order and nothing else, or None."""
    for index, axis in enumerate(axes):
        if any(factor.dim == "C" for factor in axis):
            return index if significant((axis,)) == significant(((Factor("C", channels),),)) else None
    return None


def shuffled_groups(axis: Sequence[Factor], channels: int) -> int | None:
    """The groups of a channel shuffle with this result, `[groups, channels / groups]` transposed; None for others."""
    if len(axis) == 2 and {factor.dim for factor in axis} == {"C"} and axis_size(axis) == channels:
        inner, groups = axis
        if inner.stride == 1 and groups.stride == inner.size:
            return groups.size
    return None


def _merged(axis: Sequence[Factor]) -> list[Factor]:
    """The axis with neighbouring parts of one dimension joined."""
    joined: list[Factor] = []
    for factor in axis:
        last = joined[-1] if joined else None
        if last and last.dim == factor.dim and last.stride == factor.size * factor.stride:
            joined[-1] = Factor(factor.dim, last.size * factor.size, factor.stride)
        else:
            joined.append(factor)
    return joined
