"""Squared distance between logits."""

from typing import ClassVar, final

from torch import Tensor

from kdnas.losses.base import Loss
from kdnas.outputs import Moment, Outputs


@final
class LogitRegression(Loss):
    r"""The student's logits follow the teacher's, before any softmax.

    $L = \frac{1}{B C} \sum_{b,c} (z_{s,bc} - z_{t,bc})^2$.

    Shapes: logits `[batch, classes]`, or `[batch, classes, height, width]` compared position by position.
    Divisor: batch times classes (times positions).

    Default weight 1.

    Args:
        centre: take each sample's mean over classes off both sides first; a shift of all logits, which no
            softmax sees, then costs nothing.

    Reference: Ba, Caruana, Do Deep Nets Really Need to be Deep?, NIPS 2014, equation 1.
    Differs: a mean over classes too, without the factor 1/2: 2/C times the paper's.
    """

    golden: ClassVar[float] = 5.010215808345228

    def __init__(self, *, centre: bool = False) -> None:
        super().__init__()
        self.centre = centre

    def compute(self, student: Outputs, teacher: Outputs, labels: Tensor, at: Moment) -> Tensor:
        """The mean squared difference."""
        gap = student.logits - teacher.logits
        if self.centre:
            gap = gap - gap.mean(1, keepdim=True)
        return gap.square().mean()
