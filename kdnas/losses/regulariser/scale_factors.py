"""Sparse channel scale factors, by a penalty or by a proximal step."""

from collections.abc import Mapping, Sequence
from typing import ClassVar, final

import torch
from torch import Tensor

from kdnas.losses._options import check_options


@final
class ScaleFactors:
    r"""L1 regulariser that drives the scale factors of unneeded channels to exactly 0.

    `penalty`: $\lambda \sum_j \alpha_j |g_j|_1$ over the layers $j$, to add to the losses. `proximal`: after an
    optimiser step of size $s$, $g \leftarrow \mathrm{sign}(g) \max(|g| - s \lambda \alpha_j, 0)$. Use one of
    them: the subgradient of the penalty at 0 is 0, so its factors oscillate around 0; the proximal step sets them to
    0 and leaves them there while the task's gradient is below $\lambda \alpha_j$.

    Not a `Loss`: it reads no outputs but the gates $g_j$ `[channels of layer j]`: a factor after each normalisation, or
    the normalisation's own weight where no other normalisation follows. Divisor: none.

    Schedule: train with it, keep the channels with the largest $|g|$ within the budget, then train the narrower
    student with the teacher.

    Args:
        strength: $\lambda$, at least 0, usually 1e-5 to 1e-4 (network slimming); default 1e-4.
        costs: the cost of one channel of each layer, for example in multiply-accumulates:
            $\alpha_j = \mathrm{cost}_j / \mathrm{mean\ cost}$. Default None: every $\alpha_j$ is 1.

    Raises:
        ValueError: a negative strength, a cost that is not positive, or costs for another number of layers.

    Reference: Gu, Tresp, Search for Better Students to Learn Distilled Knowledge, ECAI 2020 (arXiv 2001.11612),
        the L1 term of the objective.
    Differs: the other terms, KL to the teacher and weight decay, are `SoftTargets` and the optimiser's; the
        proximal step is added.
    """

    needs: ClassVar[tuple[str, ...]] = ("gates",)
    weight: ClassVar[float] = 1.0
    ranges: ClassVar[Mapping[str, str]] = {"strength": "[0, inf)", "costs": "(0, inf)"}
    golden: ClassVar[float] = 0.0004904531232984525

    def __init__(self, *, strength: float = 1e-4, costs: tuple[float, ...] | None = None) -> None:
        check_options(type(self), {"strength": strength, "costs": costs})
        self.strength, self.costs = strength, costs

    def penalty(self, gates: Sequence[Tensor]) -> Tensor:
        """The weighted sum of absolute values, a scalar."""
        if not gates:
            raise ValueError("`gates` must not be empty. Pass one tensor [channels] per layer.")
        terms = [share * gate.abs().sum() for share, gate in zip(self._shares(gates), gates, strict=True)]
        return self.strength * torch.stack(terms).sum()

    @torch.no_grad()
    def proximal(self, gates: Sequence[Tensor], step_size: float) -> None:
        """Move every gate in place towards 0 by its threshold, and not beyond 0.

        Args:
            gates: the gates, after the optimiser's step on the other losses.
            step_size: the learning rate of that step.
        """
        if not step_size >= 0:
            raise ValueError(f"`step_size` must be a learning rate of at least 0, got {step_size}.")
        for share, gate in zip(self._shares(gates), gates, strict=True):
            gate.copy_(gate.sign() * (gate.abs() - step_size * self.strength * share).clamp_min(0))

    def _shares(self, gates: Sequence[Tensor]) -> tuple[float, ...]:
        if self.costs is None:
            return (1.0,) * len(gates)
        if len(self.costs) != len(gates):
            raise ValueError(f"`costs` must have one number per layer: {len(gates)} layers, got {len(self.costs)}.")
        mean = sum(self.costs) / len(self.costs)
        return tuple(cost / mean for cost in self.costs)
