"""KL divergence over the teacher's most probable classes, for strongly augmented images."""

from collections.abc import Mapping
from typing import ClassVar, final

from torch import Tensor

from kdnas.losses.base import Loss
from kdnas.outputs import Moment, Outputs


@final
class TopKDistillation(Loss):
    r"""KL divergence restricted to the teacher's most probable classes.

    Strong augmentation may remove the labelled object; the teacher's prediction describes the augmented image. With
    $p = \mathrm{softmax}(z_s)$, $q = \mathrm{softmax}(z_t)$ over all classes and $K_b$ the classes with the $K$
    largest $q_b$, $L = \frac{1}{B} \sum_b \sum_{c \in K_b} q_{bc} (\log q_{bc} - \log p_{bc})$.

    Normalisation: by default both softmaxes run over all classes, and a class outside $K_b$ gets a gradient
    through the student's normaliser alone (its share of the teacher's top mass: it is pushed down). The terms
    then sum to a KL only if $K$ is the number of classes, and the value may fall below 0, at the least to
    $Q \log Q$ for a teacher with mass $Q$ in its top $K$. With `renormalize` both softmaxes run over $K_b$,
    the value is a KL, and the other classes get no gradient at all.

    Shapes: logits `[batch, classes]`, or `[batch, classes, height, width]` compared position by position.
    Divisor: batch (times positions); classes are summed. With no more than $K$ classes this is ordinary KL at
    temperature 1. Student and teacher must see the same augmented image.

    Default weight 0.5, beside the labels at 1: the paper's best on ImageNet, with K = 5.

    Args:
        num_classes: $K$, more for stronger augmentation; default 5.
        renormalize: normalise both distributions over the $K$ classes; default False.

    Raises:
        ValueError: `num_classes` below 1, or below 2 with `renormalize` (a distribution over one class).

    Reference: Wei, Xiao, Xie, Chen, Zhang, Tian, Circumventing Outliers of AutoAugment with Knowledge
        Distillation, ECCV 2020 (arXiv 2003.11342).
    Differs: the paper names the restriction to the top K; the normalisation stated here is ours.
    """

    weight: ClassVar[float] = 0.5
    ranges: ClassVar[Mapping[str, str]] = {"num_classes": "[1, inf)"}
    golden: ClassVar[float] = 1.4064333201848016

    def __init__(self, *, num_classes: int = 5, renormalize: bool = False) -> None:
        super().__init__()
        if num_classes < 1 + renormalize:
            raise ValueError(
                f"`num_classes` must be at least {1 + renormalize} with renormalize={renormalize}, got {num_classes}. "
                "The paper uses 5."
            )
        self.num_classes, self.renormalize = num_classes, renormalize

    def compute(self, student: Outputs, teacher: Outputs, labels: Tensor, at: Moment) -> Tensor:
        """The sum over the teacher's top classes, averaged over samples."""
        best = teacher.logits.topk(min(self.num_classes, teacher.logits.shape[1]), 1).indices
        if self.renormalize:
            log_p, log_q = (z.gather(1, best).log_softmax(1) for z in (student.logits, teacher.logits))
        else:
            log_p, log_q = (z.log_softmax(1).gather(1, best) for z in (student.logits, teacher.logits))
        return (log_q.exp() * (log_q - log_p)).sum(1).mean()
