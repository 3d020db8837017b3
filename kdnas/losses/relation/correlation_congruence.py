"""Correlation congruence (CCKD)."""

import math
from collections.abc import Mapping
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from kdnas.losses.base import Loss
from kdnas.numerics import safe_normalize
from kdnas.outputs import Moment, Outputs, embedding


@final
class CorrelationCongruence(Loss):
    """Mean squared difference between the kernel matrices of a batch (CCKD).

    With c_ij = <e_i, e_j> / (|e_i| |e_j|) the cosine of two embeddings `[batch, dims]` (the deepest map averaged
    over positions; dims of student and teacher free) and K_ij the kernel of samples i and j:

        L = 1/batch^2 * sum_ij (K_s,ij - K_t,ij)^2
        bilinear: K = c;  rbf: K = exp(2 gamma (c - 1)), which is exp(-gamma |x_i - x_j|^2) for unit vectors x;
        rbf_taylor: K = exp(-2 gamma) * sum over p from 0 to order of (2 gamma c)^p / p!

    Divisor: batch^2, the diagonal (1 in both networks) included. Invariant to each embedding's scale. An all-zero
    embedding has cosine 0 with every sample. A batch of one: 0. Memory batch^2.

    `weight` 1: published weights belong to other formulas (0.02 to RepDistiller's, 0.003 to torchdistill's).

    Args:
        kernel: `rbf_taylor`, `rbf` or `bilinear`; default `rbf_taylor`.
        gamma: the inverse squared width of both rbf kernels, above 0; default 0.4, as in the paper.
        order: the last power of the Taylor series, at least 1; default 2, as in the paper.

    Reference: Peng et al., Correlation Congruence for Knowledge Distillation, ICCV 2019, section 3.
    Differs: no learnable embedding layers, which on the teacher's side can make the target trivial; as in
        Knowledge-Distillation-Zoo. RepDistiller's loss of this name compares consecutive samples and has no kernel.
        The paper's instance terms and its sampler are not part of this loss.
    """

    needs: ClassVar[tuple[str, ...]] = ("features",)
    ranges: ClassVar[Mapping[str, str]] = {"gamma": "(0, inf)", "order": "[1, inf)"}
    whole_batch: ClassVar[bool] = True
    golden: ClassVar[float | None] = 0.03703937630437521

    def __init__(
        self, *, kernel: Literal["rbf_taylor", "rbf", "bilinear"] = "rbf_taylor", gamma: float = 0.4, order: int = 2
    ) -> None:
        super().__init__()
        self.kernel, self.gamma, self.order = kernel, gamma, order

    def compute(self, student: Outputs, teacher: Outputs, labels: Tensor, at: Moment) -> Tensor:
        """Mean squared difference of the kernel matrices."""
        return (self._matrix(embedding(student)) - self._matrix(embedding(teacher))).square().mean()

    def _matrix(self, rows: Tensor) -> Tensor:
        rows = safe_normalize(rows)
        cosines = rows @ rows.T
        if self.kernel == "bilinear":
            return cosines
        if self.kernel == "rbf":
            return (2 * self.gamma * (cosines - 1)).exp()
        term = series = torch.ones_like(cosines)
        for power in range(1, self.order + 1):
            term = term * cosines * (2 * self.gamma / power)
            series = series + term
        return math.exp(-2 * self.gamma) * series
