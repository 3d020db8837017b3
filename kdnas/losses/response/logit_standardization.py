"""Distillation of logits standardised per sample."""

from typing import ClassVar, final

from kdnas.losses.base import Loss, Wrapper
from kdnas.losses.response.soft_targets import SoftTargets
from kdnas.numerics import centre, safe_normalize
from kdnas.outputs import Outputs
from kdnas.specs import Spec


@final
class LogitStandardization(Wrapper):
    r"""Any loss between logits, computed on logits with mean 0 and variance 1 over each sample's classes.

    $\hat z_{bc} = (z_{bc} - \mu_b) / \sigma_b$ with $\mu_b$ the mean and $\sigma_b^2 = \frac{1}{C} \sum_c
    (z_{bc} - \mu_b)^2$; the scale of the teacher's logits does not matter, only their shape.

    Shapes: logits `[batch, classes]`, or `[batch, classes, height, width]`. Divisor: that of the inner loss.
    Equal logits of one sample become 0, with gradient 0.

    What the inner loss has besides, such as parts, stages, a discriminator or clipping, is passed on.

    Default weight 9, with temperature 2 in the inner loss: the authors' settings for KD on CIFAR-100.

    Args:
        of: the inner loss, between logits, or its Spec; default None: `SoftTargets(temperature=2)`.

    Raises:
        ValueError: `of` is not a Loss.

    Reference: Sun, Ren, Li, Wang, Cao, Logit Standardization in Knowledge Distillation, CVPR 2024, algorithm 1.
    Differs: the authors' code divides the variance by C - 1 and adds 1e-7 to the deviation.
    """

    weight: ClassVar[float] = 9.0
    golden: ClassVar[float] = 0.8479486604395698
    option: ClassVar[str] = "of"

    def __init__(self, *, of: Loss | Spec | None = None) -> None:
        super().__init__(SoftTargets(temperature=2.0) if of is None else of)

    def change(self, outputs: Outputs) -> Outputs:
        """Standardised logits, those of an ensemble's members too."""
        members = tuple(self.change(member) for member in outputs.members)
        logits = safe_normalize(centre(outputs.logits, 1), 1) * outputs.logits.shape[1] ** 0.5
        return outputs._replace(logits=logits, members=members)
