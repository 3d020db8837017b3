"""Distillation of the attention maps of transformers."""

import math
from collections.abc import Mapping
from typing import ClassVar, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor

from kdnas.losses.base import Loss
from kdnas.numerics import safe_normalize
from kdnas.outputs import Moment, Outputs

Kind = Literal["cosine", "kl", "mse", "inner"]

# Added to a probability under a logarithm: an attention map is softmaxed already, and may hold zeros.
EPSILON = 1e-6


@final
class AttentionMap(Loss):
    r"""Distance between the attention maps of paired transformer layers.

    With $A$ the map of one head, rows $i$ (queries) summing to 1 over columns $j$ (keys), and $\langle A, A' \rangle$
    the sum of the products of all entries, the loss of a pair of layers is the mean over batch and heads of

    - `cosine`: $1 - \langle A^t, A^s \rangle / (|A^t| |A^s|)$;
    - `kl`: $\frac1n \sum_{ij} A^t_{ij} \log\frac{A^t_{ij} + \epsilon}{A^s_{ij} + \epsilon}$, $\epsilon = 10^{-6}$;
    - `mse`: $\frac{1}{n^2} \sum_{ij} (A^t_{ij} - A^s_{ij})^2$;
    - `inner`: $-\langle A^t, A^s \rangle / n$, which rewards agreement but is not 0 for equal maps;

    and $L$ is the sum over the pairs of layers. Kernel pooling (`pool`) averages the maps over `pool` x `pool` windows
    first, after which rows are divided by their sums again.

    Shapes: `[batch, heads, n, n]`. Unequal numbers of heads: both maps are averaged over heads. Unequal $n$: the larger
    map is resized bilinearly (antialiased) to the smaller, and rows are divided by their sums again.
    Divisor: batch times heads (times rows, or entries); layers are summed.
    Equal `cosine` maps may give a rounding error instead of 0.

    Default weight 1: no published value.

    Args:
        kind: the distance between two maps; default `cosine`.
        layers: `uniform` (student layer $i$ of $m$ with teacher layer $\lceil i \cdot n / m \rceil$, last with last),
            `last` (the last of both), or explicit pairs `((student layer, teacher layer), ...)`; default `uniform`.
        pool: side of the pooling window, in tokens, at least 1; default 1: no pooling.

    Raises:
        ValueError: an unknown kind or pairing, a window below 1, a layer that does not exist, or no attention maps.

    Reference: the attention distillation $\sum_l \sum_{pq} \langle A^t_{pq}, A^s_{pq} \rangle$ with kernel pooling is
        `inner`; layers paired uniformly and `mse`: Jiao et al., TinyBERT, Findings of EMNLP 2020, arXiv 1909.10351,
        equation 7; `kl`: Wang et al., MiniLM, NeurIPS 2020, arXiv 2002.10957, section 3.
    Differs: `inner` is negated, since minimising the product as written would push the maps apart (a negative
        weight gives it back). A resized map treats tokens as a sequence, not as a grid, class token included.
    """

    needs: ClassVar[tuple[str, ...]] = ("attentions",)
    ranges: ClassVar[Mapping[str, str]] = {"pool": "[1, inf)"}
    golden: ClassVar[float | None] = 0.11378612987447068

    def __init__(
        self,
        *,
        kind: Kind = "cosine",
        layers: Literal["uniform", "last"] | tuple[tuple[int, int], ...] = "uniform",
        pool: int = 1,
    ) -> None:
        super().__init__()
        self.kind, self.layers, self.pool = kind, layers, pool

    def compute(self, student: Outputs, teacher: Outputs, labels: Tensor, at: Moment) -> Tensor:
        """The sum over the paired layers."""
        return torch.stack(
            [
                self._between(student.attentions[i], teacher.attentions[j])
                for i, j in self._pairs(len(student.attentions), len(teacher.attentions))
            ]
        ).sum()

    def _pairs(self, num_student: int, num_teacher: int) -> tuple[tuple[int, int], ...]:
        if not num_student or not num_teacher:
            raise ValueError(
                f"AttentionMap needs attention maps of both networks, got {num_student} of the student and "
                f"{num_teacher} of the teacher. Use transformers, or a feature loss."
            )
        if self.layers == "last":
            return ((num_student - 1, num_teacher - 1),)
        if self.layers == "uniform":
            return tuple((i, math.ceil((i + 1) * num_teacher / num_student) - 1) for i in range(num_student))
        assert not isinstance(self.layers, str)
        for i, j in self.layers:
            if not (-num_student <= i < num_student and -num_teacher <= j < num_teacher):
                raise ValueError(
                    f"`layers` must index {num_student} student and {num_teacher} teacher attention layers, got the "
                    f"pair {(i, j)}."
                )
        return self.layers

    def _between(self, student: Tensor, teacher: Tensor) -> Tensor:
        if student.shape[1] != teacher.shape[1]:
            student, teacher = student.mean(1, keepdim=True), teacher.mean(1, keepdim=True)
        size = min(student.shape[-1], teacher.shape[-1])
        student, teacher = (_pooled(_resized(x, size), self.pool) for x in (student, teacher))
        if self.kind == "mse":
            return (student - teacher).square().mean()
        if self.kind == "kl":
            gaps = (teacher + EPSILON).log() - (student + EPSILON).log()
            return (teacher * gaps).sum(3).mean()
        if self.kind == "inner":
            return -(student * teacher).sum(3).mean()
        return 1 - (safe_normalize(student.flatten(2)) * safe_normalize(teacher.flatten(2))).sum(2).mean()


def _resized(attention: Tensor, size: int) -> Tensor:
    if attention.shape[-1] == size:
        return attention
    return _normalise_rows(F.interpolate(attention, (size, size), mode="bilinear", antialias=True))


def _pooled(attention: Tensor, side: int) -> Tensor:
    if side == 1:
        return attention
    return _normalise_rows(F.avg_pool2d(attention, side, ceil_mode=True))


def _normalise_rows(attention: Tensor) -> Tensor:
    total = attention.sum(-1, keepdim=True)
    return attention / torch.where(total > 0, total, 1)
