"""Distillation of every position's class distribution."""

from collections.abc import Mapping
from typing import ClassVar, final

import torch.nn.functional as F
from torch import Tensor

from kdnas.losses.base import Loss, connected_zero
from kdnas.numerics import same_positions
from kdnas.outputs import Moment, Outputs


@final
class PixelWise(Loss):
    r"""KL divergence from the teacher's class distribution at every position.

    $L = T^2 \cdot \frac{1}{B H W} \sum_{b,h,w} \sum_c q_c (\log q_c - \log p_c)$ with
    $p = \mathrm{softmax}(z_s / T)$ and $q = \mathrm{softmax}(z_t / T)$ at each position.

    Shapes: logits `[batch, classes, height, width]`; of two sizes the larger is averaged to the smaller. Labels
    `[batch, height, width]`, brought to that size by their nearest neighbour, leave a position out where they are
    -100. Divisor: the positions of all samples that are not left out (0 if there are none); classes are summed.
    Undefined for logits without positions.

    Default weight 10: the authors' code.

    Args:
        temperature: $T$, above 0; default 1.

    Raises:
        ValueError: logits are not maps, the classes differ, or a temperature that is not positive.

    Reference: Liu, Chen, Liu, Qin, Luo, Wang, Structured Knowledge Distillation for Semantic Segmentation, CVPR
        2019 (arXiv 1903.04197), section 3, pixel-wise distillation.
    Differs: the paper writes KL(student || teacher); the authors' code takes the soft cross-entropy with the
        teacher as the target, as this does, sums it over the batch and divides by the positions of one image.
    """

    weight: ClassVar[float] = 10.0
    ranges: ClassVar[Mapping[str, str]] = {"temperature": "(0, inf)"}
    golden: ClassVar[float] = 1.01160131011418
    dense: ClassVar[bool] = True

    def __init__(self, *, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = temperature

    def compute(self, student: Outputs, teacher: Outputs, labels: Tensor, at: Moment) -> Tensor:
        """The divergence, averaged over positions."""
        z_s, z_t = same_positions(student.logits, teacher.logits)
        log_p, log_q = (z_s / self.temperature).log_softmax(1), (z_t / self.temperature).log_softmax(1)
        values = (log_q.exp() * (log_q - log_p)).sum(1)
        if labels.dim() == 3:
            left_out = F.interpolate((labels == -100)[:, None].float(), values.shape[1:])[:, 0]
            values = values[left_out == 0]
        return values.mean() * self.temperature**2 if values.numel() else connected_zero(z_s)
