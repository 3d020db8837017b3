"""Variational information distillation (VID)."""

import math
from typing import ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdnas.losses.base import FeatureLoss
from kdnas.losses.feature._connectors import paired_maps, part
from kdnas.losses.stage_pairs import Adapter, Alignment, Pairs
from kdnas.outputs import Outputs

LEAST_VARIANCE = 1e-5
FIRST_VARIANCE = 5.0


@final
class Variational(FeatureLoss):
    r"""Negative variational bound on the mutual information of student and teacher maps (VID).

    The student predicts a Gaussian for every element of the teacher's map: mean $\mu(s)$ from three 1x1 convolutions
    with ReLU between, and one learnt variance per channel, $v_c = \log(1 + e^{a_c}) + 10^{-5}$, at first 5. Summed over
    the pairs, $L = \frac{1}{B C H W} \sum \frac12 [(\mu(s) - t)^2 / v_c + \log v_c]$. It may be negative; the
    least variance bounds it.

    Shapes: student `[batch, student channels, h, w]`, teacher `[batch, teacher channels, h', w']`, pooled to the
    smaller height and width. Divisor: every element.

    Default weight 1: the paper, RepDistiller, mdistiller.

    Args:
        taps: how stages are paired: `resolution` (default), `rdm`, `order` or explicit pairs, as in `StagePairs`.
        weights: one weight per pair; default None: 1 each.

    Raises:
        ValueError: a loss that was not prepared; a pair that cannot be matched.

    Reference: Ahn, Hu, Damianou, Lawrence, Dai, Variational Information Distillation for Knowledge Transfer, CVPR 2019,
        equations 5 and 6.
    Differs: drops the constant $\frac12 \log 2 \pi$, as all public code. The softplus does not overflow. mdistiller
        keeps the variance out of its optimiser; here it is a parameter.
    """

    golden: ClassVar[float] = 0.4345537423187815
    alignment: ClassVar[Alignment] = "positions"

    def __init__(self, *, taps: str | Pairs = "resolution", weights: tuple[float, ...] | None = None) -> None:
        super().__init__(taps=taps, weights=weights)
        self.predictions = nn.ModuleList()

    def build(self, student: Outputs, teacher: Outputs, *, elastic: bool) -> None:
        """Build a prediction for each pair."""
        super().build(student, teacher, elastic=elastic)
        self.predictions = nn.ModuleList()
        for s, t in paired_maps(self.taps, student, teacher):
            self.predictions.append(_Prediction(s.shape[1], t.shape[1]).to(s.device))

    def between(self, student: Tensor, teacher: Tensor, pair: int) -> Tensor:
        """The negative log-likelihood of one pair, without its constant."""
        mean, variance = part(self.predictions, pair)(student)
        return ((mean - teacher).square() / variance + variance.log()).mean() / 2


class _Prediction(nn.Module):
    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__()
        self.mean = nn.Sequential(
            Adapter(student_channels, teacher_channels),
            nn.ReLU(),
            nn.Conv2d(teacher_channels, teacher_channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(teacher_channels, teacher_channels, 1, bias=False),
        )
        first = math.log(math.expm1(FIRST_VARIANCE - LEAST_VARIANCE))
        self.variance = nn.Parameter(torch.full((teacher_channels,), first))

    def forward(self, student: Tensor) -> tuple[Tensor, Tensor]:
        variance = F.softplus(self.variance) + LEAST_VARIANCE
        return self.mean(student), variance[:, None, None]
