"""Knowledge distillation split into the labelled class and the others."""

from collections.abc import Mapping
from typing import ClassVar, final

import torch
from torch import Tensor

from kdnas.losses._inputs import IGNORED
from kdnas.losses.base import Loss
from kdnas.outputs import Moment, Outputs


@final
class Decoupled(Loss):
    r"""KL divergence that weighs the labelled class and the ranking of the others separately (DKD).

    With $p = \mathrm{softmax}(z_s / T)$, $q = \mathrm{softmax}(z_t / T)$, the label $y$, and $\hat p$, $\hat q$ the
    softmaxes over the classes other than $y$,
    $L = T^2 \cdot \frac{1}{B} \sum_b [\alpha \, \mathrm{KL}((q_y, 1 - q_y) \| (p_y, 1 - p_y))
    + \beta \, \mathrm{KL}(\hat q \| \hat p)]$. Hinton's KD is $\alpha = 1$, $\beta = 1 - q_y$.

    Shapes: logits `[batch, classes]` with labels `[batch]`, or `[batch, classes, height, width]` with
    `[batch, height, width]`; a label of -100 is left out. Divisor: the number of labels that are not left out;
    classes are summed. Undefined for fewer than 3 classes.

    Default weight 1, beside the labels at 1: the authors' code, with alpha 1, beta 8, temperature 4.

    Args:
        alpha: weight of the labelled class against the rest; default 1.
        beta: weight of the distribution among the other classes; default 8.
        temperature: $T$, above 0; default 4.

    Raises:
        ValueError: fewer than 3 classes, or a temperature that is not positive.

    Reference: Zhao, Cui, Song, Qiu, Liang, Decoupled Knowledge Distillation, CVPR 2022, equation 7.
    Differs: 1 - p is a logsumexp over the other classes; the authors' code takes the logarithm of summed
        probabilities, which is infinite for logits of 80, and leaves the label out of the second softmax by
        subtracting 1000. No warm-up of the weight over the first 20 epochs.
    """

    needs: ClassVar[tuple[str, ...]] = ("logits", "labels")
    ranges: ClassVar[Mapping[str, str]] = {"alpha": "[0, inf)", "beta": "[0, inf)", "temperature": "(0, inf)"}
    golden: ClassVar[float] = 16.832404731153417

    def __init__(self, *, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0) -> None:
        super().__init__()
        self.alpha, self.beta, self.temperature = alpha, beta, temperature

    def build(self, student: Outputs, teacher: Outputs, *, elastic: bool) -> None:
        """Check the number of classes."""
        _at_least_three(student.logits)

    def compute(self, student: Outputs, teacher: Outputs, labels: Tensor, at: Moment) -> Tensor:
        """The two weighted divergences, averaged over the labels."""
        _at_least_three(student.logits)
        labels = labels.flatten()
        target = labels.clamp_min(0)
        log_p, log_q = (
            (o.logits / self.temperature).movedim(1, -1).flatten(0, -2).log_softmax(-1) for o in (student, teacher)
        )
        index = torch.arange(log_p.shape[1] - 1, device=target.device)
        others = index + (index >= target[:, None])  # every class but the label, in order
        parts = [(x.gather(1, target[:, None])[:, 0], x.gather(1, others)) for x in (log_p, log_q)]
        (p_target, p_others), (q_target, q_others) = parts
        p_rest, q_rest = p_others.logsumexp(1), q_others.logsumexp(1)
        binary = q_target.exp() * (q_target - p_target) + q_rest.exp() * (q_rest - p_rest)
        p_others, q_others = p_others - p_rest[:, None], q_others - q_rest[:, None]
        rest = (q_others.exp() * (q_others - p_others)).sum(1)
        # A mask, not a selection, whose length would depend on the labels and break a compiled graph.
        counted = labels != IGNORED
        values = torch.where(counted, self.alpha * binary + self.beta * rest, 0.0)
        return values.sum() / counted.sum().clamp_min(1) * self.temperature**2


def _at_least_three(logits: Tensor) -> None:
    if logits.shape[1] < 3:
        raise ValueError(
            f"Decoupled needs at least 3 classes, got {logits.shape[1]}: it ranks those other than the label. "
            "Use SoftTargets."
        )
