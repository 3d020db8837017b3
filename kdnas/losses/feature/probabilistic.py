"""Probabilistic knowledge transfer (PKT)."""

from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from kdnas.losses.base import Loss, connected_zero
from kdnas.numerics import safe_normalize
from kdnas.outputs import Moment, Outputs, embedding

# The authors': keeps the logarithm finite where two embeddings are opposite.
EPSILON = 1e-7


@final
class Probabilistic(Loss):
    r"""KL divergence between the neighbour probabilities of the samples in a batch (PKT).

    With embeddings $e_i$ (the deepest map averaged over positions), $K_{ij} = (\cos(e_i, e_j) + 1) / 2$ and
    $P_{ij} = K_{ij} / \sum_j K_{ij}$,
    $L = \frac1N \sum_{ij} P^t_{ij} \log \frac{P^t_{ij} + \epsilon}{P^s_{ij} + \epsilon}$, $\epsilon = 10^{-7}$;
    `jeffreys` adds the same with student and teacher exchanged.

    Shapes: embeddings `[batch, any dims]`. Divisor $N$: `pairs`, batch squared, as all public code; the value then
    falls as 1 / batch (`pairwise`), and the published weight belongs to a batch of 64. `batch` divides by the batch
    and does not depend on it; the weight that corresponds is 30000 / 64 = 469. A dead sample has cosine 0 with all. A
    batch of one: 0.

    Default weight 30000, for `pairs` at a batch of 64: the authors' code, RepDistiller, mdistiller, torchdistill.

    Args:
        divergence: `kl` or `jeffreys`, the symmetric divergence of the journal version; default `kl`.
        diagonal: count a sample as its own neighbour, as the authors' code but not the paper; default True.
        reduction: the divisor, `pairs` or `batch`; default `pairs`.

    Raises:
        ValueError: an unknown option; a network without features.

    Reference: Passalis, Tefas, Learning Deep Representations with Probabilistic Knowledge Transfer, ECCV 2018,
        equations 3 to 7; passalis/probabilistic_kt nn/pkt.py.
    Differs: the defaults are the authors' code (with the diagonal, mean over pairs); the paper sums over $j \neq i$.
        Lengths are normalised without an epsilon: the code's is wrong by 7 % for features of 1e-6 and has gradient NaN
        at a zero row. The kernel is the cosine only.
    """

    needs: ClassVar[tuple[str, ...]] = ("features",)
    weight: ClassVar[float] = 30000.0
    whole_batch: ClassVar[bool] = True
    golden: ClassVar[float] = 0.032212969849424955
    pairwise: ClassVar[bool] = True

    def __init__(
        self,
        *,
        divergence: Literal["kl", "jeffreys"] = "kl",
        diagonal: bool = True,
        reduction: Literal["pairs", "batch"] = "pairs",
    ) -> None:
        super().__init__()
        self.divergence, self.diagonal, self.reduction = divergence, diagonal, reduction

    def compute(self, student: Outputs, teacher: Outputs, labels: Tensor, at: Moment) -> Tensor:
        """The divergence of the two probability matrices."""
        s, t = embedding(student), embedding(teacher)
        if len(s) == 1:
            return connected_zero(s)
        p, q = self._probabilities(s), self._probabilities(t)
        ratio = (q + EPSILON).log() - (p + EPSILON).log()
        divergence = (q * ratio).sum()
        if self.divergence == "jeffreys":
            divergence = divergence - (p * ratio).sum()
        return divergence / (len(s) ** 2 if self.reduction == "pairs" else len(s))

    def _probabilities(self, x: Tensor) -> Tensor:
        x = safe_normalize(x)
        # Rounding can put a cosine of -1 just below.
        near = ((x @ x.T + 1) / 2).clamp_min(0)
        if not self.diagonal:
            near = near * (1 - torch.eye(len(x), dtype=x.dtype, device=x.device))
        mass = near.sum(1, keepdim=True)
        # Without the diagonal a sample opposite to all others has no neighbours: its row is 0.
        return torch.where(mass > 0, near / torch.where(mass > 0, mass, 1.0), 0.0)
