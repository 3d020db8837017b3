"""The smaller network that is left when channels and blocks are removed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kdnas.conversion.channels import blueprint_of
from kdnas.costs.budget import Budget, Cost
from kdnas.costs.count import cost
from kdnas.network import Network
from kdnas.space import Blueprint

if TYPE_CHECKING:
    from kdnas.conversion.scale_factors import Factors

WITHIN = 0.02


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
