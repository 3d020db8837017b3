"""Oracle distillation: only the correct members of an ensemble are targets (OKD)."""

from collections.abc import Mapping
from typing import ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor

from kdnas.losses.base import Loss
from kdnas.outputs import Moment, Outputs


@final
class Oracle(Loss):
    r"""Distils from those members of an ensemble that classify the sample correctly, else from the label (OKD).

    For a sample $b$ with label $y$, $u_j = 1$ where member $j$'s largest logit is that of $y$, else 0. With
    $p = \mathrm{softmax}(z_s)$, $p^T = \mathrm{softmax}(z_s / T)$, $q^T_j = \mathrm{softmax}(z_j / T)$,

    $\ell_b = \frac{1}{\sum_j u_j} \sum_j u_j [(1 - \lambda)\,(-\log p_y) +
    \lambda\,T^2 \sum_c q^T_{jc} (\log q^T_{jc} - \log p^T_c)]$ where any member is correct,
    $\ell_b = -\log p_y$ where none is, and $L = \frac{1}{B} \sum_b \ell_b$.

    It is the mean of the correct members' losses, not the loss of their mean distribution: the two have equal
    gradients, but the value of the first is larger by the members' disagreement. Wrong members have no influence. Of
    equal largest logits the first class counts. The labels' term is included: no cross-entropy is needed beside it. A
    teacher without `members` is an ensemble of one.

    Shapes: logits `[batch, classes]` with labels `[batch]`, or `[batch, classes, height, width]` with
    `[batch, height, width]`, position by position; a label of -100 is left out. Divisor: the labels that are not left
    out (0 if there are none).

    Default weight 1: the whole of the paper's loss.

    Args:
        share: $\lambda$, the weight of the distillation where a member is correct, in [0, 1]; default 0.9.
        temperature: $T$, above 0; default 4.

    Raises:
        ValueError: a share outside [0, 1], a temperature that is not positive, or a member of other classes.

    Reference: Kang, Mun, Han, Towards Oracle Knowledge Distillation with Neural Architecture Search, AAAI 2020,
        section 3 (oracle distillation).
    Differs: the mix of label and softened loss is Hinton's with the weights of RepDistiller; the paper does not
        state its constants, and the authors published no code.
    """

    needs: ClassVar[tuple[str, ...]] = ("logits", "labels")
    ranges: ClassVar[Mapping[str, str]] = {"share": "[0, 1]", "temperature": "(0, inf)"}
    golden: ClassVar[float] = 3.080398443200089

    def __init__(self, *, share: float = 0.9, temperature: float = 4.0) -> None:
        super().__init__()
        self.share, self.temperature = share, temperature

    def compute(self, student: Outputs, teacher: Outputs, labels: Tensor, at: Moment) -> Tensor:
        """The mean over the labels of the correct members' mean loss, or of the cross-entropy where there are none."""
        counted = labels != -100
        task = F.cross_entropy(student.logits, labels, reduction="none")
        log_p = (student.logits / self.temperature).log_softmax(1)
        num_correct, divergences = torch.zeros_like(task), torch.zeros_like(task)
        for member in teacher.members or (teacher,):
            is_correct = member.logits.argmax(1) == labels
            num_correct = num_correct + is_correct
            # Chosen before and after: a wrong member's infinite logits would be NaN times 0 in the gradient.
            log_q = (torch.where(is_correct[:, None], member.logits, 0.0) / self.temperature).log_softmax(1)
            divergence = (log_q.exp() * (log_q - log_p)).sum(1) * self.temperature**2
            divergences = divergences + torch.where(is_correct, divergence, 0.0)
        mixed = (1 - self.share) * task + self.share * divergences / num_correct.clamp_min(1)
        return torch.where(counted, torch.where(num_correct > 0, mixed, task), 0.0).sum() / counted.sum().clamp_min(1)
