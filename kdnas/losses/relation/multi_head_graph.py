"""Attention heads, trained on the teacher alone, that relate the samples' singular vectors of two stages."""

from collections.abc import Mapping
from itertools import pairwise
from typing import ClassVar, final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdnas.losses.base import Stage, connected_zero
from kdnas.losses.relation._singular_vectors import leading_vectors
from kdnas.losses.relation.base import LayerRelation
from kdnas.losses.stage_pairs import Pairs, StagePair
from kdnas.numerics import as_map, safe_normalize, same_positions
from kdnas.outputs import Outputs


@final
class MultiHeadGraph(LayerRelation):
    r"""KL divergence between graphs of the samples, computed by attention heads trained on the teacher (MHGD).

    $V_l \in R^{B \times C_l}$ holds the first right singular vector of every sample's map, as in `SingularValue`
    (canonical signs; for the student the best match among its first four). Between consecutive stages, head $h$ of
    width $D = \lfloor (C_l + C_{l+1}) / 2 \rfloor$ gives the graph
    $G_h = \mathrm{BN}(V_{l+1} W^k_h) \, \mathrm{BN}(V_l W^q_h)^\top \in R^{B \times B}$.

    Preparation (`heads`, the teacher only): with $P_h = \mathrm{softmax}_{rows}(G_h)$ and heads dropped at random per
    row (a head stays where its Gaussian noise exceeds the mean over the heads), an estimator predicts the next stage's
    vector, $\hat V = \mathrm{normalise}(W \, \mathrm{concat}_h P_h \mathrm{relu}(\mathrm{BN}(V_l W^v)) + b)$,
    minimising $\operatorname{mean}_b (1 - \langle \hat V_b, V_{l+1,b} \rangle)$, summed over relations.

    Transfer: the same frozen heads, with their running statistics, on both networks, and
    $L = \sum_{\text{relations}} w \operatorname{mean}_{h,i} \sum_j q_{hij} \log (q_{hij} / p_{hij})$ with
    $q = \mathrm{softmax}_{rows}(\tanh G^t)$ and $p = \mathrm{softmax}_{rows}(\tanh G^s)$.

    Shapes: maps `[batch, channels, h, w]` or tokens; graphs `[heads, batch, batch]`.
    Divisor: heads times batch. Rows run over the batch: keep its size constant. A batch of one: 0. The
    heads get no gradient from the transfer; the adapter does.

    Stages: 40 epochs of heads, 100 of transfer beside the other terms. `staged=False` skips the first, and the heads
    stay at their random initialisation. The noise of step $n$ of the preparation comes from `(seed, n)`.

    Default weight 1024: the authors sum over 8 heads and the rows of a batch of 128, with weight 1.

    Args:
        taps: how stages are paired: `resolution` (default), `rdm`, `order` or explicit pairs, as in `StagePairs`.
        weights: one weight per relation; default None: 1 each.
        num_heads: attention heads per relation, at least 1; default 8.
        staged: train the heads first; default True.
        seed: random seed of the noise that drops heads; default 0.

    Raises:
        ValueError: fewer than two pairs of stages, or fewer than one head.

    Reference: Lee, Song, Graph-based Knowledge Distillation by Multi-head Attention Network, BMVC 2019,
        arXiv 1907.02226, section 3.
    Differs: teacher first in the divergence (the authors' code has the student first), a mean instead of a sum,
        canonical signs. Weight decay on the heads is the run's. `Objective` clips the distillation gradient to the
        norm of the task's gradient.
    """

    weight: ClassVar[float] = 1024.0
    ranges: ClassVar[Mapping[str, str]] = {"num_heads": "[1, inf)", "seed": "[0, inf)"}
    whole_batch: ClassVar[bool] = True
    golden: ClassVar[float | None] = 0.0003805991701537745
    clipped: ClassVar[bool] = True

    def __init__(
        self,
        *,
        taps: str | Pairs = "resolution",
        weights: tuple[float, ...] | None = None,
        num_heads: int = 8,
        staged: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(taps=taps, weights=weights)
        self.num_heads, self.staged, self.seed = num_heads, staged, seed
        self.heads = nn.ModuleList()
        self.register_buffer("num_prepared", torch.zeros((), dtype=torch.int64))

    def build_parts(self, pairs: tuple[StagePair, ...]) -> None:
        """Build the heads and estimators for every two consecutive stages of the teacher."""
        widths = [_width(pair.teacher_shape) for pair in pairs]
        self.heads = nn.ModuleList(_Heads(a, b, self.num_heads) for a, b in pairwise(widths))

    def build(self, student: Outputs, teacher: Outputs, *, elastic: bool) -> None:
        """Pair the stages, build the adapters and the heads."""
        super().build(student, teacher, elastic=elastic)
        self.heads.to(student.logits.device)
        self.num_prepared = self.num_prepared.to(student.logits.device)
        maps = ((as_map(student.maps[i]), as_map(teacher.maps[j])) for i, j in self.taps.pairs)
        self._sizes = [same_positions(*pair)[1].shape[2:] for pair in maps]

    def describe(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """The first singular vector of each sample, `[batch, channels]` each."""
        target = leading_vectors(teacher, 1)[1]
        spare = min(4, *student.flatten(2).shape[1:])
        return leading_vectors(student, spare, like=target)[1][..., 0], target[..., 0]

    def relate(self, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], index: int) -> Tensor:
        """The divergence of the student's graph from the teacher's, both by the frozen heads."""
        self._check_prepared()
        heads = self.heads[index]
        log_p, log_q = (heads(f, s, frozen=True).tanh().log_softmax(2) for f, s in zip(first, second, strict=True))
        return (log_q.exp() * (log_q - log_p)).sum(2).mean()

    def pretrain(self, teacher: Outputs) -> Tensor:
        """The error with which the estimators predict each stage's vectors from the stage before."""
        self._check_prepared()
        maps = [as_map(teacher.maps[j]) for _, j in self.taps.pairs]
        if len(maps[0]) < 2:  # one sample has no batch statistics
            return connected_zero(*self.heads.parameters())
        pooled = [F.adaptive_avg_pool2d(m, (size[0], size[1])) for m, size in zip(maps, self._sizes, strict=True)]
        vectors = [leading_vectors(m, 1)[1][..., 0] for m in pooled]
        generator = np.random.default_rng((self.seed, int(self.num_prepared)))
        self.num_prepared += 1
        values = []
        for heads, (first, second) in zip(self.heads, pairwise(vectors), strict=True):
            assert isinstance(heads, _Heads)
            noise = generator.standard_normal((self.num_heads, len(first), 1))
            mask = noise > noise.mean(0) if self.num_heads > 1 else np.ones_like(noise)
            estimate = heads.estimate(first, second, torch.from_numpy(mask).to(first))
            values.append(1 - (estimate * second).sum(1).mean())
        return torch.stack(values).sum()

    def stages(self) -> tuple[Stage, ...]:
        """The heads on the teacher alone, then the transfer; with `staged=False` the transfer alone."""
        if not self.staged:
            return super().stages()
        return (Stage("heads", 2 / 7, trains="parts", uses="preparation"), Stage("transfer", 5 / 7))

    def _check_prepared(self) -> None:
        if not len(self.heads):
            raise ValueError(
                "MultiHeadGraph is not prepared. Call loss.prepare(student, teacher) with the outputs of the largest "
                "student before the optimiser is created."
            )


class _Heads(nn.Module):
    def __init__(self, first: int, second: int, num_heads: int) -> None:
        super().__init__()
        width = (first + second) // 2
        self.num_heads = num_heads
        self.key, self.key_norm = nn.Linear(second, num_heads * width, bias=False), nn.BatchNorm1d(num_heads * width)
        self.query, self.query_norm = nn.Linear(first, num_heads * width, bias=False), nn.BatchNorm1d(num_heads * width)
        self.value, self.value_norm = nn.Linear(first, width, bias=False), nn.BatchNorm1d(width)
        self.out = nn.Linear(num_heads * width, second)

    def forward(self, first: Tensor, second: Tensor, *, frozen: bool) -> Tensor:
        """The graphs, `[heads, batch, batch]`; `frozen`: running statistics and no gradient to the heads."""
        keys, queries = (
            _project(x, linear, norm, frozen).unflatten(1, (self.num_heads, -1)).transpose(0, 1)
            for x, linear, norm in ((second, self.key, self.key_norm), (first, self.query, self.query_norm))
        )
        return keys @ queries.transpose(1, 2)

    def estimate(self, first: Tensor, second: Tensor, mask: Tensor) -> Tensor:
        """The second stage's vectors as predicted from the first's."""
        attention = self(first, second, frozen=False).softmax(2) * mask
        mixed = attention @ _project(first, self.value, self.value_norm, False).relu()
        return safe_normalize(self.out(mixed.transpose(0, 1).flatten(1)))


def _project(x: Tensor, linear: nn.Linear, norm: nn.BatchNorm1d, frozen: bool) -> Tensor:
    if not frozen:
        return F.batch_norm(linear(x), norm.running_mean, norm.running_var, norm.weight, norm.bias, True, 0.1, norm.eps)
    return F.batch_norm(
        F.linear(x, linear.weight.detach()),
        norm.running_mean,
        norm.running_var,
        norm.weight.detach(),
        norm.bias.detach(),
        False,
        0.0,
        norm.eps,
    )


def _width(shape: tuple[int, ...]) -> int:
    return shape[-1] if len(shape) == 2 else shape[0]
