"""Knowledge review: each student stage, fused with the deeper ones, imitates a teacher stage (ReviewKD)."""

from collections.abc import Mapping
from typing import ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdnas.losses.base import FeatureLoss
from kdnas.losses.feature._connectors import BatchNorm, Projection, paired_maps, part
from kdnas.losses.stage_pairs import Pairs
from kdnas.numerics import as_map, same_positions
from kdnas.outputs import Moment, Outputs

# Sides of the pooled maps of the hierarchical distance, after the map itself.
LEVELS = (4, 2, 1)


@final
class KnowledgeReview(FeatureLoss):
    r"""Hierarchical squared distance of fused student stages to the teacher's stages (ReviewKD).

    From the deepest pair $n$ to the first, with $r_l$ a 1x1 convolution to $m$ channels and $\uparrow$ resizing to the
    map's size by the nearest neighbour, the fused map is $x_n = r_n(s_n)$ and
    $x_l = a_1 r_l(s_l) + a_2 \uparrow x_{l+1}$, where $a = \sigma(A_l [r_l(s_l), \uparrow x_{l+1}])$ are two attention
    maps from a 1x1 convolution $A_l$. With $u_l = g_l(x_l)$, a 3x3 convolution to the teacher's channels, and $P_k$
    average pooling to $k \times k$,
    $L = \sum_l w_l \frac{1}{\sum_i 2^{-i}} [\mathrm{MSE}(u_l, t_l) + \sum_{i=1}^{3} 2^{-i}\,\mathrm{MSE}(P_{k_i} u_l,
    P_{k_i} t_l)]$ with $k = 4, 2, 1$. Sides not below the map's are left out, and $i$ counts the rest.

    Shapes: student `[batch, student channels, h, w]`, teacher `[batch, teacher channels, h', w']`; a pair is
    average-pooled to the smaller height and width; tokens are laid out as a map. Pairs are fused in the order of the
    student's stages. Divisor: every element of a map.

    Learnable parts: $r$, $A$, $g$, $r$ and $g$ with batch normalisation by the batch's own statistics.

    Default weight 1: mdistiller, and the authors' for ResNet-18 on ImageNet (8 for MobileNet; 0.6 to 8 on CIFAR-100).

    Args:
        width: $m$, the channels of the fused maps, at least 1; default 256; the authors take the student's deepest
            channels, at most 512.
        taps: how stages are paired: `resolution` (default), `rdm`, `order` or explicit pairs, as in `StagePairs`.
        weights: one weight per pair; default None: 1 each.

    Raises:
        ValueError: a width below 1; a loss that was not prepared; a pair that cannot be matched.

    Reference: Chen, Liu, Zhao, Jia, Distilling Knowledge via Knowledge Review, CVPR 2021 (arXiv 2104.09044), section 3;
        the weights of the levels from dvlab-research/ReviewKD.
    Differs: the pooled embedding is not a further stage, and the weight has no warm-up, the authors' first 20 epochs.
        Maps need not be square.
    """

    ranges: ClassVar[Mapping[str, str]] = {"width": "[1, inf)"}
    whole_batch: ClassVar[bool] = True
    golden: ClassVar[float] = 1.0577175116502655

    def __init__(
        self, *, width: int = 256, taps: str | Pairs = "resolution", weights: tuple[float, ...] | None = None
    ) -> None:
        super().__init__(taps=taps, weights=weights)
        self.width = width
        self.entries, self.attentions, self.exits = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()

    def build(self, student: Outputs, teacher: Outputs, *, elastic: bool) -> None:
        """Build an entry, an attention and an exit for each pair."""
        super().build(student, teacher, elastic=elastic)
        self.entries, self.attentions, self.exits = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for s, t in paired_maps(self.taps, student, teacher):
            self.entries.append(Projection(s.shape[1], self.width))
            self.attentions.append(nn.Conv2d(2 * self.width, 2, 1))
            convolution = nn.Conv2d(self.width, t.shape[1], 3, padding=1, bias=False)
            self.exits.append(nn.Sequential(convolution, BatchNorm(t.shape[1])))
        self.to(student.logits.device)

    def compute(self, student: Outputs, teacher: Outputs, labels: Tensor, at: Moment) -> Tensor:
        """The weighted sum over the pairs."""
        pairs = self.taps(student, teacher)
        weights = self._weights(len(pairs))
        stages = [index for index, _ in self.taps.pairs] or list(range(len(pairs)))
        values, deeper = [], None
        for index in sorted(range(len(pairs)), key=lambda i: stages[i], reverse=True):
            own, target = (as_map(x) for x in pairs[index])
            deeper = self._fused(part(self.entries, index)(own), deeper, index)
            values.append(weights[index] * self.between(self.exits[index](deeper), target, index))
        return torch.stack(values).sum()

    def between(self, student: Tensor, teacher: Tensor, pair: int) -> Tensor:
        """The hierarchical distance of a fused map, in the teacher's channels, from the teacher's."""
        u, t = same_positions(student, teacher)
        value, weight, total = (u - t).square().mean(), 1.0, 1.0
        for side in LEVELS:
            if side < min(u.shape[2:]):
                weight /= 2
                gap = F.adaptive_avg_pool2d(u, side) - F.adaptive_avg_pool2d(t, side)
                value, total = value + weight * gap.square().mean(), total + weight
        return value / total

    def _fused(self, own: Tensor, deeper: Tensor | None, index: int) -> Tensor:
        if deeper is None:
            return own
        deeper = F.interpolate(deeper, own.shape[2:])
        shares = self.attentions[index](torch.cat([own, deeper], 1)).sigmoid()
        return own * shares[:, :1] + deeper * shares[:, 1:]
