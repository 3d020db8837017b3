"""Adversarial distillation of logits, conditioned on the class (GAN-KD)."""

from collections.abc import Mapping
from typing import ClassVar, final

import torch.nn.functional as F
from torch import Tensor, nn

from kdnas.losses.base import Loss, frozen
from kdnas.outputs import Moment, Outputs


@final
class ConditionalAdversarial(Loss):
    r"""Adversarial loss on logits: a discriminator separates student from teacher and predicts the class (GAN-KD).

    The discriminator $D$ maps logits to a score $D_r$ (high for the teacher) and to class scores $D_c$:

    - student: $L = \lambda_1 \frac{1}{BC} \sum |z_s - z_t| + \frac{1}{B} \sum_b [\mathrm{softplus}(-D_r(z_s))
      + \mathrm{CE}(D_c(z_s), y)]$;
    - discriminator: $\frac{1}{B} \sum_b [\mathrm{softplus}(-D_r(z_t)) + \mathrm{softplus}(D_r(z_s))
      + \mathrm{CE}(D_c(z_t), y) + \mathrm{CE}(D_c(z_s), y)]$, by `adversary`.

    The student minimises the class term like the discriminator, and works against the other term. Add the labels'
    cross-entropy.

    Shapes: logits `[batch, classes]`, labels `[batch]`. Divisors: batch; batch times classes for the L1 term.
    Never 0: a student equal to its teacher costs softplus(-D_r), log 2 for an undecided discriminator, and the class
    term. Undefined for dense logits.

    Learnable part: $D$, three fully connected layers, with a learning rate of at most 1e-3, as is usual. Default
    weight 1: the paper's is unknown.

    Args:
        conditional: include the class scores; default True.
        regression: $\lambda_1$, the weight of the L1 term, 0 for none; default 1.
        width: hidden units per layer of the discriminator, at least 1; default 128.

    Raises:
        ValueError: logits are not `[batch, classes]`, or the loss was not prepared.

    Reference: Xu, Hsu, Huang, Training Shallow and Thin Networks for Acceleration via Knowledge Distillation with
        Conditional Adversarial Networks, arXiv 1709.00513, section 3.
    Differs: one score for real or fake instead of two, and softplus with the non-saturating student loss, for
        stable gradients; no batch normalisation in $D$, whose value would depend on the rest of the batch; the
        noise comes from the student's own dropout, as in the paper, and none is added here.
    """

    needs: ClassVar[tuple[str, ...]] = ("logits", "labels")
    ranges: ClassVar[Mapping[str, str]] = {"regression": "[0, inf)", "width": "[1, inf)"}
    golden: ClassVar[float] = 4.3785606475600805
    discriminator_rates: ClassVar[Mapping[str, float]] = {"discriminator": 1e-3}

    def __init__(self, *, conditional: bool = True, regression: float = 1.0, width: int = 128) -> None:
        super().__init__()
        self.conditional, self.regression, self.width = conditional, regression, width
        self.discriminator = nn.Sequential()

    def build(self, student: Outputs, teacher: Outputs, *, elastic: bool) -> None:
        """Build the discriminator."""
        if student.logits.dim() != 2:
            raise ValueError(
                f"ConditionalAdversarial needs logits [batch, classes], got {tuple(student.logits.shape)}. "
                "Use Holistic for dense logits."
            )
        classes = student.logits.shape[1]
        self.discriminator = nn.Sequential(
            nn.Linear(classes, self.width),
            nn.LeakyReLU(0.2),
            nn.Linear(self.width, self.width),
            nn.LeakyReLU(0.2),
            nn.Linear(self.width, 1 + classes if self.conditional else 1),
        ).to(student.logits.device)

    def compute(self, student: Outputs, teacher: Outputs, labels: Tensor, at: Moment) -> Tensor:
        """The student's loss."""
        self._check()
        scores = frozen(self.discriminator, student.logits)
        loss = F.softplus(-scores[:, 0]).mean() + self._classes(scores, labels)
        return loss + self.regression * (student.logits - teacher.logits).abs().mean()

    def discriminate(self, student: Outputs, teacher: Outputs, labels: Tensor, at: Moment) -> Tensor:
        """The discriminator's loss."""
        self._check()
        ours, theirs = self.discriminator(student.logits), self.discriminator(teacher.logits)
        separation = F.softplus(-theirs[:, 0]).mean() + F.softplus(ours[:, 0]).mean()
        return separation + self._classes(ours, labels) + self._classes(theirs, labels)

    def _classes(self, scores: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(scores[:, 1:], labels) if self.conditional else scores.sum() * 0

    def _check(self) -> None:
        if not len(self.discriminator):
            raise ValueError("ConditionalAdversarial has no discriminator yet. Call prepare(student, teacher) first.")
