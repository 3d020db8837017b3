"""A generic loss between pairs of samples."""

from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from kdnas.losses.base import Loss, connected_zero
from kdnas.numerics import pairwise_distances, safe_normalize, squared_distances
from kdnas.outputs import Moment, Outputs, embedding
from kdnas.similarity import upper


@final
class Pairwise(Loss):
    """Mean squared difference of a chosen relation between the samples of a batch.

    With embeddings e `[batch, dims]` (the deepest map averaged over positions; dims of student and teacher free):

        L = mean over i != j of (phi(e_s,i, e_s,j) - phi(e_t,i, e_t,j))^2
        cosine: <a, b> / (|a| |b|);  inner: <a, b>;  l2: |a - b|;  sq_l2: |a - b|^2

    Divisor: batch * (batch - 1), the ordered pairs. Repeating the batch adds pairs of equal samples (pairwise). A
    batch of one has no pair: 0. Only the cosine is independent of the embeddings' scale: with another phi
    use `normalize`, unless student and teacher have the same scale. Memory batch^2.

    `weight` 1: no published weight.

    Args:
        phi: the relation: `cosine`, `inner`, `l2` or `sq_l2`; default `cosine`.
        normalize: divide each network's relations by nothing (`none`), by their mean absolute value over the pairs
            (`mean`), or by the largest (`max`); gradient flows through both; default `none`.
        reduction: `mean` over the pairs, or their `sum`, which is the survey's formula and grows with batch^2; default
            `mean`.

    Reference: Gou, Yu, Maybank and Tao, Knowledge Distillation: A Survey, IJCV 2021, section 2.3 (the general form of
        relations between samples).
    Differs: a mean over pairs by default, so that the value does not depend on the batch's size.
    """

    needs: ClassVar[tuple[str, ...]] = ("features",)
    whole_batch: ClassVar[bool] = True
    golden: ClassVar[float | None] = 0.38750605519854114
    pairwise: ClassVar[bool] = True

    def __init__(
        self,
        *,
        phi: Literal["cosine", "inner", "l2", "sq_l2"] = "cosine",
        normalize: Literal["none", "mean", "max"] = "none",
        reduction: Literal["mean", "sum"] = "mean",
    ) -> None:
        super().__init__()
        self.phi, self.normalize, self.reduction = phi, normalize, reduction

    def compute(self, student: Outputs, teacher: Outputs, labels: Tensor, at: Moment) -> Tensor:
        """Mean squared difference of the relations."""
        rows = embedding(student)
        if len(rows) < 2:
            return connected_zero(rows)
        squares = (self._relations(rows) - self._relations(embedding(teacher))).square()
        return squares.mean() if self.reduction == "mean" else 2 * squares.sum()

    def _relations(self, rows: Tensor) -> Tensor:
        """One number per unordered pair; every phi is symmetric."""
        if self.phi == "l2":
            relations = upper(pairwise_distances(rows))
        elif self.phi == "sq_l2":
            relations = upper(squared_distances(rows))
        else:
            rows = safe_normalize(rows) if self.phi == "cosine" else rows
            relations = upper(rows @ rows.T)
        if self.normalize == "none":
            return relations
        sizes = relations.abs()
        unit = sizes.mean() if self.normalize == "mean" else sizes.amax()
        return relations / torch.where(unit > 0, unit, 1.0)
