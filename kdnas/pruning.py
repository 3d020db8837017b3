"""Scale factors on a network's channels and blocks, and the smaller network that is left when some are zero."""

import math
from collections.abc import Iterator, Mapping
from typing import final

import torch
from torch import Tensor, nn
from torch.func import functional_call

from kdnas.cost import Budget, Cost, cost
from kdnas.losses.regulariser.scale_factors import ScaleFactors
from kdnas.losses.response.soft_targets import SoftTargets
from kdnas.network import Network
from kdnas.outputs import Outputs
from kdnas.removable import Unit, blueprint_of, branch_end, operations, saved, units
from kdnas.space import Blueprint
from kdnas.spaces.converted import Converted
from kdnas.training import Batch, Distiller, Model, Step

WITHIN = 0.02
_GROWTH = (1e-3, 10.0, 0.8)  # of the penalty: from, to, within this share of the steps
_LOOKS = 200  # at the cost of what is left


@final
class Factors(Distiller):
    r"""Trains a network and one factor per channel and block under a teacher, most factors towards 0.

    $\mathrm{KL}(p_t \| p_s)\,T^2 + \lambda \sum_j \alpha_j |g_j|$: the first term by the training loop, the second by a
    proximal step after each of its steps, $g \leftarrow \mathrm{sign}(g) \max(|g| - \eta \lambda \alpha_j, 0)$ with the
    learning rate $\eta$: factors become 0 and never change their sign by it. $\alpha_j$ is what the channel or block
    costs in multiply-accumulates, divided by the mean over all factors, or 1.

    A channel's factor multiplies what the layers after it take from it (their weights' columns), a block's the last
    normalisation or convolution before the sum with its input. Both fold into weights without remainder, whatever
    stands between. A residual stream's channels have one factor each, which every layer that takes them shares
    (`kdnas.removable`). Factors are learnable parts of this distiller and begin at 1.

    Without a penalty $\lambda$ grows exponentially, from 0.001 to 10 in 80 % of the steps and with $\eta = 1$, until
    what is not 0 meets the budget: what the teacher's divergence holds up least for its cost goes first. The step that
    would meet the budget is shortened so that it just does not, and the smallest factors go (`chosen`). Then zeros
    stay, and the rest is trained without penalty.

    Args:
        space: of the network, as `kdnas.convert.convert` makes it; the network is its largest.
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
        self.space, self.units = space, tuple(unit for unit in units(space) if blocks or not unit.block)
        if not self.units:
            raise ValueError("no channel and no block of this network can be removed. See `kdnas convert` for why.")
        if penalty is None and not budget.bounds():
            raise ValueError("a penalty is given, or grows until a budget is met. Give one of the two.")
        self.penalty, self.budget = penalty, budget
        prices = saved(space, self.units)
        shares = tuple(max(prices[u.key].macs, 1) for u in self.units) if by_cost else None
        self.regulariser = ScaleFactors(strength=1.0 if penalty is None else penalty, costs=shares)
        self.divergence = SoftTargets(temperature=temperature)
        self.factors = nn.ParameterDict({unit.key: nn.Parameter(torch.ones(unit.size)) for unit in self.units})
        # Which factors were not 0 when the budget was met; nothing before.
        self.register_buffer("met", torch.tensor(False))
        self.alive = nn.ParameterDict(
            {unit.key: nn.Parameter(torch.ones(unit.size), requires_grad=False) for unit in self.units}
        )

    def shown(self, model: Network, images: Tensor) -> Outputs:
        """What the network shows with its factors in place."""
        return functional_call(model, self.folded(model), (images,))

    def folded(self, model: Network) -> dict[str, Tensor]:
        """The weights that the factors change, with the factors in them."""
        held = dict(model.named_parameters())
        changed: dict[str, Tensor] = {}
        for unit in self.units:
            factor = self.factors[unit.key]
            for name, column in self._touched(unit):
                if name in held:
                    shape = [1, -1, *[1] * (held[name].dim() - 2)] if column else [-1, *[1] * (held[name].dim() - 1)]
                    changed[name] = changed.get(name, held[name]) * factor.reshape(shape)
        return changed

    def _touched(self, unit: Unit) -> Iterator[tuple[str, bool]]:
        """Tensors that a unit's factors multiply, and whether along their columns."""
        for position, place in unit.takes:
            yield f"{position}.parts.{place}.weight", True
        if unit.block:
            end = branch_end(operations(self.space)[unit.block])
            yield f"{unit.block}.parts.{end}.weight", False
            yield f"{unit.block}.parts.{end}.bias", False

    def losses(self, model: Model, batch: Batch, step: Step) -> Iterator[tuple[str, Tensor]]:
        """The divergence from the teacher."""
        del step
        assert isinstance(model, Network)
        yield "teacher", self.divergence(self.shown(model, batch.images), batch.teacher, batch.labels)

    def after(self, model: Model, batch: Batch, step: Step) -> None:
        """The proximal step."""
        del model, batch
        if self.penalty is not None:
            # A cosine from 1 to 0, in units that the penalty sets.
            self.regulariser.proximal(self._values(), (1 + math.cos(math.pi * step.progress)) / 2)
        elif bool(self.met):
            for unit in self.units:  # a gradient moves what is 0, and it is put back
                self.factors[unit.key].data.mul_(self.alive[unit.key])
        else:
            self._grow(step)

    def _values(self) -> list[nn.Parameter]:
        return [self.factors[unit.key] for unit in self.units]

    def _grow(self, step: Step) -> None:
        first, last, within = _GROWTH
        strength = first * (last / first) ** min(1.0, step.progress / within)
        before = [value.detach().clone() for value in self._values()]
        self.regulariser.proximal(self._values(), strength)
        if step.index % max(1, step.total // _LOOKS) or self._excess() > 0:
            return
        low, high = 0.0, strength  # the budget is met at the upper end alone
        for _ in range(12):
            middle = (low + high) / 2
            self._restore(before)
            self.regulariser.proximal(self._values(), middle)
            low, high = (low, middle) if self._excess() <= 0 else (middle, high)
        self._restore(before)
        self.regulariser.proximal(self._values(), low)
        # Factors that are almost equal would go in one; the smallest of them go one by one.
        for key, mask in chosen(self, self.budget).items():
            self.alive[key].copy_(mask)
            self.factors[key].data.mul_(mask)
        self.met.fill_(True)

    def _restore(self, values: list[Tensor]) -> None:
        for value, kept in zip(self._values(), values, strict=True):
            value.data.copy_(kept)

    def _excess(self) -> float:
        return self.budget.excess(cost(narrowed(self, living(self))))


def living(factors: Factors) -> dict[str, Tensor]:
    """Which factors are not 0; of each group of channels the largest in any case."""
    kept = {u.key: factors.factors[u.key].detach() != 0 for u in factors.units}
    for unit in factors.units:
        if not unit.block and not bool(kept[unit.key].any()):
            kept[unit.key][factors.factors[unit.key].detach().abs().argmax()] = True
    return kept


def narrowed(factors: Factors, kept: Mapping[str, Tensor]) -> Blueprint:
    """The network of the factors that stay."""
    return blueprint_of(factors.space, factors.units, {key: int(mask.sum()) for key, mask in kept.items()})


def removed(model: Network, factors: Factors, kept: Mapping[str, Tensor]) -> Network:
    """The smaller network with the factors folded in; where all that is removed has factor 0, its outputs are equal."""
    blueprint = narrowed(factors, kept)
    state = {**model.state_dict(), **{name: t.detach() for name, t in factors.folded(model).items()}}
    gives = {place: kept[unit.key] for unit in factors.units for place in unit.writes}
    mixes = {place: kept[unit.key] for unit in factors.units for place in unit.takes}
    made: dict[str, Tensor] = {}
    for name, tensor in state.items():
        position, _, rest = name.partition(".parts.")
        place, _, kind = rest.partition(".")
        here = (position, int(place))
        if here in gives and tensor.dim():
            tensor = tensor[gives[here]]
        if here in mixes and kind == "weight":
            tensor = tensor[:, mixes[here]]
        made[name] = tensor.clone()
    with torch.device("meta"):
        network = Network(blueprint)
    wanted = network.state_dict()
    network.load_state_dict({name: made[name] for name in wanted}, assign=True)
    return network.requires_grad_(True).train(model.training)


def chosen(factors: Factors, budget: Budget) -> dict[str, Tensor]:
    """Which factors stay: the largest by absolute value, as many as the budget allows; one channel of a width at least.

    Factors that are 0 go in any case. The cost that is left is within 2 % of the budget, or below it by less than one
    unit, unless what is 0 already cost more.

    Raises:
        ValueError: the budget is below what is left when everything removable is gone.
    """
    kept = living(factors)
    values = [
        (float(value.abs()), unit, place)
        for unit in factors.units
        for place, value in enumerate(factors.factors[unit.key].detach())
        if bool(kept[unit.key][place])
    ]
    order = [(unit, place) for _, unit, place in sorted(values, key=lambda v: (v[0], v[1].key, v[2]))]
    spared: set[tuple[str, int]] = set()

    def after(count: int) -> dict[str, Tensor]:
        made, gone = {key: mask.clone() for key, mask in kept.items()}, 0
        for unit, place in order:
            if gone == count:
                break
            if (unit.key, place) in spared or (not unit.block and int(made[unit.key].sum()) == 1):
                continue
            made[unit.key][place] = False
            gone += 1
        return made

    def costs(count: int) -> Cost:
        return cost(narrowed(factors, after(count)))

    if budget.admits(costs(0)):
        return kept
    if not budget.admits(costs(len(order))):
        raise ValueError(
            f"the smallest network that is left costs {costs(len(order))}, more than {budget}. Raise the budget, or "
            "begin with a smaller network."
        )
    while True:
        low, high = 0, len(order)  # low is over the budget, high within it
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if budget.admits(costs(middle)) else (middle, high)
        if -budget.excess(costs(high)) <= WITHIN:
            return after(high)
        before, now = after(low), after(high)
        changed = [key for key in before if not before[key].equal(now[key])]
        jump = None
        if changed:
            key = changed[0]
            jump = key, int((before[key] != now[key]).nonzero()[0, 0])
        if jump is None or jump in spared:
            return now
        spared.add(jump)  # one unit that costs more than the tolerance: leave it, and look on
        if not budget.admits(costs(len(order))):
            return now
