"""Locality preserving distillation."""

from collections.abc import Mapping
from typing import ClassVar, final

import torch
from torch import Tensor

from kdnas.losses.base import Loss, connected_zero
from kdnas.numerics import pairwise_distances, squared_distances
from kdnas.outputs import Moment, Outputs, embedding


@final
class LocalityPreserving(Loss):
    """Squared student distances between samples that are nearest neighbours in the teacher's embedding.

    With embeddings e `[batch, dims]` (the deepest map averaged over positions; dims of student and teacher free):

        L = 1/(2 batch) * sum_ij a_ij |e_s,i - e_s,j|^2
        a_ij = exp(-|e_t,i - e_t,j|^2 / sigma2) where j is among the teacher's `neighbours` nearest to i, else 0

    Divisor: 2 * batch. Neighbours are searched within the batch, so repeating it makes every sample its own nearest
    neighbour (pairwise). The student's scale counts, and a student that maps all samples to one point is the
    minimum: add a task loss. A batch of one: 0. Memory batch^2.

    `weight` 1: the paper's value could not be confirmed.

    Args:
        neighbours: number of nearest samples, at least 1; default 5. All other samples in a smaller batch. Samples as
            far as the last neighbour count too, so that ties do not depend on the batch's order.
        sigma2: the squared width, in squared units of the teacher's embedding; default 0: the mean squared distance of
            the teacher's neighbours. A fixed width that does not fit the teacher's scale makes every a 0 or 1.

    Reference: Chen, Wang, Xu, Xu and Tao, Learning Student Networks via Feature Embedding, TNNLS 2021 (arXiv
        1812.06597), the locality preserving loss.
    Differs: sigma2 follows the teacher. Public re-implementations detach the distances and train nothing.
    """

    needs: ClassVar[tuple[str, ...]] = ("features",)
    ranges: ClassVar[Mapping[str, str]] = {"neighbours": "[1, inf)", "sigma2": "[0, inf)"}
    whole_batch: ClassVar[bool] = True
    golden: ClassVar[float | None] = 0.43753916641161616
    pairwise: ClassVar[bool] = True

    def __init__(self, *, neighbours: int = 5, sigma2: float = 0.0) -> None:
        super().__init__()
        self.neighbours, self.sigma2 = neighbours, sigma2

    def compute(self, student: Outputs, teacher: Outputs, labels: Tensor, at: Moment) -> Tensor:
        """Half the affinity-weighted squared distances, per sample."""
        rows = embedding(student)
        if len(rows) < 2:
            return connected_zero(rows)
        return (self._affinities(embedding(teacher)) * squared_distances(rows)).sum() / (2 * len(rows))

    def _affinities(self, rows: Tensor) -> Tensor:
        distances = pairwise_distances(rows)
        others = ~torch.eye(len(rows), dtype=torch.bool, device=rows.device)
        last = distances.where(others, torch.inf).kthvalue(min(self.neighbours, len(rows) - 1), dim=1, keepdim=True)
        near = others & (distances <= last.values)
        # In units of the farthest neighbour, so that squares neither overflow nor vanish.
        largest = distances[near].amax()
        relative = (distances / torch.where(largest > 0, largest, 1.0)).square()
        width = relative[near].mean() if self.sigma2 == 0 else (self.sigma2**0.5 / largest).square()
        return torch.where(near, (-relative / torch.where(width > 0, width, 1.0)).exp(), 0.0)
