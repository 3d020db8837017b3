"""Similarity-preserving distillation (SP)."""

from typing import ClassVar, final

from torch import Tensor

from kdnas.losses.base import FeatureLoss
from kdnas.numerics import rescale, safe_normalize


@final
class SimilarityPreserving(FeatureLoss):
    """Mean squared difference between the samples' row-normalised Gram matrices (SP).

    For each pair of stages, with every sample's map flattened to a row of Q (`[batch, dims]`, dims of the student
    and of the teacher free):

        G = Q Q^T, each row divided by its Euclidean norm;  L = 1/batch^2 * sum_ij (G_s - G_t)_ij^2

    Divisor: batch^2, the number of pairs of samples; rows have norm 1, so the value falls as 1/batch (pairwise).
    Invariant to the scale of the maps. A batch of one: both rows are 1 and the loss is 0. The row of an all-zero
    sample is 0. Memory batch^2.

    `weight` 3000: as in RepDistiller and mdistiller, with the same reduction.

    Args:
        taps: how stages are paired: `resolution` (default), `rdm`, `order` or explicit pairs, as in `StagePairs`.
        weights: one weight per pair; default None: 1 each.

    Reference: Tung and Mori, Similarity-Preserving Knowledge Distillation, ICCV 2019, section 3.
    Differs: the authors compare the last stage only, which is `taps=((-1, -1),)`. Maps are divided by the batch's
        largest entry, which cancels in the normalisation and keeps their squares from overflowing.
    """

    weight: ClassVar[float] = 3000.0
    whole_batch: ClassVar[bool] = True
    golden: ClassVar[float | None] = 0.023641830786839905
    pairwise: ClassVar[bool] = True

    def between(self, student: Tensor, teacher: Tensor, pair: int) -> Tensor:
        """Mean squared difference of the row-normalised Gram matrices."""
        return (_similarity(student) - _similarity(teacher)).square().mean()


def _similarity(feature: Tensor) -> Tensor:
    rows = rescale(feature.flatten(1), (0, 1))
    return safe_normalize(rows @ rows.T)
