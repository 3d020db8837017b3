"""Relational knowledge distillation, distances (RKD-D)."""

from typing import ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor

from kdnas.losses.base import Loss
from kdnas.numerics import pairwise_distances, safe_normalize
from kdnas.outputs import Moment, Outputs, embedding


@final
class RelationalDistance(Loss):
    """Huber distance between the relative distances of all pairs of samples (RKD-D).

    With embeddings e `[batch, dims]` (the deepest map averaged over positions; dims of student and teacher free):

        d_ij = |e_i - e_j|,  psi_ij = d_ij / mean of the positive d;  L = mean_ij huber(psi_s,ij - psi_t,ij)

    where huber(x) is x^2/2 up to |x| = 1 and |x| - 1/2 beyond. Gradient flows through the student's mean.

    Divisor: batch^2, the zero diagonal included. Invariant to the embeddings' scale. A batch of one, or of equal
    samples, has no positive distance: psi = 0 there. Memory batch^2.

    `weight` 25: RepDistiller, mdistiller and MMRazor, with this reduction.

    Args:
        normalize: divide each embedding by its Euclidean norm first, as MMRazor does; default False.

    Reference: Park, Kim, Lu and Cho, Relational Knowledge Distillation, CVPR 2019, section 3.2 (distance-wise loss).
    Differs: equal samples get gradient 0 where the authors' clamp leaves rounding noise.
    """

    needs: ClassVar[tuple[str, ...]] = ("features",)
    weight: ClassVar[float] = 25.0
    whole_batch: ClassVar[bool] = True
    golden: ClassVar[float | None] = 0.34928041258442555

    def __init__(self, *, normalize: bool = False) -> None:
        super().__init__()
        self.normalize = normalize

    def compute(self, student: Outputs, teacher: Outputs, labels: Tensor, at: Moment) -> Tensor:
        """Huber distance of the two matrices of relative distances."""
        return F.smooth_l1_loss(self._relative(embedding(student)), self._relative(embedding(teacher)))

    def _relative(self, rows: Tensor) -> Tensor:
        distances = pairwise_distances(safe_normalize(rows) if self.normalize else rows)
        count = (distances > 0).sum()
        mean = distances.sum() / count.clamp_min(1)
        return distances / torch.where(count > 0, mean, 1.0)
