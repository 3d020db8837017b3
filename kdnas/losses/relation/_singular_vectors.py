"""The leading singular vectors of feature maps, with their gradient."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdnas.numerics import rescale, safe_normalize

# Of the largest singular value: below it a vector is rounding, and counts as absent.
ABSENT = 1e-5
# Of the largest squared singular value: gaps below it are damped in the gradient.
DAMPING = 1e-4
# Maps of fewer channels or positions are decomposed in full.
SMALL = 64
# Bound on the error of a vector of the iteration, its residual over its gap.
TOLERANCE = 1e-4
# Of the largest squared singular value: at smaller gaps the damping, which the iteration's gradient lacks, is 0.25 %.
LEAST_GAP = 20 * DAMPING
# Of the iteration: vectors beyond those asked for, degree of the filter, rounds at most.
SPARE, DEGREE, ROUNDS = 8, 3, 9
# Of the gradient: steps of conjugate gradients at most, and their relative residual.
STEPS, RESIDUAL = 100, 1e-5


def leading_vectors(maps: Tensor, count: int, like: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The first singular values and right singular vectors of every sample's map, positions by channels.

    `[batch, channels, h, w]` to `[batch, count]` (in units of the map's largest entry, descending, without gradient)
    and `[batch, channels, count]`, with canonical signs. Vectors without a singular value are 0.

    Float32 maps of at least 64 channels and positions go through a subspace iteration, whose gradient is that of the
    implicit formula: vectors within 1e-4 of the exact ones, gradients within 0.3 %, mostly 1e-6. A sample of which that
    cannot be shown, one with near-equal singular values for example, is decomposed in full, in float64; so are all
    others.

    Args:
        maps: feature maps.
        count: number of vectors.
        like: vectors `[batch, channels, k]`: not the first `count` but, for each of these, that of them with the
            largest absolute cosine, and with the sign of that cosine, `[batch, k]` and `[batch, channels, k]`.

    Raises:
        ValueError: a map has fewer channels or positions than `count`.
    """
    channels, positions = maps.flatten(2).shape[1:]
    if count > min(channels, positions):
        raise ValueError(
            f"a map of {channels} channels and {positions} positions has fewer than {count} singular vectors. "
            "Use a smaller num_vectors, or pair larger stages."
        )
    rows = rescale(maps.flatten(2), (1, 2))
    if maps.dtype == torch.float64 or min(channels, positions) < SMALL:
        return _in_full(rows, count, like)
    subspace = _iterated(rows.detach(), count, like)
    index, factor = _choice(subspace.squares, subspace.vectors, like)
    vectors = _Implicit.apply(rows, *subspace[:3], index) * factor
    values = subspace.squares.gather(1, index).clamp_min(0).sqrt() * factor[:, 0].abs()
    if not subspace.enough.all():
        hard = (~subspace.enough).nonzero()[:, 0]
        exact = _in_full(rows[hard], count, None if like is None else like[hard])
        values, vectors = values.index_put((hard,), exact[0]), vectors.index_put((hard,), exact[1])
    return values, vectors


def signs(vectors: Tensor) -> Tensor:
    """`[batch, channels, count]` to `[batch, count]`: the sign of the entry of largest magnitude, 1 for a zero vector.

    Of entries equal within rounding the first counts.
    """
    size = vectors.abs()
    first = (size >= (1 - 1e-5) * size.amax(1, keepdim=True)).double().argmax(1, keepdim=True)
    return torch.where(vectors.gather(1, first)[:, 0] < 0, -1.0, 1.0).to(vectors)


@torch.no_grad()
def _choice(squares: Tensor, vectors: Tensor, like: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which vectors are asked for, `[batch, k]`, and their factors: a sign, or 0 if absent, `[batch, 1, k]`."""
    exists = squares > ABSENT**2 * squares[:, :1]
    factor = signs(vectors) * exists
    if like is None:
        return torch.arange(vectors.shape[2], device=vectors.device).expand(len(vectors), -1), factor[:, None]
    cosines = like.transpose(1, 2) @ (vectors * factor[:, None])
    best = cosines.abs().argmax(2)
    turned = torch.where(cosines.gather(2, best[..., None])[..., 0] < 0, -1, 1)
    return best, (factor.gather(1, best) * turned)[:, None]


def _columns(vectors: Tensor, index: Tensor) -> Tensor:
    return vectors.gather(2, index[:, None].expand(-1, vectors.shape[1], -1))


def _in_full(rows: Tensor, count: int, like: Tensor | None) -> tuple[Tensor, Tensor]:
    """Values and vectors from all eigenvectors of the smaller Gram matrix."""
    # Squaring halves the digits: float64 keeps those of a float32 decomposition.
    wide = rows.double()
    if rows.shape[1] <= rows.shape[2]:
        squares, vectors = _Eigh.apply(wide @ wide.transpose(1, 2))
        vectors = vectors[..., -count:].flip(-1)
    else:
        squares, left = _Eigh.apply(wide.transpose(1, 2) @ wide)
        vectors = safe_normalize(wide @ left[..., -count:].flip(-1), 1)
    squares = squares[:, -count:].flip(-1)
    index, factor = _choice(squares, vectors, None if like is None else like.double())
    values = squares.gather(1, index).clamp_min(0).sqrt() * factor[:, 0].abs()
    return values.to(rows.dtype), (_columns(vectors, index) * factor).to(rows.dtype)


class _Subspace(NamedTuple):
    vectors: Tensor  # [batch, channels, count]
    squares: Tensor  # [batch, count]
    settled: Tensor  # [batch, count]: this vector and all before it are within the tolerance
    enough: Tensor  # [batch]: the vectors that are asked for are


@torch.no_grad()
def _iterated(rows: Tensor, count: int, like: Tensor | None) -> _Subspace:
    """The first vectors by subspace iteration with a Chebyshev filter; the basis is `[batch, vectors, channels]`."""
    columns = rows.transpose(1, 2)
    generator = torch.Generator().manual_seed(0)
    sketch = torch.randn(count + SPARE, rows.shape[2], generator=generator).to(rows)
    sketch[0] = 1  # the mean over positions, near to the first vector of rectified maps
    basis = _orthonormal(sketch.expand(len(rows), -1, -1).bmm(columns))
    for remaining in reversed(range(ROUNDS)):
        images = basis @ rows
        squares, turn = torch.linalg.eigh((images @ images.transpose(1, 2)).double())
        squares, turn = squares.flip(-1).to(rows), turn.flip(-1).transpose(1, 2).to(rows)
        basis, applied = turn @ basis, turn @ images @ columns
        error = (applied - basis * squares[..., None]).square().sum(2).sqrt()[:, :count]
        gaps = squares[:, :-1] - squares[:, 1:]
        gap = torch.minimum(gaps[:, :count], torch.cat([gaps[:, :1], gaps[:, : count - 1]], 1))
        settled = (error <= TOLERANCE * gap) & (gap >= LEAST_GAP * squares[:, :1])
        settled = settled.cumprod(1).bool()
        vectors = basis[:, :count].transpose(1, 2)
        enough = _enough(vectors, settled, like)
        if not remaining or enough.all():
            break
        basis = _orthonormal(_filtered(rows, squares, basis, applied))
    return _Subspace(vectors, squares[:, :count], settled, enough)


def _orthonormal(basis: Tensor) -> Tensor:
    return torch.linalg.qr(basis.transpose(1, 2))[0].transpose(1, 2)


def _filtered(rows: Tensor, squares: Tensor, basis: Tensor, applied: Tensor) -> Tensor:
    """The Chebyshev polynomial that is at most 1 on [0, end], of the matrix, times the basis."""
    # Larger squares grow at most by its value at 200, so that float32 keeps the smaller ones.
    end = torch.maximum(squares[:, -1], 0.01 * squares[:, 0])[:, None, None]
    scale = torch.where(end > 0, 2 / end, 0)
    before, now = basis, scale * applied - basis
    for _ in range(DEGREE - 1):
        before, now = now, 2 * (scale * (now @ rows @ rows.transpose(1, 2)) - now) - before
    return now


def _enough(vectors: Tensor, settled: Tensor, like: Tensor | None) -> Tensor:
    """Whether the vectors that are asked for are settled, per sample."""
    if like is None:
        return settled.all(1)
    cosines, best = (like.transpose(1, 2) @ vectors).square().max(2)
    # Squared cosines with orthogonal vectors sum to at most 1: above 1/2 no other vector can match better.
    return settled.all(1) | (settled.gather(1, best) & (cosines > 0.51)).all(1)


class _Implicit(torch.autograd.Function):
    r"""Some of the known eigenvectors $u_j$ of $A = X X^\top$, with their gradient to $X$.

    The cotangent $g_j$ of $u_j$ gives $Z_j = (\lambda_j - A)^+ g_j$ and the gradient $Z (X^\top U)^\top + U (X^\top
    Z)^\top$. In the span of the settled vectors $Z$ is explicit. Outside of it $\lambda_j - A$ is positive definite, as
    all vectors of larger eigenvalues are settled, and conjugate gradients solve for it.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, rows: Tensor, vectors: Tensor, squares: Tensor, settled: Tensor, index: Tensor
    ) -> Tensor:
        ctx.save_for_backward(rows, vectors * settled[:, None], squares, chosen := _columns(vectors, index), index)
        return chosen.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows, known, squares, chosen, index = ctx.saved_tensors
        own = squares.gather(1, index)
        inside = known.transpose(1, 2) @ cotangent
        solution = known @ (inside * _damped_inverse(own[:, None] - squares[..., None], squares[:, :1, None]))
        outside = (cotangent - known @ inside).transpose(1, 2)
        solution += _solved(rows, known, squares, own[..., None], outside).transpose(1, 2)
        left, right = torch.cat([solution, chosen], 2), torch.cat([chosen, solution], 2).transpose(1, 2)
        return left @ (right @ rows), None, None, None, None


def _solved(rows: Tensor, known: Tensor, squares: Tensor, own: Tensor, right: Tensor) -> Tensor:
    r"""The rows $z$ of $(\lambda - X X^\top) z$ = `right`, `[batch, k, channels]`, by conjugate gradients.

    With $\lambda$ for the eigenvalues of the known vectors, to which `right` is orthogonal, the matrix is positive
    definite in the presence of rounding too.
    """
    shifted = known * squares[:, None]
    solution, residual, direction = torch.zeros_like(right), right, right
    size = residual.square().sum(2, keepdim=True)
    end = RESIDUAL**2 * size
    for _ in range(STEPS):
        applied = own * direction - direction @ rows @ rows.transpose(1, 2)
        applied += direction @ shifted @ known.transpose(1, 2)
        curvature = (direction * applied).sum(2, keepdim=True)
        running = (size > end) & (curvature > 0)
        if not running.any():
            break
        step = torch.where(running, size / torch.where(running, curvature, 1), 0)
        solution, residual = solution + step * direction, residual - step * applied
        before, size = size, residual.square().sum(2, keepdim=True)
        direction = residual + torch.where(running, size / torch.where(running, before, 1), 0) * direction
    return solution


def _damped_inverse(gap: Tensor, largest: Tensor) -> Tensor:
    """1 / gap where the gap is wide, towards 0 where it closes; 0 for the zero matrix."""
    damped = gap.square() + (DAMPING * largest).square()
    return torch.where(damped > 0, gap / torch.where(damped > 0, damped, 1), 0)


class _Eigh(torch.autograd.Function):
    """Eigenvalues, ascending, and eigenvectors of symmetric matrices; finite gradients for equal eigenvalues."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(matrix)
        ctx.save_for_backward(values, vectors)
        ctx.mark_non_differentiable(values)
        return values, vectors

    @staticmethod
    def backward(ctx: Any, _: Any, of_vectors: Tensor) -> Tensor:  # type: ignore[override]
        values, vectors = ctx.saved_tensors
        gap = values[:, None, :] - values[:, :, None]
        inner = _damped_inverse(gap, values[:, -1:, None]) * (vectors.transpose(1, 2) @ of_vectors)
        gradient = vectors @ inner @ vectors.transpose(1, 2)
        return (gradient + gradient.transpose(1, 2)) / 2
