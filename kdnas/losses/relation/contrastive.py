"""Contrastive representation distillation, with memories of all samples' embeddings (CRD)."""

from collections.abc import Mapping
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdnas.losses.base import Loss, connected_zero
from kdnas.losses.stage_pairs import Adapter
from kdnas.numerics import safe_normalize
from kdnas.outputs import Moment, Outputs, embedding

_MOST_SAMPLES = 2**28  # whose rows of 128 numbers take 128 GiB


@final
class Contrastive(Loss):
    r"""Noise-contrastive estimation of which teacher embedding belongs to the same sample as the student's (CRD).

    Heads map both embeddings (the deepest map averaged over positions) to unit vectors of $d$ numbers, $u_i$ of the
    student and $v_i$ of the teacher. $h(u, v) = \sigma(\langle u, v \rangle / T - \log Z - \log N)$ is the probability
    that a pair is of one sample rather than one of $N$ negatives, with $Z = e^{1 / (2 d T^2)}$, the mean of
    $e^{\langle u, v \rangle / T}$ over independent directions. With memories $\bar u$, $\bar v$ and negatives
    $j \in K$,

    $L = -\frac{1}{B} \sum_i [\log h(u_i, \bar v_i) + \sum_{j \in K} \log(1 - h(u_i, \bar v_j))
    + \log h(\bar u_i, v_i) + \sum_{j \in K} \log(1 - h(\bar u_j, v_i))]$.

    With `at.ids`, as in every training: a memory has one row per sample, which starts as the sample's first embedding
    and is moved after each call that builds a graph; $K$ are `num_negatives` samples that were seen before, or all of
    them if they are fewer, drawn anew per step, less the sample itself. Without ids: $\bar u = u$, $\bar v = v$, and
    $K$ are the batch's other samples; a batch of one gives 0. Repeated samples are negatives of each other (pairwise).

    Shapes: features of any sizes. Divisor: batch; the negatives are summed. The memories, `[samples, dims]` each, are
    buffers that grow with the largest id, and are part of a checkpoint.

    Learnable parts: the two heads, linear layers. Default weight 0.8: RepDistiller, the authors' code.

    Args:
        temperature: $T$, above 0; default 0.07.
        num_negatives: $N$, at least 1; default 16384.
        dims: length of the embeddings, at least 1; default 128.
        momentum: share of a memory's row that stays in an update, in [0, 1); default 0.5.
        seed: random seed of the negatives, which also depend on the training's progress; default 0.

    Raises:
        ValueError: an option out of range, or a loss that was not prepared.

    Reference: Tian, Krishnan, Isola, Contrastive Representation Distillation, ICLR 2020 (arXiv 1910.10699), equations
        17 to 19; HobbitLong/RepDistiller crd for $Z$, the memories and both directions.
    Differs: one set of negatives serves a batch, where the authors draw one per sample, a tensor of batch * 16384 *
        dims. A row of a memory starts as an embedding, not at random, and rows not seen yet are no negatives. $Z$ is
        what the authors measure in the first step, against random rows. The probability is formed in logarithms,
        without their 1e-7. Negatives of the own class are not left out. The heads have no
        bias.
    """

    needs: ClassVar[tuple[str, ...]] = ("features",)
    weight: ClassVar[float] = 0.8
    ranges: ClassVar[Mapping[str, str]] = {
        "temperature": "(0, inf)",
        "num_negatives": "[1, inf)",
        "dims": "[1, inf)",
        "momentum": "[0, 1)",
        "seed": "[0, inf)",
    }
    whole_batch: ClassVar[bool] = True
    golden: ClassVar[float] = 4.6183518228821665
    pairwise: ClassVar[bool] = True

    def __init__(
        self,
        *,
        temperature: float = 0.07,
        num_negatives: int = 16384,
        dims: int = 128,
        momentum: float = 0.5,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.temperature, self.num_negatives, self.dims = temperature, num_negatives, dims
        self.momentum, self.seed = momentum, seed
        self.heads = nn.ModuleList()
        self.students, self.teachers = _Memory(dims), _Memory(dims)

    def build(self, student: Outputs, teacher: Outputs, *, elastic: bool) -> None:
        """Build the heads."""
        self.heads = nn.ModuleList(Adapter(embedding(o).shape[1], self.dims) for o in (student, teacher))
        self.to(student.features[0].device)

    def compute(self, student: Outputs, teacher: Outputs, labels: Tensor, at: Moment) -> Tensor:
        """The two directions' estimates, averaged over the batch."""
        if not len(self.heads):
            raise ValueError(
                "Contrastive is not prepared. Call loss.prepare(student, teacher) before the optimiser is created."
            )
        u, v = (self._embed(o, head) for o, head in zip((student, teacher), self.heads, strict=True))
        if at.ids is None:
            if len(u) < 2:
                return connected_zero(u, v)
            others = ~torch.eye(len(u), dtype=torch.bool, device=u.device)
            return self._estimate(u, v, v, others) + self._estimate(v, u, u, others)
        ids = at.ids.to(u.device)
        self.students.admit(ids, u.detach())
        self.teachers.admit(ids, v.detach())
        negatives = self._negatives(at)
        others = negatives != ids[:, None]
        ours, theirs = self.students.rows.to(u), self.teachers.rows.to(u)
        value = self._estimate(u, theirs[ids], theirs[negatives], others)
        value = value + self._estimate(v, ours[ids], ours[negatives], others)
        if torch.is_grad_enabled():
            self.students.move(ids, u.detach(), self.momentum)
            self.teachers.move(ids, v.detach(), self.momentum)
        return value

    def _embed(self, outputs: Outputs, head: nn.Module) -> Tensor:
        return safe_normalize(head(embedding(outputs)[:, :, None, None]).flatten(1))

    def _estimate(self, anchors: Tensor, positives: Tensor, negatives: Tensor, others: Tensor) -> Tensor:
        """The estimate of one direction; `others` `[batch, negatives]` leaves out a sample's own row."""
        count = others.sum(1).clamp_min(1).to(anchors.dtype)
        shift = count.log() + 1 / (2 * self.dims * self.temperature**2)
        right = F.logsigmoid((anchors * positives).sum(1) / self.temperature - shift)
        wrong = F.logsigmoid(shift[:, None] - anchors @ negatives.T / self.temperature)
        return -(right + torch.where(others, wrong, 0.0).sum(1)).mean()

    def _negatives(self, at: Moment) -> Tensor:
        candidates = self.students.is_known.nonzero().flatten()
        if len(candidates) <= self.num_negatives:
            return candidates
        # The generator reads the low 32 bits of its seed.
        generator = torch.Generator().manual_seed(self.seed + round(at.progress * 2**31))
        chosen = torch.randint(len(candidates), (self.num_negatives,), generator=generator)
        return candidates[chosen.to(candidates.device)]


class _Memory(nn.Module):
    """One row per sample, by its index; rows are as long as `dims`."""

    rows: Tensor
    is_known: Tensor

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(0, dims))
        self.register_buffer("is_known", torch.zeros(0, dtype=torch.bool))

    def admit(self, ids: Tensor, rows: Tensor) -> None:
        """Give samples that are new their first rows."""
        last = int(ids.max())
        if last >= _MOST_SAMPLES:
            raise ValueError(
                f"`ids` must be the samples' indices from 0 on, below {_MOST_SAMPLES:,}: each has a row in memory, "
                f"got {last}. Number the samples."
            )
        missing = last + 1 - len(self.is_known)
        if missing > 0:
            self.rows = torch.cat([self.rows, self.rows.new_zeros(missing, self.rows.shape[1])])
            self.is_known = torch.cat([self.is_known, self.is_known.new_zeros(missing)])
        new = ~self.is_known[ids]
        self.rows[ids[new]] = rows[new].to(self.rows)
        self.is_known[ids] = True

    def move(self, ids: Tensor, rows: Tensor, momentum: float) -> None:
        """Move the samples' rows towards new ones, and normalise them."""
        self.rows[ids] = safe_normalize(momentum * self.rows[ids] + (1 - momentum) * rows.to(self.rows))

    def _load_from_state_dict(  # pyrefly: ignore[bad-override]
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        stored = state_dict.get(f"{prefix}is_known")
        if stored is not None:  # a memory has as many rows as samples were seen
            self.rows = self.rows.new_zeros(len(stored), self.rows.shape[1])
            self.is_known = self.is_known.new_zeros(len(stored))
        super()._load_from_state_dict(state_dict, prefix, *arguments)
