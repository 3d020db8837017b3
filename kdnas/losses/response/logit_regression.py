"""Squared distance between logits."""

from typing import ClassVar, final

from torch import Tensor

from kdnas.losses.base import Loss
from kdnas.outputs import Moment, Outputs


@final
class LogitRegression(Loss):
    r"""Mean squared error between logits.

    $L = \frac{1}{B C} \sum_{b,c} (z_{s,bc} - z_{t,bc})^2$.

    Shapes: logits `[batch, classes]`, or `[batch, classes, height, width]` compared position by position.
    Divisor: batch times classes (times positions).

    Default weight 1.

    Args:
        centre: subtract each sample's mean over classes from both logits first, so that a shift of all logits, which
            does not change the softmax, does not change the loss; default False.

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
