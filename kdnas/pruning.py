"""Scale factors on a network's channels and blocks, and the smaller network that is left when some are zero."""

import math
from collections.abc import Iterator, Mapping
from typing import ClassVar, final

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
    proximal step after each of its steps, $g \leftarrow \mathrm{sign}(g) \max(|g| - \eta \lambda \alpha_j, 0)$:
    factors become 0 and never change their sign by it. $\eta$ falls with a cosine from 1 to 0. $\alpha_j$ is what the
    channel or block costs in multiply-accumulates, divided by the mean over all groups and blocks, or 1.

    A channel's factor multiplies what the layers after it take from it (their weights' columns), a block's the last
    normalisation or convolution before the sum with its input. Both fold into weights without remainder, whatever
    stands between. A residual stream's channels have one factor each, which every layer that takes them shares
    (`kdnas.removable`). Factors are learnable parts of this distiller and begin at 1.

    Without a penalty $\lambda$ grows exponentially, from 0.001 to 10 in 80 % of the steps and with $\eta = 1$, until
    what is not 0 meets the budget: what the teacher's divergence holds up least for its cost goes first. The cost is
    looked at 200 times. Of what became 0 since the look before, as much comes back as the budget allows, what was
    farthest from 0 for its cost first. Then zeros stay, and the rest is trained without penalty.

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

    teaches: ClassVar[type[Network]] = Network

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
        # Which factors were not 0 when the budget was met, nothing before; and all at the last look before.
        self.register_buffer("met", torch.tensor(False))
        self.alive, self.before = (
            nn.ParameterDict({u.key: nn.Parameter(torch.ones(u.size), requires_grad=False) for u in self.units})
            for _ in range(2)
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
        self.regulariser.proximal(self._values(), strength)
        if step.index % max(1, step.total // _LOOKS):
            return
        if self.budget.excess(cost(narrowed(self, living(self)))) > 0:
            for key, value in self.factors.items():
                self.before[key].copy_(value.detach())
            return
        # Between two looks too much may have become 0: it comes back, and goes again one by one.
        values, before = _held(self.factors), _held(self.before)
        costs = self.regulariser.costs or (1.0,) * len(self.units)
        gone = {key: (value == 0) & (before[key] != 0) for key, value in values.items()}
        near = {u.key: before[u.key].abs().double() / share for u, share in zip(self.units, costs, strict=True)}
        most = max(float(distance.max()) for distance in near.values())
        for key, value in values.items():
            self.factors[key].data.copy_(torch.where(gone[key], before[key], value))
        order = {key: torch.where(gone[key], near[key], most + 1 + value.abs()) for key, value in values.items()}
        for key, mask in _within(self, self.budget, order).items():
            self.alive[key].copy_(mask)
            self.factors[key].data.mul_(self.alive[key])
        self.met.fill_(True)


def _held(factors: nn.ParameterDict) -> dict[str, Tensor]:
    """Factors by their unit's key, on the CPU, where looking at single ones costs nothing."""
    return {key: value.detach().clone().cpu() for key, value in factors.items()}


def living(factors: Factors) -> dict[str, Tensor]:
    """Which factors are not 0; of each group of channels the largest in any case. On the CPU."""
    values = _held(factors.factors)
    kept = {key: value != 0 for key, value in values.items()}
    for unit in factors.units:
        if not unit.block and not bool(kept[unit.key].any()):
            kept[unit.key][values[unit.key].abs().argmax()] = True
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
    return _within(factors, budget, {key: value.abs() for key, value in _held(factors.factors).items()})


def _within(factors: Factors, budget: Budget, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is left when the least of these values, in the order of the factors that are not 0, go; see `chosen`."""
    kept = living(factors)
    listed = [
        (value, unit, place)
        for unit in factors.units
        for place, (value, stays) in enumerate(zip(values[unit.key].tolist(), kept[unit.key].tolist(), strict=True))
        if stays
    ]
    order = [(unit, place) for _, unit, place in sorted(listed, key=lambda v: (v[0], v[1].key, v[2]))]
    spared: set[tuple[str, int]] = set()

    def after(count: int) -> dict[str, Tensor]:
        left = {key: int(mask.sum()) for key, mask in kept.items()}
        gone: dict[str, list[int]] = {key: [] for key in kept}
        for unit, place in order:
            if count == 0:
                break
            if (unit.key, place) in spared or (not unit.block and left[unit.key] == 1):
                continue
            gone[unit.key].append(place)
            left[unit.key] -= 1
            count -= 1
        made = {key: mask.clone() for key, mask in kept.items()}
        for key, places in gone.items():
            made[key][places] = False
        return made

    def costs(count: int) -> Cost:
        return cost(narrowed(factors, after(count)))

    if budget.admits(costs(0)):
        return kept
    least = costs(len(order))
    if not budget.admits(least):
        raise ValueError(
            f"the smallest network that is left has {least.params:,} params and {least.macs:,} MACs, more than "
            f"{budget}. Raise the budget, or begin with a smaller network."
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
