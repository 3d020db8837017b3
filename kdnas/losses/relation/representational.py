"""Representational dissimilarity as a loss (TGSA's score, differentiable)."""

from typing import ClassVar, final

from torch import Tensor

from kdnas.losses.base import FeatureLoss, connected_zero
from kdnas.similarity import dissimilarity, rdm_similarity


@final
class Representational(FeatureLoss):
    """One minus the correlation of the dissimilarity matrices of student and teacher (RDM).

    For each pair of stages, with RDM_ij = 1 - Pearson(map_i, map_j) over a sample's flattened activations
    (`[batch, batch]`, dims of the student and of the teacher free) and r the Pearson correlation of the strict
    upper triangles of the two RDMs:

        L = 1 - r, in [0, 2]

    Divisor: none; r is free of the batch's size, but repeated samples are pairs of dissimilarity 0, which move it
    (pairwise). Invariant to scaling and shifting a sample's activations. Fewer than 3 samples have at most one pair
    and no correlation: 0. Where all dissimilarities of a side are equal, r counts as 0: L = 1 with gradient 0.

    `weight` 1: no published weight; L has unit scale.

    Args:
        taps: how stages are paired: `resolution` (default), `rdm`, `order` or explicit pairs, as in `StagePairs`.
        weights: one weight per pair; default None: 1 each.

    Reference: Bashivan, Tensen and DiCarlo, Teacher Guided Architecture Search, ICCV 2019, section 3 (the score).
    Differs: the paper ranks candidates by r and takes each teacher stage's best student stage; training needs a
        fixed pairing, which `taps="rdm"` chooses by the same r.
    """

    pairwise: ClassVar[bool] = True
    whole_batch: ClassVar[bool] = True
    golden: ClassVar[float | None] = 2.0327669570704545

    def between(self, student: Tensor, teacher: Tensor, pair: int) -> Tensor:
        """One minus the correlation of the two dissimilarity matrices."""
        if len(student) < 3:
            return connected_zero(student)
        return 1 - rdm_similarity(dissimilarity(student), dissimilarity(teacher))
