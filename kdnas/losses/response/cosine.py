"""Direction of a vector of features."""

from collections.abc import Mapping
from typing import ClassVar, final

import torch
from torch import Tensor

from kdnas.losses.base import Loss
from kdnas.numerics import safe_normalize
from kdnas.outputs import Moment, Outputs


@final
class Cosine(Loss):
    r"""One minus the cosine between the vectors that student and teacher give for an image.

    With the outputs cut into $M$ parts, one for each teacher,
    $L = \frac{1}{B M} \sum_b \sum_m \left(1 - \cos(z^s_{b,m}, z^t_{b,m})\right)$, in [0, 2].

    For outputs that are features and no classes: the lengths of the vectors are free, so that teachers of any scale
    weigh alike. A student of other widths reaches the teacher's by its last linear layer, whose rows for a teacher are
    that teacher's connector.

    Shapes: outputs `[batch, dims]`, or `[batch, dims, height, width]` compared position by position. Divisor: batch
    times parts (times positions). A zero vector has cosine 0 with every other.

    Default weight 1: no published value; the loss has unit scale.

    Args:
        widths: numbers of outputs of the parts, in their order; default (), one part.

    Raises:
        ValueError: widths whose sum is not the number of outputs.

    Reference: Ranzinger et al., AM-RADIO: Agglomerative Vision Foundation Model, CVPR 2024 (several teachers, the
        cosine for the vector of a whole image).
    Differs: one linear layer where AM-RADIO has a perceptron of two layers for each teacher.
    """

    ranges: ClassVar[Mapping[str, str]] = {"widths": "[1, inf)"}
    golden: ClassVar[float] = 0.7747006534714004

    def __init__(self, *, widths: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.widths = widths

    def compute(self, student: Outputs, teacher: Outputs, labels: Tensor, at: Moment) -> Tensor:
        """The mean over images and parts."""
        dims = student.logits.shape[1]
        if self.widths and sum(self.widths) != dims:
            raise ValueError(f"`widths` must have the sum {dims}, the number of outputs, got {self.widths}.")
        widths = list(self.widths or (dims,))
        parts = zip(student.logits.split(widths, 1), teacher.logits.split(widths, 1), strict=True)
        return torch.stack([1 - (safe_normalize(s, 1) * safe_normalize(t, 1)).sum(1).mean() for s, t in parts]).mean()
