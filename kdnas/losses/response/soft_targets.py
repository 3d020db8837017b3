"""Knowledge distillation by temperature-softened class distributions."""

from collections.abc import Mapping
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from kdnas.losses.base import Loss
from kdnas.outputs import Moment, Outputs

Form = Literal["kl", "soft_cross_entropy", "reverse_kl", "js"]


@final
class SoftTargets(Loss):
    r"""KL divergence between temperature-softened class distributions (Hinton's KD).

    With $p = \mathrm{softmax}(z_s / T)$, $q = \mathrm{softmax}(z_t / T)$ and $m = (p + q) / 2$,
    $L = T^2 \cdot \frac{1}{B} \sum_b D(b)$, where $D$ is

    - `kl`: $\sum_c q_c (\log q_c - \log p_c)$;
    - `soft_cross_entropy`: $-\sum_c q_c \log p_c$, the same gradient; does not reach 0;
    - `reverse_kl`: $\sum_c p_c (\log p_c - \log q_c)$;
    - `js`: $\frac12 \sum_c q_c (\log q_c - \log m_c) + \frac12 \sum_c p_c (\log p_c - \log m_c)$.

    $T^2$ multiplies every form, because every gradient with respect to the logits falls as $1/T^2$: the
    weight need not change with the temperature.

    Shapes: logits `[batch, classes]`, or `[batch, classes, height, width]` compared position by position.
    Divisor: batch (times positions); classes are summed. Twice differentiable. Identical logits may give a
    rounding error below 0 instead of 0.

    Default weight 0.9, beside 0.1 for the labels: RepDistiller and mdistiller.

    Args:
        form: which divergence $D$; default `kl`.
        temperature: $T$, above 0; default 4.

    Raises:
        ValueError: an unknown form, or a temperature that is not positive.

    Reference: Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network, NIPS 2014 workshop,
        arXiv 1503.02531, section 2.
    Differs: the paper writes the soft cross-entropy; the default is the divergence, whose gradient is the
        same and whose value is 0 for equal distributions. Code that calls `KLDivLoss` with its default
        reduction divides by the classes once more. This never takes the logarithm of a probability:
        `softmax().log()` is NaN from logit gaps of 104.
    """

    weight: ClassVar[float] = 0.9
    ranges: ClassVar[Mapping[str, str]] = {"temperature": "(0, inf)"}
    golden: ClassVar[float] = 2.2035571308364803

    def __init__(self, *, form: Form = "kl", temperature: float = 4.0) -> None:
        super().__init__()
        self.form, self.temperature = form, temperature

    def compute(self, student: Outputs, teacher: Outputs, labels: Tensor, at: Moment) -> Tensor:
        """The divergence summed over classes, averaged over the rest, times the squared temperature."""
        log_p = (student.logits / self.temperature).log_softmax(1)
        log_q = (teacher.logits / self.temperature).log_softmax(1)
        if self.form == "kl":
            terms = log_q.exp() * (log_q - log_p)
        elif self.form == "soft_cross_entropy":
            terms = -log_q.exp() * log_p
        elif self.form == "reverse_kl":
            terms = log_p.exp() * (log_p - log_q)
        else:
            log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0, dtype=log_p.dtype))
            terms = (log_q.exp() * (log_q - log_m) + log_p.exp() * (log_p - log_m)) / 2
        return terms.sum(1).mean() * self.temperature**2
