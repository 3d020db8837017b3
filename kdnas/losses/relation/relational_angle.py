"""Relational knowledge distillation, angles (RKD-A)."""

from collections.abc import Mapping
from typing import ClassVar, final

import torch.nn.functional as F
from torch import Tensor

from kdnas.losses.base import Loss
from kdnas.numerics import safe_normalize
from kdnas.outputs import Moment, Outputs, embedding


@final
class RelationalAngle(Loss):
    """Huber distance between the cosines of the angles in all triplets of samples (RKD-A).

    With embeddings e `[batch, dims]` (the deepest map averaged over positions; dims of student and teacher free):

        u_ij = (e_i - e_j) / |e_i - e_j|,  psi_ijk = <u_ij, u_kj>;  L = mean_ijk huber(psi_s,ijk - psi_t,ijk)

    where huber(x) is x^2/2 up to |x| = 1 and |x| - 1/2 beyond.

    Divisor: batch^3, every ordered triplet; those with a repeated sample are equal in both networks, or 0.
    Invariant to shifting, rotating and scaling the embeddings. Two equal samples have no angle: psi = 0, gradient 0.
    Peak memory: batch^2 * dims + batch^3 numbers for each network; `vertices` bounds it.

    `weight` 50: RepDistiller, mdistiller and MMRazor, with this reduction.

    Args:
        vertices: number of samples, the batch's first, at which angles are measured; default 0: every sample. Memory
            and work shrink to vertices * batch * (dims + batch); with shuffled batches the choice is random.

    Reference: Park, Kim, Lu and Cho, Relational Knowledge Distillation, CVPR 2019, section 3.2 (angle-wise loss).
    Differs: safe normalisation; the authors' gradient at two equal samples is of the order of 1e9.
    """

    needs: ClassVar[tuple[str, ...]] = ("features",)
    weight: ClassVar[float] = 50.0
    ranges: ClassVar[Mapping[str, str]] = {"vertices": "[0, inf)"}
    whole_batch: ClassVar[bool] = True
    golden: ClassVar[float | None] = 0.13901076135408075

    def __init__(self, *, vertices: int = 0) -> None:
        super().__init__()
        self.vertices = vertices

    def compute(self, student: Outputs, teacher: Outputs, labels: Tensor, at: Moment) -> Tensor:
        """Huber distance of the cosines of all angles."""
        return F.smooth_l1_loss(self._cosines(embedding(student)), self._cosines(embedding(teacher)))

    def _cosines(self, rows: Tensor) -> Tensor:
        vertices = rows[: self.vertices or len(rows)]
        directions = safe_normalize(rows[None, :, :] - vertices[:, None, :])
        return directions @ directions.transpose(1, 2)
