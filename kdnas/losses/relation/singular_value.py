"""Relations between the leading singular vectors of consecutive stages (KD-SVD)."""

from collections.abc import Mapping
from typing import ClassVar, final

import torch
from torch import Tensor

from kdnas.losses.relation._singular_vectors import leading_vectors
from kdnas.losses.relation.base import LayerRelation
from kdnas.losses.stage_pairs import Pairs
from kdnas.numerics import safe_normalize

NUM_TERMS = 12


@final
class SingularValue(LayerRelation):
    r"""Squared difference of the relations between singular vectors of consecutive stages (KD-SVD).

    Each map as a matrix $X \in R^{hw \times C}$, $X = U S V^\top$: the first $k$ right vectors of the teacher,
    weighted by $\sigma = s_{1..k} / |s_{1..k}|$; for each of them the student's vector of the largest $|\cos|$ among
    its first $k + 3$, with the sign of that cosine and the same weight. Between consecutive stages
    $R_{bijn} = \exp(-(V^{(1)}_{bin} - V^{(2)}_{bjn})^2 / 8)$, and
    $L = \sum_{\text{relations}} w \frac{1}{B} \sum_{bijn} (R^s_{bijn} - R^t_{bijn})^2$.

    Shapes: maps `[batch, channels, h, w]` or tokens. $R$, `[batch, channels, channels, k]`, is not built: its
    exponential is a product of 12 powers of either side, exact to 1e-16.
    Divisor: batch; a sum over both channel counts and the vectors.
    A singular vector has no sign, so every vector is first multiplied by the sign of its largest entry: the value does
    not depend on the linear algebra library. A zero map has no vectors (zeros, gradient 0); equal singular values
    have no unique ones: the value is that of some choice, and the gradient stays finite.

    Float64 maps, and those of fewer than 64 channels or positions, are decomposed in full, by the smaller Gram matrix
    in float64. Of larger ones only the vectors that are read are computed, by a subspace iteration: within 1e-4 of the
    full decomposition's, their gradients within 0.3 %, typically 1e-6. A sample of which that cannot be shown, because
    of near-equal singular values for example, is decomposed in full too. The gradient divides by gaps $d$ between
    squared singular values, there by $(d^2 + \epsilon^2) / d$ with $\epsilon = 10^{-4} s_1^2$.

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
        mine = leading_vectors(student, spare, like=target)[1]
        sigma = safe_normalize(values)[:, None]
        return mine * sigma, target * sigma

    def relate(self, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], index: int) -> Tensor:
        """The squared difference of the relations between two stages, summed per sample."""
        (a, b), (c, d) = (tuple(_factors(vectors) for vectors in stage) for stage in (first, second))
        # A difference of products, a c' - b d', is (a - b) c' + b (c - d)': nothing cancels, and equal is 0.
        left, right = torch.cat([a - b, b], 3), torch.cat([c, c - d], 3)
        squares = (left.transpose(2, 3) @ left) * (right.transpose(2, 3) @ right)
        return squares.sum((1, 2, 3)).mean().clamp_min(0).to(first[0].dtype)


def _factors(vectors: Tensor) -> Tensor:
    r"""Factors $f$ of the relation: $\exp(-(v - w)^2 / 8) = \langle f(v), f(w) \rangle$ for numbers up to 1.

    `[batch, channels, k]` to `[batch, k, channels, 12]`, in float64. From $e^{vw/4} = \sum_p (vw/4)^p / p!$, whose
    terms from the twelfth on are below 1e-16.
    """
    numbers = vectors.double().transpose(1, 2)[..., None]
    orders = torch.arange(NUM_TERMS, dtype=torch.float64, device=vectors.device)
    return torch.exp(-numbers.square() / 8 - torch.lgamma(orders + 1) / 2) * (numbers / 2) ** orders
