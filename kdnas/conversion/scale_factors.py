"""Scale factors of channels and blocks, trained under a teacher with a penalty."""

import math
from collections.abc import Iterator, Sequence
from typing import ClassVar, final

import torch
from torch import Tensor, nn
from torch.func import functional_call

from kdnas.conversion.channels import ChannelGroup
from kdnas.conversion.removal import Masks, Removal, ResidualBlock, Unit, units
from kdnas.costs.budget import Budget
from kdnas.costs.count import cost
from kdnas.distillers.base import Batch, Distiller, Model, Parallel, Step
from kdnas.losses.regulariser.scale_factors import ScaleFactors
from kdnas.losses.response.soft_targets import SoftTargets
from kdnas.network import Network
from kdnas.outputs import Outputs
from kdnas.spaces.converted import Converted
from kdnas.values import Count, check_value

_GROWTH = (0.1, 1000.0, 0.8)  # of the penalty: start, end, share of the steps
_CHECKS = 200  # of the cost of the remaining network


@final
class Factors(Distiller):
    r"""Trains a network with a factor per channel and block under a teacher; a penalty drives factors to 0.

    $\mathrm{KL}(p_t \| p_s)\,T^2 + \lambda \sum_j \alpha_j |g_j|$: the first term by the optimizer step, the second by
    a proximal step after each, $g \leftarrow \mathrm{sign}(g) \max(|g| - \eta \lambda \alpha_j, 0)$ with $\eta$ the
    step's learning rate: factors become exactly 0 and do not change their sign by it. $\alpha_j$ is the cost of the
    channel in multiply-accumulates, divided by the mean over all groups and blocks, and of a block at most that of the
    costliest channel; or 1.

    The batch norm behind a reader undoes a common scale of a group's factors, so that no gradient holds it: the penalty
    would shrink whole groups. So after each step every group's factors are divided by their root mean square, zeros
    included, and those of all blocks by that of all of them: what a group has lost makes its other factors larger, and
    the penalty compares channels with their own group. A lone block stays.

    A channel's factor multiplies the weights (columns) with which later layers read it, a block's factor the last
    normalisation or convolution before the sum with its input. Both fold into the weights exactly. A residual stream's
    channels have one factor each, shared by all layers that read them (`kdnas.conversion.channels`). Factors are
    parameters of this distiller and start at 1.

    Without a fixed penalty, $\lambda$ grows exponentially, from 0.1 to 1000 in 80 % of the steps,
    until the cost of the nonzero part meets the budget: factors whose removal raises the divergence least for their
    cost go first. The cost is checked 200 times. Of the factors that became 0 since the last check, as many are
    restored as the budget allows, those farthest from 0 for their cost first. After that, zeros are fixed and the rest
    is trained without penalty.

    In $R$ rounds of equally many steps the penalty begins anew in each; round $r$ removes until each bounded cost $C$
    is at most $C\,(B / C)^{r / R}$, with $B$ the bound, and trains what is left without penalty until its end.

    Args:
        space: of the converted network (`kdnas.conversion.convert.convert`), which is its largest subnet.
        penalty: lambda; None grows it until the budget is met.
        budget: for a growing penalty.
        by_cost: whether the penalty is weighted by cost; at an eighth of a MobileNetV2's MACs 35.9 % with it, 56.0 %
            without, on the search part after 70 steps (see Differs), and 44.8 and 55.3 % of a ResNet's as published,
            after 700 steps.
        blocks: whether whole blocks have factors too.
        normalised: whether the root mean square of a group's factors stays 1. False: the penalty shrinks them, as
            published; the largest of each group moves into the weights that read its channels, which changes no output
            and keeps the group from vanishing (ours), but leaves weights so small that a later training destroys them.
        temperature: T.
        rounds: of a growing penalty.

    Raises:
        ValueError: nothing can be removed, a negative penalty, neither penalty nor budget, or rounds of a fixed
            penalty.

    Reference: Gu, Tresp, Search for Better Students to Learn Distilled Knowledge, ECAI 2020 (arXiv 2001.11612), the
        objective of section 3.
    Differs: the paper has KL(student, teacher) in the formula and no order in the text; this is the usual direction.
        The paper does not define alpha. Its lambda is fixed; the growing lambda is our addition. Groups are normalised,
        unless `normalised` is False: at half of a ResNet's MACs 0.383 without and 0.656 with it on the search part
        after 70 steps of retraining (CIFAR-10 at 16x16, one seed).
    """

    model_type: ClassVar[type[Network]] = Network
    parallel: ClassVar[Parallel] = "any"

    def __init__(
        self,
        space: Converted,
        *,
        penalty: float | None = None,
        budget: Budget = Budget(),
        by_cost: bool = False,
        blocks: bool = True,
        normalised: bool = True,
        temperature: float = 1.0,
        rounds: int = 1,
    ) -> None:
        super().__init__()
        check_value("rounds", rounds, Count)
        if penalty is not None and rounds > 1:
            raise ValueError(f"`rounds` belong to a penalty that grows, got {rounds} of the penalty {penalty:g}.")
        single = [
            unit
            for unit in units(space)
            if isinstance(unit, ResidualBlock) or (unit.multiple == 1 and not unit.concatenated)
        ]
        self.units = tuple(unit for unit in single if blocks or not isinstance(unit, ResidualBlock))
        self.removal = Removal(space, self.units)
        if not self.units:
            raise ValueError("no channel and no block of this network can be removed. `kdnas convert` reports why.")
        if penalty is None and not budget.bounds():
            raise ValueError("scale factors need a penalty, or a budget for which it grows; got neither.")
        self.penalty, self.budget, self.rounds, self.normalised = penalty, budget, rounds, normalised
        savings = self.removal.savings()
        costs = {unit.key: max(savings[unit.key].macs, 1) for unit in self.units}
        most = max((costs[u.key] for u in self.units if isinstance(u, ChannelGroup)), default=math.inf)
        shares = tuple(min(costs[unit.key], most) for unit in self.units) if by_cost else None
        self.regulariser = ScaleFactors(strength=1.0 if penalty is None else penalty, costs=shares)
        self.divergence = SoftTargets(temperature=temperature)
        self.factors = nn.ParameterDict({unit.key: nn.Parameter(torch.ones(unit.size)) for unit in self.units})
        # Rounds whose budget was met; nonzero factors when the last was, and the factors at the last check before.
        self.register_buffer("met", torch.tensor(0))
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
            ValueError: the budget is below the cost of the smallest network that can be left.
        """
        values = {key: value.abs() for key, value in _on_cpu(self.factors).items()}
        return self.removal.within(budget, values, self.nonzero())

    def importance(self, network: Network, groups: Sequence[ChannelGroup]) -> list[Tensor]:
        """The factors' absolute values, for `sort_by_importance`; 1 for groups that have none."""
        del network
        values = _on_cpu(self.factors)
        return [values[g.key].abs() if g.key in values else torch.ones(g.size) for g in groups]

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
        """The proximal step, and what it leaves of the factors to their norm."""
        del batch
        if self.penalty is not None:
            self.regulariser.proximal(self._values(), step.rate)
        else:
            for unit in self.units:  # the gradient moves factors that are 0: back to 0
                self.factors[unit.key].data.mul_(self.alive[unit.key])
            if int(self.met) <= self._round(step):
                self._grow(step)
        if self.normalised:
            self._normalise()
        else:
            self._fold_largest(dict(model.named_parameters()))

    @torch.no_grad()
    def _normalise(self) -> None:
        blocks = [unit.key for unit in self.units if isinstance(unit, ResidualBlock)]
        for keys in (blocks, *([unit.key] for unit in self.units if isinstance(unit, ChannelGroup))):
            size = torch.cat([self.factors[key] for key in keys]).square().mean().sqrt() if keys else 0
            if size > 0:
                for key in keys:
                    self.factors[key].div_(size)
                    self.before[key].div_(size)

    @torch.no_grad()
    def _fold_largest(self, parameters: dict[str, nn.Parameter]) -> None:
        for unit in self.units:
            factor = self.factors[unit.key]
            largest = factor.abs().max()
            if isinstance(unit, ChannelGroup) and largest > 0:
                factor.div_(largest)
                self.before[unit.key].div_(largest)
                for name, _ in _scaled(unit):
                    parameters[name].mul_(largest)

    def _values(self) -> list[nn.Parameter]:
        return [self.factors[unit.key] for unit in self.units]

    def _round(self, step: Step) -> int:
        """From 0."""
        return min(self.rounds - 1, int(step.progress * self.rounds))

    def _budget(self, done: int) -> Budget:
        """What may be left after so many rounds."""
        if done == self.rounds:
            return self.budget
        costs = cost(self.removal.space.blueprint(self.removal.space.largest))._asdict()
        share = done / self.rounds
        return Budget(
            **{name: costs[name] ** (1 - share) * bound**share for name, bound in self.budget.bounds().items()}
        )

    def _grow(self, step: Step) -> None:
        first, last, within = _GROWTH
        done = self._round(step)
        strength = first * (last / first) ** min(1.0, (step.progress * self.rounds - done) / within)
        self.regulariser.proximal(self._values(), step.rate * strength)
        if step.index % max(1, step.total // _CHECKS):
            return
        budget = self._budget(done + 1)
        if budget.excess(cost(self.removal.remaining(self.nonzero()))) > 0:
            for key, value in self.factors.items():
                self.before[key].copy_(value.detach())
            return
        # Too many factors may have become 0 since the last check: restore them, then remove one by one.
        values, before = _on_cpu(self.factors), _on_cpu(self.before)
        costs = self.regulariser.costs or (1.0,) * len(self.units)
        gone = {key: (value == 0) & (before[key] != 0) for key, value in values.items()}
        near = {u.key: before[u.key].abs().double() / share for u, share in zip(self.units, costs, strict=True)}
        most = max(float(distance.max()) for distance in near.values())
        for key, value in values.items():
            self.factors[key].data.copy_(torch.where(gone[key], before[key], value))
        order = {key: torch.where(gone[key], near[key], most + 1 + value.abs()) for key, value in values.items()}
        for key, mask in self.removal.within(budget, order, self.nonzero()).items():
            self.alive[key].copy_(mask)
            self.factors[key].data.mul_(self.alive[key])
        self.met.fill_(done + 1)


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
