"""Similarities between the regions of one image."""

from collections.abc import Mapping
from typing import ClassVar, Literal, final

import torch.nn.functional as F
from torch import Tensor

from kdnas.losses.base import FeatureLoss
from kdnas.losses.stage_pairs import Alignment, Pairs
from kdnas.numerics import as_map, safe_normalize

Pool = Literal["max", "average"]


@final
class RegionSimilarity(FeatureLoss):
    r"""Mean squared difference between the cosine similarities of an image's regions (pair-wise distillation).

    A map is pooled to a grid of $n$ nodes, $a_{ij}$ is the cosine of nodes $i$ and $j$, and
    $L = \frac{1}{B n^2} \sum_b \sum_{i,j} (a^s_{ij} - a^t_{ij})^2$.

    Shapes: features of any channels and sizes; the grid is no finer than either map. Divisor: batch times the
    squared number of nodes. Memory: batch times $n^2$. A node of zeros has cosine 0, and gradient 0. With one
    node the value is 0, unless the node of one network is zero.

    Default weight 1: the authors' code (the paper shares 10 with the pixel-wise term).

    Args:
        grid: nodes per side, at least 1; default 2: the authors' pooling with half the map's size.
        pool: `max` or `average` over each node's patch; default `max`.
        taps: how stages are paired, as in `StagePairs`; default `classified`: the maps that the two classifiers read,
            after the layers of the heads; those of the last stages where the heads have none.
        weights: one weight per pair; default None: 1 each.

    Raises:
        ValueError: `grid` below 1, or an unknown `pool`.

    Reference: Liu, Chen, Liu, Qin, Luo, Wang, Structured Knowledge Distillation for Semantic Segmentation, CVPR
        2019 (arXiv 1903.04197), section 3, pair-wise distillation.
    Differs: the authors' code holds the norm in the denominator constant, which gives the same value and another
        gradient, and adds 1e-8 outside the root.
    """

    ranges: ClassVar[Mapping[str, str]] = {"grid": "[1, inf)"}
    golden: ClassVar[float] = 0.017558380726109026
    alignment: ClassVar[Alignment] = "nothing"

    def __init__(
        self,
        *,
        grid: int = 2,
        pool: Pool = "max",
        taps: str | Pairs = "classified",
        weights: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__(taps=taps, weights=weights)
        self.grid, self.pool = grid, pool

    def between(self, student: Tensor, teacher: Tensor, pair: int) -> Tensor:
        """The mean squared difference of the similarities."""
        student, teacher = as_map(student), as_map(teacher)
        height, width = (min(self.grid, *sides) for sides in zip(student.shape[2:], teacher.shape[2:], strict=True))
        return (
            (self._similarities(student, (height, width)) - self._similarities(teacher, (height, width)))
            .square()
            .mean()
        )

    def _similarities(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        pool = F.adaptive_max_pool2d if self.pool == "max" else F.adaptive_avg_pool2d
        nodes = safe_normalize(pool(x, size).flatten(2), 1)
        return nodes.transpose(1, 2) @ nodes
