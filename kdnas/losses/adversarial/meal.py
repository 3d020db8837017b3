"""Adversarial distillation at several depths (MEAL)."""

from collections.abc import Mapping
from typing import ClassVar, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdnas.losses.base import Loss, frozen
from kdnas.losses.stage_pairs import Pairs, StagePairs
from kdnas.outputs import Moment, Outputs

Similarity = Literal["soft_cross_entropy", "l1", "l2"]


@final
class Meal(Loss):
    r"""Adversarial loss on pooled features and logits, with one discriminator per depth (MEAL).

    For every paired stage, and last for the logits, $u$ and $v$ are the student's and the teacher's outputs
    averaged over positions and pooled to one length $d_l$ (the smaller number of channels), $p$ and $q$ their
    softmaxes, and $D_l$ a discriminator, high for the teacher:

    - student: $L = \sum_l [\gamma_l S_l + \lambda \frac{1}{B} \sum_b \mathrm{softplus}(-D_l(u_l))]$ with $S_l$ the
      `soft_cross_entropy` $-\frac{1}{B} \sum_b \sum_c q_c \log p_c$, `l1` $\frac{1}{B} \sum |p - q|$ or
      `l2` $\frac{1}{B} \sum (p - q)^2$;
    - discriminators: $\sum_l \frac{1}{B} \sum_b [\mathrm{softplus}(-D_l(v_l)) + \mathrm{softplus}(D_l(u_l))]$, by
      `adversary`.

    The paper uses no hard labels. It draws one of several teachers for each step: give the run a teacher
    ensemble, or one instance of this loss per teacher.

    Shapes: logits `[batch, classes]` (maps are averaged over positions); features of any shape. Divisor: batch.

    Learnable parts: $D_l$, three 1x1 convolutions on a pooled vector, which are fully connected layers, of
    $d_l$, $d_l / 2$, $d_l / 4$ units; the authors' learning rate for them is 1e-3. Default weight 1.

    Args:
        similarity: $S$; default `soft_cross_entropy`.
        gammas: $\gamma$, one number per pair of stages and one for the logits; default None: the last of the authors'
            0.001, 0.01, 0.05, 0.1, 1.
        adversarial: $\lambda$; default 1.
        taps: how stages are paired: `resolution` (default), `rdm`, `order` or explicit pairs, as in `StagePairs`.

    Raises:
        ValueError: an unknown similarity, the wrong number of gammas, or the loss was not prepared.

    Reference: Shen, He, Xue, MEAL: Multi-Model Ensemble via Adversarial Learning, AAAI 2019 (arXiv 1812.02425),
        section 3.
    Differs: a minimax game. The authors' code gives student and discriminator one optimiser and one sign, so
        that the student learns to be distinguishable, and ends each discriminator in a ReLU; here there is one
        score instead of two. Losses are sums over the pooled entries, not means.
    """

    needs: ClassVar[tuple[str, ...]] = ("logits", "features")
    ranges: ClassVar[Mapping[str, str]] = {"gammas": "[0, inf)", "adversarial": "[0, inf)"}
    golden: ClassVar[float] = 6.040192068329766
    discriminator_rates: ClassVar[Mapping[str, float]] = {"discriminators": 1e-3}

    def __init__(
        self,
        *,
        similarity: Similarity = "soft_cross_entropy",
        gammas: tuple[float, ...] | None = None,
        adversarial: float = 1.0,
        taps: str | Pairs = "resolution",
    ) -> None:
        super().__init__()
        self.similarity, self.gammas, self.adversarial = similarity, gammas, adversarial
        self.taps = StagePairs(pairs=taps)
        self.lengths: tuple[int, ...] = ()
        self.discriminators = nn.ModuleList()

    def build(self, student: Outputs, teacher: Outputs, *, elastic: bool) -> None:
        """Pair the stages and build one discriminator per pair and one for the logits."""
        self.taps.prepare(student, teacher, elastic)
        pairs = self._vectors(student, teacher)
        if self.gammas is not None and len(self.gammas) != len(pairs):
            raise ValueError(
                f"`gammas` must have {len(pairs)} numbers, one per pair of stages and one for the logits, "
                f"got {len(self.gammas)}."
            )
        self.lengths = tuple(min(u.shape[1], v.shape[1]) for u, v in pairs)
        self.discriminators = nn.ModuleList(_discriminator(length) for length in self.lengths).to(student.logits.device)

    def compute(self, student: Outputs, teacher: Outputs, labels: Tensor, at: Moment) -> Tensor:
        """The student's loss."""
        loss = student.logits.new_zeros(())
        pooled = self._pooled(student, teacher)
        gammas = self.gammas or (0.001,) * (len(pooled) - 5) + (0.001, 0.01, 0.05, 0.1, 1.0)[-len(pooled) :]
        for (u, v), gamma, discriminator in zip(pooled, gammas, self.discriminators, strict=True):
            loss = loss + gamma * self._distance(u, v)
            loss = loss + self.adversarial * F.softplus(-frozen(discriminator, u)).mean()
        return loss

    def discriminate(self, student: Outputs, teacher: Outputs, labels: Tensor, at: Moment) -> Tensor:
        """The discriminators' loss."""
        losses = [
            F.softplus(-discriminator(v)).mean() + F.softplus(discriminator(u)).mean()
            for (u, v), discriminator in zip(self._pooled(student, teacher), self.discriminators, strict=True)
        ]
        return torch.stack(losses).sum()

    def _distance(self, u: Tensor, v: Tensor) -> Tensor:
        if self.similarity == "soft_cross_entropy":
            return -(v.softmax(1) * u.log_softmax(1)).sum(1).mean()
        gap = u.softmax(1) - v.softmax(1)
        return (gap.abs() if self.similarity == "l1" else gap.square()).sum(1).mean()

    def _vectors(self, student: Outputs, teacher: Outputs) -> list[tuple[Tensor, Tensor]]:
        pairs = [*self.taps(student, teacher), (student.logits, teacher.logits)]
        return [(_over_positions(u), _over_positions(v)) for u, v in pairs]

    def _pooled(self, student: Outputs, teacher: Outputs) -> list[tuple[Tensor, Tensor]]:
        if not self.lengths:
            raise ValueError("Meal has no discriminators yet. Call prepare(student, teacher) first.")
        pairs = zip(self._vectors(student, teacher), self.lengths, strict=True)
        return [(_to_length(u, length), _to_length(v, length)) for (u, v), length in pairs]


def _discriminator(length: int) -> nn.Sequential:
    half, quarter = max(1, length // 2), max(1, length // 4)
    return nn.Sequential(nn.Linear(length, half), nn.ReLU(), nn.Linear(half, quarter), nn.ReLU(), nn.Linear(quarter, 1))


def _over_positions(x: Tensor) -> Tensor:
    return x.mean(1) if x.dim() == 3 else x.flatten(2).mean(2) if x.dim() == 4 else x


def _to_length(x: Tensor, length: int) -> Tensor:
    return x if x.shape[1] == length else F.adaptive_avg_pool1d(x, length)
