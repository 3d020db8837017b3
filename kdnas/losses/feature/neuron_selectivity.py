"""Neuron selectivity transfer (NST)."""

from collections.abc import Mapping
from typing import ClassVar, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor

from kdnas.losses.base import FeatureLoss
from kdnas.losses.stage_pairs import Alignment, Pairs
from kdnas.numerics import safe_normalize, squared_distances

Kernel = Literal["linear", "polynomial", "gaussian"]

# The least squared bandwidth: between patterns of unit length that are all but equal, the mean squared
# distance would go to 0 and the kernel's slope, 1 / bandwidth, to infinity.
LEAST_SQUARED_BANDWIDTH = 1e-4


@final
class NeuronSelectivity(FeatureLoss):
    r"""Squared maximum mean discrepancy between the channels' activation patterns (NST).

    A sample's channel $i$ is its map as a vector over the positions, of length 1: $s_i$, $t_j$. Summed over the pairs,
    $L = \frac1B \sum_b [\mathrm{mean}_{ij} k(s_i, s_j) + \mathrm{mean}_{ij} k(t_i, t_j) - 2\,\mathrm{mean}_{ij} k(s_i,
    t_j)]$ with

    - `linear`: $k = \langle x, y \rangle$, so $L = |\bar s - \bar t|^2$;
    - `polynomial`: $k = (\langle x, y \rangle + c)^d$;
    - `gaussian`: $k = \exp(-|x - y|^2 / 2 \sigma^2)$; by default $\sigma^2$ is the sample's mean $|s_i - t_j|^2$, at
      least 1e-4 and without gradient.

    Shapes: maps of any channels, pooled to the smaller height and width. Divisor: batch, and the pairs of channels.
    A dead channel is the zero vector. Memory: batch * (student + teacher channels)^2 numbers, by matrix products,
    or batch * positions^2 for the default kernel on maps of fewer positions than channels, where the discrepancy is the
    squared difference $|S^\top S / C_s - T^\top T / C_t|_F^2$ of the positions' Gram matrices. The tensor batch *
    student * teacher channels * positions of common code is not built. Not negative, except by rounding.

    Default weight 50, for `polynomial`: the authors' code (the paper halves it), RepDistiller, mdistiller.

    Args:
        taps: how stages are paired: `resolution` (default), `rdm`, `order` or explicit pairs, as in `StagePairs`.
        weights: one weight per pair; default None: 1 each.
        kernel: `linear`, `polynomial` or `gaussian`; default `polynomial`.
        degree: $d$, a whole number, at least 1; default 2.
        offset: $c$, at least 0; default 0.
        bandwidth: $\sigma$, above 0; default None: the mean distance.

    Raises:
        ValueError: an unknown kernel, a degree below 1, a negative offset, a bandwidth that is not positive.

    Reference: Huang, Wang, Like What You Like: Knowledge Distill via Neuron Selectivity Transfer, arXiv 1707.01219,
        equations 3 to 6.
    Differs: keeps the teacher's term, which the authors' code drops because it is constant: the value is the
        discrepancy and reaches 0. The mean distance is that between student and teacher, sample by sample.
    """

    weight: ClassVar[float] = 50.0
    ranges: ClassVar[Mapping[str, str]] = {"degree": "[1, inf)", "offset": "[0, inf)", "bandwidth": "(0, inf)"}
    golden: ClassVar[float] = 0.7766275972896686
    alignment: ClassVar[Alignment] = "positions"

    def __init__(
        self,
        *,
        taps: str | Pairs = "resolution",
        weights: tuple[float, ...] | None = None,
        kernel: Kernel = "polynomial",
        degree: int = 2,
        offset: float = 0.0,
        bandwidth: float | None = None,
    ) -> None:
        super().__init__(taps=taps, weights=weights)
        self.kernel, self.degree, self.offset, self.bandwidth = kernel, int(degree), offset, bandwidth

    def between(self, student: Tensor, teacher: Tensor, pair: int) -> Tensor:
        """The discrepancy of one pair, averaged over the batch."""
        s, t = safe_normalize(student.flatten(2)), safe_normalize(teacher.flatten(2))
        if self.kernel == "linear":
            return (s.mean(1) - t.mean(1)).square().sum(1).mean()
        if self.kernel == "polynomial":
            if self.degree == 2 and self.offset == 0 and s.shape[2] <= max(s.shape[1], t.shape[1]):
                # mean_ij <x_i, y_j>^2 is the product of the positions' Gram matrices: exact, and never below 0.
                return _by_positions(s, t)

            def mean_kernel(x: Tensor, y: Tensor) -> Tensor:
                return (x @ y.transpose(1, 2) + self.offset).pow(self.degree).mean((1, 2))

        else:
            if self.bandwidth is None:
                squared = squared_distances(s.detach(), t).mean((1, 2)).clamp_min(LEAST_SQUARED_BANDWIDTH)
            else:
                squared = torch.full_like(s[:, 0, 0], self.bandwidth**2)

            def mean_kernel(x: Tensor, y: Tensor) -> Tensor:
                return (squared_distances(x, y) / (-2 * squared[:, None, None])).exp().mean((1, 2))

        return (mean_kernel(s, s) + mean_kernel(t, t) - 2 * mean_kernel(s, t)).mean()


def _by_positions(student: Tensor, teacher: Tensor) -> Tensor:
    """The squared difference of the positions' Gram matrices, each over its channels' number, a mean over the batch."""
    batch, channels = student.shape[:2]
    target = (teacher.transpose(1, 2) @ teacher).mul_(channels / teacher.shape[1])
    # The gradient to the first factor equals that to the second: one product and twice its gradient.
    gram = student.detach().transpose(1, 2) @ student
    value = F.mse_loss(gram, target, reduction="sum") / (batch * channels**2)
    return 2 * value - value.detach()
