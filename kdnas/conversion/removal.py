"""Removal of channels and whole blocks from a converted network: units, savings, and the remaining network."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from kdnas.conversion.channels import (
    ACTIVATIONS,
    ChannelGroup,
    Place,
    branch_end,
    groups_of,
    operations,
)
from kdnas.costs.budget import Budget, Cost
from kdnas.costs.count import cost
from kdnas.network import Network, without_weights
from kdnas.space import Blueprint, Layer, layer
from kdnas.spaces.converted import Converted

TOLERANCE = 0.02  # of a budget
FLOOR = 1 / 16  # of a group's channels always stay
Masks = dict[str, Tensor]
"""Per unit, by its key, which of its channels stay; of a block whether it stays."""


@final
@dataclass(frozen=True)
class ResidualBlock:
    """A layer that adds to its own input, and can be removed whole.

    Attributes:
        position: of the layer, as in `Blueprint.named_layers`.
        end: index of the node before the sum; its outputs are the branch's.
    """

    position: str
    end: int
    size: int = 1

    @property
    def key(self) -> str:
        """A name, also for a parameter."""
        return f"{self.position}:block".replace(".", "_")


Unit = ChannelGroup | ResidualBlock
Runs = tuple[tuple[str, slice], ...]
"""Keys of groups, and where their channels are among those of a node."""


def joined(runs: Runs, masks: Masks, count: int) -> Tensor:
    """Which of a node's channels stay, `[count]`: those of groups as their masks say, and all others."""
    mask = torch.ones(count, dtype=torch.bool)
    for key, place in runs:
        mask[place] = masks[key].cpu()
    return mask


def _runs(groups: Iterable[tuple[str, Iterable[tuple[Place, slice]]]]) -> dict[Place, Runs]:
    runs: dict[Place, Runs] = {}
    for key, places in groups:
        for place, where in places:
            runs[place] = (*runs.get(place, ()), (key, where))
    return runs


def floor_of(unit: Unit) -> int:
    """How many channels of a group stay at least: a sixteenth, and whole groups of convolutions; of a block none."""
    if isinstance(unit, ResidualBlock):
        return 0
    return math.ceil(unit.size * FLOOR / unit.multiple) * unit.multiple


Counts = dict[str, int]
"""Per unit, by its key, the number of its channels that stay; of a block 1 or 0."""


def counts_of(masks: Mapping[str, Tensor]) -> Counts:
    """How many channels the masks keep."""
    return {key: int(mask.sum()) for key, mask in masks.items()}


def units(space: Converted) -> tuple[Unit, ...]:
    """What can be removed: groups of channels (`channel_groups`) in the network's order, then residual blocks."""
    nodes = operations(space)
    groups = groups_of(space)
    free = [group for group in groups if not group.fixed and group.writers and group.readers]
    blocks = [
        ResidualBlock(position, end)
        for position, layer_nodes in nodes.items()
        if position.startswith("stages") and (end := branch_end(layer_nodes)) is not None
    ]
    return (*free, *blocks)


@final
@dataclass(frozen=True)
class Removal:
    """A network and the units that may be removed from it.

    Attributes:
        space: the converted network's; its largest subnet is the network.
        units: see `units`.
    """

    space: Converted
    units: tuple[Unit, ...]

    @cached_property
    def outputs(self) -> dict[Place, Runs]:
        """By node, the keys of the groups of its output channels, and where they are among them."""
        return _runs((group.key, group.written()) for group in self._groups)

    @cached_property
    def readers(self) -> dict[Place, Runs]:
        """By node that mixes channels of groups, the keys of these, and where they are among its inputs."""
        return _runs((group.key, group.read()) for group in self._groups)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """By unit, by its key, the number of its channels; of a block 1."""
        return {unit.key: unit.size for unit in self.units}

    @cached_property
    def _groups(self) -> list[ChannelGroup]:
        return [unit for unit in self.units if isinstance(unit, ChannelGroup)]

    def gone(self, counts: Mapping[str, int]) -> set[str]:
        """Positions of the blocks that are removed."""
        return {unit.position for unit in self.units if isinstance(unit, ResidualBlock) and not counts[unit.key]}

    def blueprint(self, counts: Mapping[str, int]) -> Blueprint:
        """The network with this many channels of each group, by its key; a block with 0 is gone."""
        whole = self.space.blueprint(self.space.largest)
        gone = self.gone(counts)

        def fewer(runs: Runs) -> int:
            return sum(self.sizes[key] - counts[key] for key, _ in runs)

        layers: dict[str, Layer] = {}
        for position, nodes in operations(self.space).items():
            left = [
                n.without(fewer(self.readers.get((position, i), ())), fewer(self.outputs.get((position, i), ())))
                for i, n in enumerate(nodes)
            ]
            if position in gone:
                # The activation after the sum stays; its input is then the layer's input.
                left = [nodes[-1]._replace(inputs=(0,))] if nodes[-1].op in ACTIVATIONS else []
            layers[position] = layer("kdnas.blocks.graph:Graph", nodes=tuple((n.op, n.inputs, *n.values) for n in left))
        stages = tuple(tuple(layers[f"stages.{i}.{j}"] for j in range(len(s))) for i, s in enumerate(whole.stages))
        head = replace(layers["head"], reads=whole.head.reads)
        return replace(whole, stem=layers["stem"], stages=stages, head=head)

    def remaining(self, masks: Mapping[str, Tensor]) -> Blueprint:
        """The network of the channels and blocks that stay."""
        return self.blueprint(counts_of(masks))

    def savings(self) -> dict[str, Cost]:
        """What removing one channel of each group, or a block, saves, by key."""
        whole = cost(self.blueprint(self.sizes))
        saved = {}
        for key, size in self.sizes.items():
            left = cost(self.blueprint({**self.sizes, key: size - 1}))
            saved[key] = Cost(whole.params - left.params, whole.macs - left.macs)
        return saved

    def nonzero(self, values: Mapping[str, Tensor]) -> Masks:
        """Where values are not 0; of each group of channels the largest by absolute value in any case, to its floor."""
        masks = {key: value != 0 for key, value in values.items()}
        for unit in self.units:
            masks[unit.key][values[unit.key].abs().topk(floor_of(unit)).indices] = True
        return masks

    def within(self, budget: Budget, values: Mapping[str, Tensor], masks: Masks) -> Masks:
        """What stays of `masks` when the least values are removed, as many as the budget requires.

        A sixteenth of the channels of each group stays at least. The cost is within 2 % of the budget, or below it by
        less than one unit, unless `masks` alone already cost less.

        Raises:
            ValueError: the budget is below the cost of the smallest network that can be left.
        """
        order = sorted(
            (value, unit.key, index)
            for unit in self.units
            for index, (value, stays) in enumerate(
                zip(values[unit.key].tolist(), masks[unit.key].tolist(), strict=True)
            )
            if stays
        )
        skipped: set[tuple[str, int]] = set()

        def after(count: int) -> Masks:
            return self._without([(key, index) for _, key, index in order if (key, index) not in skipped], count, masks)

        def cost_after(count: int) -> Cost:
            return cost(self.remaining(after(count)))

        if budget.admits(cost_after(0)):
            return masks
        least = cost_after(len(order))
        if not budget.admits(least):
            raise ValueError(
                f"the smallest network that can be left has {least.params:,} params and {least.macs:,} MACs, more than "
                f"{budget}. Raise the budget, or start from a smaller network."
            )
        while True:
            low, high = 0, len(order)  # low is over the budget, high within it
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if budget.admits(cost_after(middle)) else (middle, high)
            smaller = after(high)
            if -budget.excess(cost(self.remaining(smaller))) <= TOLERANCE:
                return smaller
            larger = after(low)
            differing = [(key, larger[key] != mask) for key, mask in smaller.items() if not larger[key].equal(mask)]
            jump = next(((key, int(places.nonzero()[0, 0])) for key, places in differing), None)
            if jump is None or jump in skipped:
                return smaller
            skipped.add(jump)  # one unit that costs more than the tolerance: it stays, and others are tried
            if not budget.admits(cost_after(len(order))):
                return smaller

    def network(self, state: Mapping[str, Tensor], masks: Masks) -> Network:
        """The network that is left, with its part of the whole network's weights."""
        tensors: dict[str, Tensor] = {}
        for name, tensor in state.items():
            position, _, path = name.partition(".parts.")
            index, _, kind = path.partition(".")
            place = (position, int(index))
            if place in self.outputs and tensor.dim():
                tensor = tensor[joined(self.outputs[place], masks, len(tensor))]
            if place in self.readers and kind == "weight":
                tensor = tensor[:, joined(self.readers[place], masks, tensor.shape[1])]
            tensors[name] = tensor.clone()
        network = without_weights(self.remaining(masks))
        network.load_state_dict({name: tensors[name] for name in network.state_dict()}, assign=True)
        return network.requires_grad_(True)

    def _without(self, order: Sequence[tuple[str, int]], count: int, masks: Masks) -> Masks:
        """The masks after removing the first `count` of the order, sparing every group's floor."""
        floors = {unit.key: floor_of(unit) for unit in self.units}
        left = {key: int(mask.sum()) for key, mask in masks.items()}
        removed: dict[str, list[int]] = {key: [] for key in masks}
        for key, index in order:
            if count == 0:
                break
            if left[key] <= floors[key]:
                continue
            removed[key].append(index)
            left[key] -= 1
            count -= 1
        smaller = {key: mask.clone() for key, mask in masks.items()}
        for key, indices in removed.items():
            smaller[key][indices] = False
        return smaller
