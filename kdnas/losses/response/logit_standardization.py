"""Distillation of logits standardised per sample."""

from typing import ClassVar, final

from torch import Tensor

from kdnas.losses.base import Loss
from kdnas.losses.response.soft_targets import SoftTargets
from kdnas.numerics import centre, safe_normalize
from kdnas.outputs import Moment, Outputs
from kdnas.specs import Spec


@final
class LogitStandardization(Loss):
    r"""Any loss between logits, computed on logits with mean 0 and variance 1 over each sample's classes.

    $\hat z_{bc} = (z_{bc} - \mu_b) / \sigma_b$ with $\mu_b$ the mean and $\sigma_b^2 = \frac{1}{C} \sum_c
    (z_{bc} - \mu_b)^2$; the scale of the teacher's logits does not matter, only their shape.

    Shapes: logits `[batch, classes]`, or `[batch, classes, height, width]`. Divisor: that of the inner loss.
    Equal logits of one sample become 0, with gradient 0.

    Default weight 9, with temperature 2 in the inner loss: the authors' settings for KD on CIFAR-100.

    Args:
        of: the inner loss, between logits, or its Spec; default None: `SoftTargets(temperature=2)`.

    Raises:
        ValueError: `of` is not a Loss.

    Reference: Sun, Ren, Li, Wang, Cao, Logit Standardization in Knowledge Distillation, CVPR 2024, algorithm 1.
    Differs: the authors' code divides the variance by C - 1 and adds 1e-7 to the deviation.
    """

    needs: ClassVar[tuple[str, ...]] = ("logits", "labels")
    weight: ClassVar[float] = 9.0
    golden: ClassVar[float] = 0.8479486604395698

    def __init__(self, *, of: Loss | Spec | None = None) -> None:
        super().__init__()
        of = of.build(Loss) if isinstance(of, Spec) else of
        if of is not None and not isinstance(of, Loss):
            raise ValueError(
                f"`of` must be a Loss or the Spec of a Loss, got {type(of).__name__}. None is SoftTargets."
            )
        self.of = SoftTargets(temperature=2.0) if of is None else of

    def prepare(self, student: Outputs, teacher: Outputs, *, elastic: bool = False) -> None:
        """Prepare the inner loss."""
        super().prepare(student, teacher, elastic=elastic)
        self.of.prepare(_standardize(student), _standardize(teacher), elastic=elastic)

    def compute(self, student: Outputs, teacher: Outputs, labels: Tensor, at: Moment) -> Tensor:
        """The inner loss, on standardised logits."""
        return self.of.compute(_standardize(student), _standardize(teacher), labels, at)


def _standardize(outputs: Outputs) -> Outputs:
    logits = outputs.logits
    return outputs._replace(logits=safe_normalize(centre(logits, 1), 1) * logits.shape[1] ** 0.5)
