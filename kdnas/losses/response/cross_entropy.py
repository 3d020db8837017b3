"""Cross-entropy with the labels."""

from collections.abc import Mapping
from typing import ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor

from kdnas.losses.base import Loss
from kdnas.outputs import Moment, Outputs


@final
class CrossEntropy(Loss):
    r"""Cross-entropy with the labels; the teacher is not used.

    $L = -\frac{1}{B} \sum_b \sum_c y_{bc} \log p_{bc}$ with $p = \mathrm{softmax}(z_s)$ and
    $y = (1 - \epsilon) \cdot \mathrm{onehot} + \epsilon / C$. With class weights $w$, the terms of the sum over $c$ are
    multiplied by $w_c$, and the divisor is the sum of the weights of the labels.

    Shapes: logits `[batch, classes]` with labels `[batch]`, or `[batch, classes, height, width]` with
    `[batch, height, width]`; a label of -100 is left out. Divisor: the number of labels that are not left
    out (0 if there are none).

    Args:
        label_smoothing: the share $\epsilon$ of the target that is spread evenly over all classes, in [0, 1); default
            0.
        class_weights: $w$, one per class, at least 0; default none: 1 each.

    Raises:
        ValueError: `label_smoothing` is outside [0, 1), or the weights are negative or not one per class.

    Reference: Szegedy et al., Rethinking the Inception Architecture for Computer Vision, CVPR 2016, section 7
        (label smoothing).
    Differs: no difference.
    """

    needs: ClassVar[tuple[str, ...]] = ("logits", "labels")
    uses_teacher: ClassVar[bool] = False
    ranges: ClassVar[Mapping[str, str]] = {"label_smoothing": "[0, 1)", "class_weights": "[0, inf)"}
    golden: ClassVar[float] = 3.2529208139396064

    def __init__(self, *, label_smoothing: float = 0.0, class_weights: tuple[float, ...] = ()) -> None:
        super().__init__()
        self.label_smoothing, self.class_weights = label_smoothing, class_weights

    def compute(self, student: Outputs, teacher: Outputs, labels: Tensor, at: Moment) -> Tensor:
        """The cross-entropy, averaged over the labels."""
        counted = labels != -100
        if self.class_weights:
            return self._weighted(student.logits, labels, counted)
        total = F.cross_entropy(student.logits, labels, reduction="sum", label_smoothing=self.label_smoothing)
        return total / counted.sum().clamp_min(1)

    def _weighted(self, logits: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
        if len(self.class_weights) != logits.shape[1]:
            raise ValueError(
                f"`class_weights` must be one per class, {logits.shape[1]}, got {len(self.class_weights)}."
            )
        weights = logits.new_tensor(self.class_weights)
        total = F.cross_entropy(logits, labels, weights, reduction="sum", label_smoothing=self.label_smoothing)
        divisor = (weights[labels.clamp(min=0)] * counted).sum()
        return total / torch.where(divisor > 0, divisor, 1.0)
