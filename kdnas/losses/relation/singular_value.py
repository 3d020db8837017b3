"""Relations between the leading singular vectors of consecutive stages (KD-SVD)."""

from collections.abc import Mapping
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from kdnas.losses.relation.base import LayerRelation
from kdnas.losses.stage_pairs import Pairs
from kdnas.numerics import rescale, safe_normalize

# Of the largest singular value: below it a vector is rounding, and counts as absent.
ABSENT = 1e-5
# Of the largest squared singular value: gaps below it are damped in the gradient.
DAMPING = 1e-4


@final
class SingularValue(LayerRelation):
    r"""Squared difference of the relations between singular vectors of consecutive stages (KD-SVD).

    Each map as a matrix $X \in R^{hw \times C}$, $X = U S V^\top$: the first $k$ right vectors of the teacher,
    weighted by $\sigma = s_{1..k} / |s_{1..k}|$; for each of them the student's vector of the largest $|\cos|$ among
    its first $k + 3$, with the sign of that cosine and the same weight. Between consecutive stages
    $R_{bijn} = \exp(-(V^{(1)}_{bin} - V^{(2)}_{bjn})^2 / 8)$, and
    $L = \sum_{\text{relations}} w \frac{1}{B} \sum_{bijn} (R^s_{bijn} - R^t_{bijn})^2$.

    Shapes: maps `[batch, channels, h, w]` or tokens; $R$ is `[batch, channels, channels, k]`, the peak.
    Divisor: batch; a sum over both channel counts and the vectors.
    A singular vector has no sign, so every vector is first multiplied by the sign of its largest entry: the value does
    not depend on the linear algebra library. A zero map has no vectors (zeros, gradient 0); equal singular values
    have no unique ones: the value is that of some choice, and the gradient stays finite.

    The vectors come from the eigenvectors of the smaller Gram matrix, in float64 (as exact as a singular value
    decomposition in float32). Their gradient divides by gaps $d$ between squared singular values; here by
    $(d^2 + \epsilon^2) / d$ with $\epsilon = 10^{-4} s_1^2$.

    Default weight 1: the authors' and mdistiller's.

    Args:
        taps: how stages are paired: `resolution` (default), `rdm`, `order` or explicit pairs, as in `StagePairs`.
        weights: one weight per relation; default None: 1 each.
        num_vectors: $k$, at least 1; default 1, as in all of the authors' runs.
        num_spare: number of further student vectors among which the match is searched; default 3.

    Raises:
        ValueError: fewer than two pairs of stages, a map with fewer than $k$ channels or positions, or counts that
            are not positive.

    Reference: Lee, Kim, Song, Self-supervised Knowledge Distillation Using Singular Value Decomposition, ECCV 2018,
        section 3.
    Differs: canonical signs; the authors' value depends on those of the library (the same inputs gave 0.264 and 0.027).
        Divided by the batch. Where channels differ, a 1x1 convolution on the student. As in the
        authors' code, each parameter's gradient is clipped to the norm of its task gradient, by `Objective`; their
        factor sigmoid(epoch) is left out.
    """

    ranges: ClassVar[Mapping[str, str]] = {"num_vectors": "[1, inf)", "num_spare": "[0, inf)"}
    golden: ClassVar[float | None] = 0.09796979987625365
    clipped: ClassVar[bool] = True

    def __init__(
        self,
        *,
        taps: str | Pairs = "resolution",
        weights: tuple[float, ...] | None = None,
        num_vectors: int = 1,
        num_spare: int = 3,
    ) -> None:
        super().__init__(taps=taps, weights=weights)
        self.num_vectors, self.num_spare = num_vectors, num_spare

    def describe(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """The matched vectors of the student and the teacher's, both weighted, `[batch, channels, k]` each."""
        values, target = leading_vectors(teacher, self.num_vectors)
        spare = min(self.num_vectors + self.num_spare, *student.flatten(2).shape[1:])
        mine = match(leading_vectors(student, spare)[1], target)
        sigma = safe_normalize(values)[:, None]
        return mine * sigma, target * sigma

    def relate(self, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], index: int) -> Tensor:
        """The squared difference of the relations between two stages, summed per sample."""
        student, teacher = (
            torch.exp(-(v[:, :, None] - w[:, None]).square() / 8) for v, w in zip(first, second, strict=True)
        )
        return (student - teacher).square().sum((1, 2, 3)).mean()


def leading_vectors(maps: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first singular values and right singular vectors of every sample's map, positions by channels.

    `[batch, channels, h, w]` to `[batch, count]` (in units of the map's largest entry, descending) and
    `[batch, channels, count]`, with canonical signs. Vectors without a singular value are 0.

    Raises:
        ValueError: a map has fewer channels or positions than `count`.
    """
    channels, positions = maps.flatten(2).shape[1:]
    if count > min(channels, positions):
        raise ValueError(
            f"a map of {channels} channels and {positions} positions has fewer than {count} singular vectors. "
            "Use a smaller num_vectors, or pair larger stages."
        )
    # Squaring halves the digits: float64 keeps those of a float32 decomposition.
    rows = rescale(maps.flatten(2).double(), (1, 2))
    if channels <= positions:
        squares, vectors = _Eigh.apply(rows @ rows.transpose(1, 2))
        vectors = vectors[..., -count:].flip(-1)
    else:
        squares, left = _Eigh.apply(rows.transpose(1, 2) @ rows)
        vectors = safe_normalize(rows @ left[..., -count:].flip(-1), 1)
    squares = squares[:, -count:].flip(-1).clamp_min(0)
    exists = squares > ABSENT**2 * squares[:, :1]
    values = torch.where(exists, torch.where(exists, squares, 1).sqrt(), 0)
    vectors = torch.where(exists[:, None], canonical(vectors), 0)
    return values.to(maps.dtype), vectors.to(maps.dtype)


def canonical(vectors: Tensor) -> Tensor:
    """Vectors `[batch, channels, count]` with signs such that the entry of largest magnitude is positive.

    Of entries equal within rounding the first counts.
    """
    size = vectors.detach().abs()
    first = (size >= (1 - 1e-5) * size.amax(1, keepdim=True)).double().argmax(1, keepdim=True)
    return torch.where(vectors.detach().gather(1, first) < 0, -vectors, vectors)


def match(student: Tensor, teacher: Tensor) -> Tensor:
    """For each of the teacher's vectors the student's of largest |cosine|, with the sign of that cosine.

    `[batch, channels, m]` and `[batch, channels, k]` to `[batch, channels, k]`.
    """
    cosines = (teacher.transpose(1, 2) @ student).detach()
    best = cosines.abs().argmax(2, keepdim=True)
    chosen = student.gather(2, best.transpose(1, 2).expand(-1, student.shape[1], -1))
    return torch.where(cosines.gather(2, best).transpose(1, 2) < 0, -chosen, chosen)


class _Eigh(torch.autograd.Function):
    """Eigenvalues, ascending, and eigenvectors of symmetric matrices; finite gradients for equal eigenvalues."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(matrix)
        ctx.save_for_backward(values, vectors)
        return values, vectors

    @staticmethod
    def backward(ctx: Any, of_values: Tensor, of_vectors: Tensor) -> Tensor:  # type: ignore[override]
        values, vectors = ctx.saved_tensors
        gap = values[:, None, :] - values[:, :, None]
        damped = gap.square() + (DAMPING * values[:, -1, None, None]).square()
        # 1 / gap where the gap is wide, towards 0 where it closes; 0 for the zero matrix.
        inverse = torch.where(damped > 0, gap / torch.where(damped > 0, damped, 1), 0)
        inner = inverse * (vectors.transpose(1, 2) @ of_vectors) + torch.diag_embed(of_values)
        gradient = vectors @ inner @ vectors.transpose(1, 2)
        return (gradient + gradient.transpose(1, 2)) / 2
