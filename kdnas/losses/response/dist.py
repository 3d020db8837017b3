"""Correlation of predicted probabilities between classes and between samples."""

from collections.abc import Mapping
from typing import ClassVar, final

import torch
from torch import Tensor

from kdnas.losses.base import Loss, connected_zero
from kdnas.outputs import Moment, Outputs
from kdnas.similarity import pearson


@final
class Dist(Loss):
    r"""One minus the correlation of class probabilities, within samples and within classes (DIST).

    With $p = \mathrm{softmax}(z_s / T)$, $q = \mathrm{softmax}(z_t / T)$ and Pearson's $\rho$,
    $L = T^2 [\beta \cdot \frac{1}{B} \sum_b (1 - \rho(p_{b,:}, q_{b,:}))
    + \gamma \cdot \frac{1}{C} \sum_c (1 - \rho(p_{:,c}, q_{:,c}))]$: between the classes of one sample, and
    between the samples of one class.

    Shapes: logits `[batch, classes]`, or `[batch, classes, height, width]`, whose positions count as samples.
    Divisors: batch for the first sum, classes for the second. A row or a column that is constant (to 32 roundings) on
    either side has correlation 0: it adds 1 and no gradient. With one sample the second sum is 0, and with few samples
    it is noise.

    Default weight 2, beside the labels at 1: mmrazor.

    Args:
        inter: $\beta$, the weight of the relation between classes; default 1.
        intra: $\gamma$, the weight of the relation between samples; default 1.
        temperature: $T$, above 0; default 1.

    Raises:
        ValueError: a temperature that is not positive.

    Reference: Huang, You, Wang, Qian, Xu, Knowledge Distillation from A Stronger Teacher, NeurIPS 2022,
        section 3.
    Differs: the authors add 1e-8 to the norms; here each row and column is scaled by its largest entry, in
        logarithms, so that a class of probability 1e-40 still correlates.
    """

    weight: ClassVar[float] = 2.0
    ranges: ClassVar[Mapping[str, str]] = {"inter": "[0, inf)", "intra": "[0, inf)", "temperature": "(0, inf)"}
    whole_batch: ClassVar[bool] = True
    golden: ClassVar[float] = 2.1686887617591326

    def __init__(self, *, inter: float = 1.0, intra: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__()
        self.inter, self.intra, self.temperature = inter, intra, temperature

    def compute(self, student: Outputs, teacher: Outputs, labels: Tensor, at: Moment) -> Tensor:
        """The two weighted sums."""
        log_p, log_q = (
            (o.logits / self.temperature).movedim(1, -1).flatten(0, -2).log_softmax(-1) for o in (student, teacher)
        )
        loss = self.inter * _distance(log_p, log_q, 1)
        loss = loss + (self.intra * _distance(log_p, log_q, 0) if len(log_p) > 1 else connected_zero(log_p))
        return loss * self.temperature**2


def _distance(log_p: Tensor, log_q: Tensor, dim: int) -> Tensor:
    return (1 - pearson(_scaled(log_p, dim), _scaled(log_q, dim), dim)).mean()


def _scaled(log_p: Tensor, dim: int) -> Tensor:
    # Correlation does not see a scale: with the largest entry at 1 a column of tiny probabilities survives exp.
    p = (log_p - log_p.detach().amax(dim, keepdim=True)).exp()
    # The normalisers of two samples with the same logits in another order differ by rounding.
    spread = 1 - p.detach().amin(dim, keepdim=True)
    return torch.where(spread <= 32 * torch.finfo(p.dtype).eps, 1.0, p)
