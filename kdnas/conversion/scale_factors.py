"""Scale factors on a network's channels and blocks, trained under the teacher with a penalty."""

import math
from collections.abc import Iterator
from typing import ClassVar, final

import torch
from torch import Tensor, nn
from torch.func import functional_call

from kdnas.conversion.removal import Masks, Removal, ResidualBlock, Unit, units
from kdnas.costs.budget import Budget
from kdnas.costs.count import cost
from kdnas.distillers.base import Batch, Distiller, Model, Step
from kdnas.losses.regulariser.scale_factors import ScaleFactors
from kdnas.losses.response.soft_targets import SoftTargets
from kdnas.network import Network
from kdnas.outputs import Outputs
from kdnas.spaces.converted import Converted

_GROWTH = (1e-3, 10.0, 0.8)  # of the penalty: from, to, within this share of the steps
_LOOKS = 200  # at the cost of what is left


@final
class Factors(Distiller):
    r"""Trains a network and one factor per channel and block under a teacher, most factors towards 0.

    $\mathrm{KL}(p_t \| p_s)\,T^2 + \lambda \sum_j \alpha_j |g_j|$: the first term by the training loop, the second by a
    proximal step after each of its steps, $g \leftarrow \mathrm{sign}(g) \max(|g| - \eta \lambda \alpha_j, 0)$:
    factors become 0 and never change their sign by it. $\eta$ falls with a cosine from 1 to 0. $\alpha_j$ is what the
    channel or block costs in multiply-accumulates, divided by the mean over all groups and blocks, or 1.

    A channel's factor multiplies what the layers after it take from it (their weights' columns), a block's the last
    normalisation or convolution before the sum with its input. Both fold into weights without remainder, whatever
    stands between. A residual stream's channels have one factor each, which every layer that takes them shares
    (`kdnas.conversion.channels`). Factors are learnable parts of this distiller and begin at 1.

    Without a penalty $\lambda$ grows exponentially, from 0.001 to 10 in 80 % of the steps and with $\eta = 1$, until
    what is not 0 meets the budget: what the teacher's divergence holds up least for its cost goes first. The cost is
    looked at 200 times. Of what became 0 since the look before, as much comes back as the budget allows, what was
    farthest from 0 for its cost first. Then zeros stay, and the rest is trained without penalty.

    Args:
        space: of the network, as `kdnas.conversion.trace.convert` makes it; the network is its largest.
        penalty: lambda, or None to let it grow.
        budget: what it grows for.
        by_cost: whether costs weigh the penalty.
        blocks: whether whole blocks may go too.
        temperature: T.

    Raises:
        ValueError: nothing in the space has a factor, a negative penalty, or neither penalty nor budget.

    Reference: Gu, Tresp, Search for Better Students to Learn Distilled Knowledge, ECAI 2020 (arXiv 2001.11612), the
        objective of section 3.
    Differs: the paper prints KL(student, teacher) in the formula and both networks without order in the text; this is
        the usual direction. What alpha is, is not published. The paper's lambda is fixed; letting it grow is ours.
    """

    model_type: ClassVar[type[Network]] = Network

    def __init__(
        self,
        space: Converted,
        *,
        penalty: float | None = None,
        budget: Budget = Budget(),
        by_cost: bool = True,
        blocks: bool = True,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.units = tuple(unit for unit in units(space) if blocks or not isinstance(unit, ResidualBlock))
        self.removal = Removal(space, self.units)
        if not self.units:
            raise ValueError("no channel and no block of this network can be removed. `kdnas convert` reports why.")
        if penalty is None and not budget.bounds():
            raise ValueError("scale factors need a penalty, or a budget for which it grows; got neither.")
        self.penalty, self.budget = penalty, budget
        savings = self.removal.savings()
        shares = tuple(max(savings[u.key].macs, 1) for u in self.units) if by_cost else None
        self.regulariser = ScaleFactors(strength=1.0 if penalty is None else penalty, costs=shares)
        self.divergence = SoftTargets(temperature=temperature)
        self.factors = nn.ParameterDict({unit.key: nn.Parameter(torch.ones(unit.size)) for unit in self.units})
        # Which factors were not 0 when the budget was met, nothing before; and all at the last look before.
        self.register_buffer("met", torch.tensor(False))
        self.alive, self.before = (
            nn.ParameterDict({u.key: nn.Parameter(torch.ones(u.size), requires_grad=False) for u in self.units})
            for _ in range(2)
        )

    def outputs(self, model: Network, images: Tensor) -> Outputs:
        """The network's outputs with its factors in place."""
        return functional_call(model, self.folded(model), (images,))

    def folded(self, model: Network) -> dict[str, Tensor]:
        """The weights that the factors change, multiplied by them."""
        parameters = dict(model.named_parameters())
        changed: dict[str, Tensor] = {}
        for unit in self.units:
            factor = self.factors[unit.key]
            for name, dim in _scaled(unit):
                if name in parameters:
                    shape = [-1 if d == dim else 1 for d in range(parameters[name].dim())]
                    changed[name] = changed.get(name, parameters[name]) * factor.reshape(shape)
        return changed

    def nonzero(self) -> Masks:
        """Which factors are not 0; of each group of channels the largest in any case. On the CPU."""
        return self.removal.nonzero(_on_cpu(self.factors))

    def within(self, budget: Budget) -> Masks:
        """Which factors stay within a budget: the largest by absolute value, and none that is 0; see `Removal.within`.

        Raises:
            ValueError: the budget is below the cost of what is left when everything removable is gone.
        """
        values = {key: value.abs() for key, value in _on_cpu(self.factors).items()}
        return self.removal.within(budget, values, self.nonzero())

    def removed(self, model: Network, masks: Masks) -> Network:
        """The smaller network, factors folded in; where all that is removed has factor 0, its outputs are the same."""
        state = {**model.state_dict(), **{name: tensor.detach() for name, tensor in self.folded(model).items()}}
        return self.removal.network(state, masks).train(model.training)

    def losses(self, model: Model, batch: Batch, step: Step) -> Iterator[tuple[str, Tensor]]:
        """The divergence from the teacher."""
        del step
        assert isinstance(model, Network)
        yield "teacher", self.divergence(self.outputs(model, batch.images), batch.teacher, batch.labels)

    def after(self, model: Model, batch: Batch, step: Step) -> None:
        """The proximal step."""
        del model, batch
        if self.penalty is not None:
            self.regulariser.proximal(self._values(), (1 + math.cos(math.pi * step.progress)) / 2)
        elif bool(self.met):
            for unit in self.units:  # the gradient moves factors that are 0: back to 0
                self.factors[unit.key].data.mul_(self.alive[unit.key])
        else:
            self._grow(step)

    def _values(self) -> list[nn.Parameter]:
        return [self.factors[unit.key] for unit in self.units]

    def _grow(self, step: Step) -> None:
        first, last, within = _GROWTH
        strength = first * (last / first) ** min(1.0, step.progress / within)
        self.regulariser.proximal(self._values(), strength)
        if step.index % max(1, step.total // _LOOKS):
            return
        if self.budget.excess(cost(self.removal.remaining(self.nonzero()))) > 0:
            for key, value in self.factors.items():
                self.before[key].copy_(value.detach())
            return
        # Between two looks too much may have become 0: it comes back, and goes again one by one.
        values, before = _on_cpu(self.factors), _on_cpu(self.before)
        costs = self.regulariser.costs or (1.0,) * len(self.units)
        gone = {key: (value == 0) & (before[key] != 0) for key, value in values.items()}
        near = {u.key: before[u.key].abs().double() / share for u, share in zip(self.units, costs, strict=True)}
        most = max(float(distance.max()) for distance in near.values())
        for key, value in values.items():
            self.factors[key].data.copy_(torch.where(gone[key], before[key], value))
        order = {key: torch.where(gone[key], near[key], most + 1 + value.abs()) for key, value in values.items()}
        for key, mask in self.removal.within(self.budget, order, self.nonzero()).items():
            self.alive[key].copy_(mask)
            self.factors[key].data.mul_(self.alive[key])
        self.met.fill_(True)


def _scaled(unit: Unit) -> Iterator[tuple[str, int]]:
    """Names of the tensors that a unit's factors multiply, and along which dimension."""
    if isinstance(unit, ResidualBlock):
        yield f"{unit.position}.parts.{unit.end}.weight", 0
        yield f"{unit.position}.parts.{unit.end}.bias", 0
    else:
        for position, index in unit.readers:
            yield f"{position}.parts.{index}.weight", 1


def _on_cpu(factors: nn.ParameterDict) -> dict[str, Tensor]:
    """Factors by their unit's key, on the CPU, where reading single ones costs nothing."""
    return {key: value.detach().clone().cpu() for key, value in factors.items()}
