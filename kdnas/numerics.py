"""Normalisation, norms and distances that are finite, with finite gradients, on every finite input.

NaN stays NaN, and an infinite entry gives NaN: a comparison such as `squares > 0` is false for NaN, which would make a
vector of NaN a zero vector.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """Half precision to float32; float32 and float64 stay as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def rescale(x: Tensor, dim: int | tuple[int, ...] = -1) -> Tensor:
    """Each vector along `dim` divided by its largest absolute entry, which is held constant.

    Squares of the result neither overflow nor underflow; a zero vector stays zero.
    """
    largest = x.detach().abs().amax(dim, keepdim=True)
    return x / torch.where(largest > 0, largest, 1.0)


def safe_normalize(x: Tensor, dim: int = -1) -> Tensor:
    """Each vector along `dim` divided by its Euclidean norm; the zero vector has value 0 and gradient 0.

    `F.normalize` divides by max(norm, 1e-12): its slope at a dead row is 1e12. Squares neither overflow nor underflow.
    Differentiable twice.
    """
    return _Normalized.apply(x, dim)[0]


class _Normalized(torch.autograd.Function):
    """$y = x r$ and $r = 1 / |x|$; by hand, as every tensor of the size of `x` costs a good part of the whole."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        largest = torch.maximum(x.amax(dim, keepdim=True), -x.amin(dim, keepdim=True))
        scale = torch.where(largest > 0, largest, 1.0)
        y = x / scale
        length = torch.linalg.vector_norm(y, dim=dim, keepdim=True)
        alive = length != 0  # NaN is alive
        inverse = torch.where(alive, 1 / torch.where(alive, length, 1.0), 0.0)
        y *= inverse
        inverse /= scale
        ctx.dim = dim
        ctx.save_for_backward(y, inverse)
        return y, inverse

    @staticmethod
    def backward(ctx: Any, of_y: Tensor, of_inverse: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        # In terms of the outputs, so that a second derivative follows from the first one's rules.
        y, inverse = ctx.saved_tensors
        along = (of_y * y).sum(ctx.dim, keepdim=True) + of_inverse * inverse
        gradient = torch.addcmul(of_y, y, along, value=-1)
        return gradient * inverse if torch.is_grad_enabled() else gradient.mul_(inverse), None


def safe_sqrt(x: Tensor) -> Tensor:
    """Square root with gradient 0, not infinity, where `x` is 0."""
    positive = ~(x <= 0)  # of NaN too
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)


def safe_norm(x: Tensor, dim: int | tuple[int, ...] = -1) -> Tensor:
    """Euclidean norm along `dim` with gradient 0 at the zero vector; squares do not overflow."""
    largest = x.detach().abs().amax(dim, keepdim=True)
    scale = torch.where(largest > 0, largest, 1.0)
    norm = safe_sqrt((x / scale).square().sum(dim))
    return norm * scale.reshape(norm.shape)


def centre(x: Tensor, dim: int = -1) -> Tensor:
    """Each vector along `dim` minus its mean; a vector of equal entries becomes exactly 0.

    `x - x.mean()` leaves one rounding error in each entry of a constant vector, which normalising blows up.
    """
    x = x - x.narrow(dim, 0, 1).detach()
    return x - x.mean(dim, keepdim=True)


def pairwise_distances(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Euclidean distances between rows, `[batch, dims]` to `[batch, batch]`.

    From differences: |a|^2 + |b|^2 - 2ab loses half the digits. Exactly 0, with gradient 0, between equal
    rows; squares do not overflow; memory batch^2. Differentiable once.
    """
    other = x if y is None else y
    largest = torch.maximum(x.detach().abs().amax(), other.detach().abs().amax())
    scale = torch.where(largest > 0, largest, 1.0)
    return torch.cdist(x / scale, other / scale, compute_mode="donot_use_mm_for_euclid_dist") * scale


def squared_distances(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Squared Euclidean distances between rows, `[..., n, dims]` to `[..., n, m]`, by matrix products.

    Never negative, exactly 0 where all rows are equal; memory n * m. Use `pairwise_distances` where the
    square root is taken.
    """
    other = x if y is None else y
    # Closer to the origin there is less cancellation; one row first, so that equal rows become exact zeros.
    for origin in (x.detach()[..., :1, :], (x - x[..., :1, :]).detach().mean(-2, keepdim=True)):
        x, other = x - origin, other - origin
    squares = x.square().sum(-1)[..., :, None] + other.square().sum(-1)[..., None, :]
    return (squares - 2 * x @ other.transpose(-1, -2)).clamp_min(0)


def flat(x: Tensor) -> Tensor:
    """`[batch, ...]` to `[batch, dims]`."""
    return x.flatten(1)


def same_positions(student: Tensor, teacher: Tensor, mode: str = "average") -> tuple[Tensor, Tensor]:
    """Two feature maps `[batch, channels, height, width]`, pooled to the smaller height and the smaller width.

    Args:
        student: the student's map.
        teacher: the teacher's map.
        mode: `average` or `max` pooling.
    """
    size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
    pool = {"average": F.adaptive_avg_pool2d, "max": F.adaptive_max_pool2d}[mode]
    return (
        student if student.shape[2:] == size else pool(student, size),
        teacher if teacher.shape[2:] == size else pool(teacher, size),
    )


def as_map(feature: Tensor, aspect: float = 1.0) -> Tensor:
    """Tokens `[batch, tokens, channels]` as a map `[batch, channels, height, width]`; a map stays as it is.

    Tokens are arranged row by row on the grid whose height / width is nearest to `aspect`, the wider of two; one
    leading class token is dropped if only the other tokens fill such a grid exactly.

    Args:
        feature: a map, tokens, or a vector per sample, which becomes a map of one position.
        aspect: height / width of the images, 1 for square ones.

    Raises:
        ValueError: for another number of dimensions.
    """
    if feature.dim() == 4:
        return feature
    if feature.dim() == 2:
        return feature[:, :, None, None]
    if feature.dim() != 3:
        raise ValueError(f"a feature map must have 2, 3 or 4 dimensions, got shape {tuple(feature.shape)}.")
    tokens = feature.shape[1]
    height, misfit = _grid(tokens, aspect)
    if misfit > 1e-9 and tokens > 1 and _grid(tokens - 1, aspect)[1] <= 1e-9:
        feature, tokens = feature[:, 1:], tokens - 1
        height, _ = _grid(tokens, aspect)
    return feature.transpose(1, 2).unflatten(2, (height, tokens // height))


def _grid(tokens: int, aspect: float) -> tuple[int, float]:
    """The height of the best grid, and the distance of its aspect from `aspect`."""
    heights = [h for h in range(1, tokens + 1) if tokens % h == 0]
    misfits = [abs(math.log(h * h / tokens / aspect)) for h in heights]
    # Rounded, so that of two equally good grids the first, the wider, wins.
    best = min(range(len(heights)), key=lambda i: round(misfits[i], 9))
    return heights[best], misfits[best]
