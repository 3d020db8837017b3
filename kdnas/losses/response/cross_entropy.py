"""Cross-entropy with the labels."""

from collections.abc import Mapping
from typing import ClassVar, final

import torch.nn.functional as F
from torch import Tensor

from kdnas.losses.base import Loss
from kdnas.outputs import Moment, Outputs


@final
class CrossEntropy(Loss):
    r"""Cross-entropy with the labels; the teacher is not used.

    $L = -\frac{1}{B} \sum_b \sum_c y_{bc} \log p_{bc}$ with $p = \mathrm{softmax}(z_s)$ and
    $y = (1 - \epsilon) \cdot \mathrm{onehot} + \epsilon / C$.

    Shapes: logits `[batch, classes]` with labels `[batch]`, or `[batch, classes, height, width]` with
    `[batch, height, width]`; a label of -100 is left out. Divisor: the number of labels that are not left
    out (0 if there are none).

    Args:
        label_smoothing: the share $\epsilon$ of the target that is spread evenly over all classes, in [0, 1); default
            0.

    Raises:
        ValueError: `label_smoothing` is outside [0, 1).

    Reference: Szegedy et al., Rethinking the Inception Architecture for Computer Vision, CVPR 2016, section 7
        (label smoothing).
    Differs: no difference.
    """

    needs: ClassVar[tuple[str, ...]] = ("logits", "labels")
    uses_teacher: ClassVar[bool] = False
    ranges: ClassVar[Mapping[str, str]] = {"label_smoothing": "[0, 1)"}
    golden: ClassVar[float] = 3.2529208139396064

    def __init__(self, *, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    def compute(self, student: Outputs, teacher: Outputs, labels: Tensor, at: Moment) -> Tensor:
        """The cross-entropy, averaged over the labels."""
        counted = (labels != -100).sum()
        total = F.cross_entropy(student.logits, labels, reduction="sum", label_smoothing=self.label_smoothing)
        return total / counted.clamp_min(1)
