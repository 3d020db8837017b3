"""Self-attention distillation: shallow layers imitate the attention maps of deeper layers (SAD)."""

from collections.abc import Mapping
from typing import ClassVar, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor

from kdnas.losses.base import Loss, Stage
from kdnas.losses.feature._attention_map import EXPONENTS, Pool, attention_map
from kdnas.losses.stage_pairs import Pairs
from kdnas.numerics import as_map
from kdnas.outputs import Moment, Outputs


@final
class SelfAttention(Loss):
    r"""Squared distance between the attention maps of a shallow and a deeper stage of the student (SAD).

    With $G(f) = \sum_c |f_c|$, $\sum_c |f_c|^p$ or $\max_c |f_c|^p$ and $\Psi = \mathrm{softmax}_{hw}(G / T)$, the
    deeper $G$ interpolated bilinearly to the shallower's size before the softmax, the loss sums over the pairs (shallow
    $m$, deep $n$) $\frac1B \sum_b \frac{1}{H W} \sum_{hw} (\Psi(f_m) - \Psi(f_n))^2$. The deeper map is the target
    and is detached (`own_gradient`). The teacher is not used.

    Stages: `task` (the other terms alone), then `joint`, from the share `start` on, since only the
    attention of a trained network is a useful target. `start=0` is one joint stage.

    Shapes: at least two stages, maps or tokens. Divisor: `mean` divides by batch and positions, and is tiny (a softmax
    over positions is about 1 / positions); `sum` divides by the batch only. A sum of squares well above $T$ makes the
    softmax one-hot and its gradient 0: raise $T$ for maps of large scale.

    Default weight 0.1: the authors', for lane detection.

    Args:
        pairs: default `adjacent`, each stage with the next, or `((shallow, deep), ...)`; negative indices count from
            the end.
        pool: the reduction over channels: `sum`, `sum_p` or `max_p`; default `sum_p`.
        p: the exponent, in [1, 4]; default 2.
        temperature: $T$, above 0; default 1.
        reduction: `mean` or `sum` over positions; default `mean`.
        start: the share of the training before the loss is added, in [0, 1); default 2/3.

    Raises:
        ValueError: an unknown option, a value out of range; a student with fewer than two stages.

    Reference: Hou, Ma, Liu, Loy, Learning Lightweight Lane Detection CNNs by Self Attention Distillation, ICCV 2019,
        equations 1 and 2; cardwing/Codes-for-Lane-Detection.
    Differs: the deeper map is detached; in a PyTorch port both maps get a gradient. The paper starts after 40,000
        steps; the share of two thirds is ours.
    """

    needs: ClassVar[tuple[str, ...]] = ("features",)
    uses_teacher: ClassVar[bool] = False
    weight: ClassVar[float] = 0.1
    ranges: ClassVar[Mapping[str, str]] = {"p": EXPONENTS, "start": "[0, 1)", "temperature": "(0, inf)"}
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
        if (isinstance(pairs, str) and pairs != "adjacent") or not pairs:
            raise ValueError(f"`pairs` must be adjacent or ((shallow, deep), ...), got {pairs!r}.")
        self.pairs, self.pool, self.p = pairs, pool, p
        self.temperature, self.reduction, self.start = temperature, reduction, start

    def build(self, student: Outputs, teacher: Outputs, *, elastic: bool) -> None:
        """Check that the student's stages exist; the teacher needs none."""
        self._resolve_pairs(student)

    def compute(self, student: Outputs, teacher: Outputs, labels: Tensor, at: Moment) -> Tensor:
        """The differences of the pairs' attention maps."""
        values = []
        for shallow, deep in self._resolve_pairs(student):
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

    def _resolve_pairs(self, student: Outputs) -> Pairs:
        num_stages = len(student.features)
        if num_stages < 2:
            raise ValueError(f"SelfAttention needs at least 2 stages of the student, got {num_stages}.")
        if isinstance(self.pairs, str):
            return tuple((i, i + 1) for i in range(num_stages - 1))
        for pair in self.pairs:
            if any(not -num_stages <= i < num_stages for i in pair):
                raise ValueError(f"`pairs` must name student stages 0 to {num_stages - 1}, got the pair {pair}.")
        return self.pairs
