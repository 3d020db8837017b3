"""Instance relationship graph (IRG)."""

from collections.abc import Mapping
from itertools import pairwise
from typing import ClassVar, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor

from kdnas.losses.base import Loss
from kdnas.losses.stage_pairs import Adapter, StagePairs
from kdnas.numerics import as_map, rescale, same_positions, squared_distances
from kdnas.outputs import Moment, Outputs, embedding


@final
class InstanceGraph(Loss):
    """Matches the graph of a batch: logits, distances between samples, and each sample's move between stages (IRG).

    L = vertex * V + edge * E + transformation * T, with paired stages l = 1..n, maps x_l, embedding e (the deepest map
    averaged over positions):

        V = mean over samples and classes of (logits_s - logits_t)^2
        E = mean over the n maps and the embedding of mean_ij (D_s,ij - D_t,ij)^2,
            D_ij = |x_i - x_j|^2 / max over the batch, of flattened maps
        T = mean over consecutive pairs of mean_i (M_s,i - M_t,i)^2,
            M_i = |x_l,i - x_l+1,i|^2 / max over the batch, both maps average-pooled to common height, width, channels

    Divisors: as written; per-sample and per-pair means. Dims of student and teacher are free in E and T. Where all
    distances are 0 (a batch of one, equal samples) D or M is 0; with a single paired stage T is 0. Memory batch^2.

    `weight` 1; the terms' own weights are Knowledge-Distillation-Zoo's.

    Args:
        vertex: weight of the vertices; default 0.1.
        edge: weight of the edges; default 5.
        transformation: weight of the transformations; default 5.
        vertices: `logits`, or `features` for the embedding, with a learnable projection of the student's where the
            channels differ; default `logits`.
        through_max: whether gradient flows through the largest distance, by which the others are divided; the authors'
            does not; default True.
        taps: how stages are paired: `resolution` (default), `rdm`, `order` or explicit pairs, as in `StagePairs`.

    Reference: Liu et al., Knowledge Distillation via Instance Relationship Graph, CVPR 2019, section 3;
        AberHu/Knowledge-Distillation-Zoo irg.py for the means and weights.
    Differs: three versions exist. The authors' Caffe layer sums edges over 2 * batch and counts each pair's gradient
        once; the Zoo's, used here, needs equal channels or exactly twice as many in T, where this one pools channels.
        The paper's edge transformation (the change of D between stages) is left out, as in the Zoo.
    """

    needs: ClassVar[tuple[str, ...]] = ("logits", "features")
    ranges: ClassVar[Mapping[str, str]] = {"vertex": "[0, inf)", "edge": "[0, inf)", "transformation": "[0, inf)"}
    whole_batch: ClassVar[bool] = True
    golden: ClassVar[float | None] = 1.328174266514482

    def __init__(
        self,
        *,
        vertex: float = 0.1,
        edge: float = 5.0,
        transformation: float = 5.0,
        vertices: Literal["logits", "features"] = "logits",
        through_max: bool = True,
        taps: str | tuple[tuple[int, int], ...] = "resolution",
    ) -> None:
        super().__init__()
        self.vertex, self.edge, self.transformation = vertex, edge, transformation
        self.vertices, self.through_max = vertices, through_max
        self.taps = StagePairs(pairs=taps)
        self.projector: Adapter | None = None

    def build(self, student: Outputs, teacher: Outputs, *, elastic: bool) -> None:
        """Pair the stages and, for feature vertices of other channels, build the projection."""
        self.taps.prepare(student, teacher, elastic)
        if self.vertices == "features":
            mine, theirs = embedding(student).shape[1], embedding(teacher).shape[1]
            if elastic or mine != theirs:
                self.projector = Adapter(mine, theirs).to(student.logits.device)

    def compute(self, student: Outputs, teacher: Outputs, labels: Tensor, at: Moment) -> Tensor:
        """The weighted sum of the three terms."""
        pairs = self.taps(student, teacher)
        ends = (embedding(student), embedding(teacher))
        edges = [self._edges(s) - self._edges(t) for s, t in (*pairs, ends)]
        moves = [self._moves(s, s_next) - self._moves(t, t_next) for (s, t), (s_next, t_next) in pairwise(pairs)]
        total = self.vertex * self._vertices(student, teacher)
        total = total + self.edge * torch.stack([e.square().mean() for e in edges]).mean()
        if moves:
            total = total + self.transformation * torch.stack([m.square().mean() for m in moves]).mean()
        return total

    def _vertices(self, student: Outputs, teacher: Outputs) -> Tensor:
        if self.vertices == "logits":
            return F.mse_loss(student.logits, teacher.logits)
        mine, theirs = embedding(student), embedding(teacher)
        if self.projector is not None:
            mine = self.projector(mine[:, :, None, None]).flatten(1)
        if mine.shape != theirs.shape:
            raise ValueError(
                f"vertices='features' needs equal channels, got student {tuple(mine.shape)} and teacher "
                f"{tuple(theirs.shape)}. Prepare the loss with these outputs first."
            )
        return F.mse_loss(mine, theirs)

    def _edges(self, feature: Tensor) -> Tensor:
        return self._relative(squared_distances(rescale(feature.flatten(1), (0, 1))))

    def _moves(self, first: Tensor, second: Tensor) -> Tensor:
        first, second = same_positions(as_map(first), as_map(second))
        channels = min(first.shape[1], second.shape[1])
        first, second = (_pool_channels(x, channels).flatten(1) for x in (first, second))
        return self._relative(rescale(first - second, (0, 1)).square().sum(1))

    def _relative(self, distances: Tensor) -> Tensor:
        largest = distances.amax() if self.through_max else distances.detach().amax()
        return distances / torch.where(largest > 0, largest, 1.0)


def _pool_channels(x: Tensor, channels: int) -> Tensor:
    if x.shape[1] == channels:
        return x
    last = x.flatten(2).transpose(1, 2)
    return F.adaptive_avg_pool1d(last, channels).transpose(1, 2).unflatten(2, x.shape[2:])
