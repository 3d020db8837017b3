"""Self-attention distillation: a network's shallow layers look where its deep ones look."""

from typing import ClassVar, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor

from kdnas.losses.base import Loss, Stage
from kdnas.losses.feature._attention_map import Pool, attention_map, check_exponent
from kdnas.losses.stage_pairs import Pairs
from kdnas.numerics import as_map
from kdnas.outputs import Moment, Outputs
from kdnas.specs import check_literals


@final
class SelfAttention(Loss):
    r"""The student's shallower attention map equals its own deeper one (SAD); the teacher is not read.

    With $G(f) = \sum_c |f_c|$, $\sum_c |f_c|^p$ or $\max_c |f_c|^p$ and $\Psi = \mathrm{softmax}_{hw}(G / T)$, the
    deeper $G$ interpolated bilinearly to the shallower's size before the softmax, the loss sums over the pairs (shallow
    $m$, deep $n$) $\frac1B \sum_b \frac{1}{H W} \sum_{hw} (\Psi(f_m) - \Psi(f_n))^2$. The deeper map is the target
    and is held constant (`own_gradient`).

    Stages: `task` (the other terms alone), then `joint`, from the share `start` on: attention is worth copying
    once the network is reasonable. `start=0` is one joint stage.

    Shapes: at least two stages, maps or tokens. Divisor: `mean` divides by batch and positions, and is tiny (a softmax
    over positions is about 1 / positions); `sum` divides by the batch only. A sum of squares well above $T$ makes the
    softmax one-hot and its gradient 0: raise $T$ for maps of large scale.

    Default weight 0.1: the authors', for lane detection.

    Args:
        pairs: `adjacent`, each stage with the next, or `((shallow, deep), ...)`; negative indices count from the end.
        pool: how channels are summed up.
        p: the exponent, 1 to 4.
        temperature: $T$.
        reduction: `mean` or `sum` over positions.
        start: the share of the training after which it is switched on.

    Raises:
        ValueError: an unknown name, a value out of range; a student with fewer than two stages.

    Reference: Hou, Ma, Liu, Loy, Learning Lightweight Lane Detection CNNs by Self Attention Distillation, ICCV 2019,
        equations 1 and 2; cardwing/Codes-for-Lane-Detection.
    Differs: the deeper map is detached; a PyTorch port lets both sides move. The paper starts after 40,000 steps; the
        share of two thirds is ours.
    """

    needs: ClassVar[tuple[str, ...]] = ("features",)
    uses_teacher: ClassVar[bool] = False
    weight: ClassVar[float] = 0.1
    golden: ClassVar[float] = 0.00036050177240966465
    own_gradient: ClassVar[bool] = True

    def __init__(
        self,
        *,
        pairs: str | Pairs = "adjacent",
        pool: Pool = "sum_p",
        p: float = 2.0,
        temperature: float = 1.0,
        reduction: Literal["mean", "sum"] = "mean",
        start: float = 2 / 3,
    ) -> None:
        super().__init__()
        check_exponent(p)
        if (isinstance(pairs, str) and pairs != "adjacent") or not pairs:
            raise ValueError(f"pairs must be adjacent or ((shallow, deep), ...), got {pairs!r}.")
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature}.")
        check_literals(type(self), locals())
        if not 0 <= start < 1:
            raise ValueError(f"start is a share of the training, at least 0 and below 1, got {start}.")
        self.pairs, self.pool, self.p = pairs, pool, p
        self.temperature, self.reduction, self.start = temperature, reduction, start

    def prepare(self, student: Outputs, teacher: Outputs, *, elastic: bool = False) -> None:
        """Check that the student's stages exist; the teacher may show none."""
        self._chosen(student)

    def compute(self, student: Outputs, teacher: Outputs, labels: Tensor, at: Moment) -> Tensor:
        """The differences of the pairs' attention maps."""
        values = []
        for shallow, deep in self._chosen(student):
            own = self._attention(student.features[shallow])
            target = self._attention(student.features[deep].detach())
            if own.shape != target.shape:
                target = F.interpolate(target, own.shape[2:], mode="bilinear", align_corners=False)
            difference = (self._softmax(own) - self._softmax(target)).square()
            values.append(difference.mean() if self.reduction == "mean" else difference.sum(1).mean())
        return torch.stack(values).sum()

    def stages(self) -> tuple[Stage, ...]:
        """`task` up to `start`, then `joint`."""
        if not self.start:
            return super().stages()
        return (Stage("task", self.start, trains="student", uses="task"), Stage("joint", 1 - self.start))

    def _attention(self, feature: Tensor) -> Tensor:
        return attention_map(as_map(feature), self.pool, self.p)

    def _softmax(self, attention: Tensor) -> Tensor:
        return (attention.flatten(1) / self.temperature).softmax(1)

    def _chosen(self, student: Outputs) -> Pairs:
        num_stages = len(student.features)
        if num_stages < 2:
            raise ValueError(f"self_attention compares a student's stages with each other, and it shows {num_stages}.")
        if isinstance(self.pairs, str):
            return tuple((i, i + 1) for i in range(num_stages - 1))
        for pair in self.pairs:
            if any(not -num_stages <= i < num_stages for i in pair):
                raise ValueError(f"the student has stages 0 to {num_stages - 1}, got the pair {pair}.")
        return self.pairs
