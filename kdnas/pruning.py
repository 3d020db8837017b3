"""Scale factors on a network's channels and blocks, and the smaller network that is left when some are zero."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.func import functional_call

from kdnas.cost import Budget, Cost, cost
from kdnas.losses.regulariser.scale_factors import ScaleFactors
from kdnas.losses.response.soft_targets import SoftTargets
from kdnas.network import Network
from kdnas.outputs import Outputs
from kdnas.space import Blueprint, Layer, layer
from kdnas.spaces.converted import Converted, Node, Part
from kdnas.training import Batch, Distiller, Model, Step

_DENSE = ("conv", "linear")
_ACTIVATIONS = ("relu", "relu6", "swish", "hswish", "gelu", "sigmoid", "hsigmoid")
WITHIN = 0.02


@final
@dataclasses.dataclass(frozen=True)
class Unit:
    """Channels of one inner width of a part, or a whole block, with one factor per channel.

    Attributes:
        position: of the layer, as in `Blueprint.named`.
        width: the width's name in the part, such as `w0`; empty for a block.
        size: number of factors.
    """

    position: str
    width: str
    size: int

    @property
    def key(self) -> str:
        """A name for a parameter."""
        return f"{self.position}:{self.width or 'block'}".replace(".", "_")


@final
class Factors(Distiller):
    r"""Trains a network and one factor per channel and block under a teacher, most factors towards 0.

    $\mathrm{KL}(p_t \| p_s)\,T^2 + \lambda \sum_j \alpha_j |g_j|$: the first term by the training loop, the second by a
    proximal step after each of its steps, $g \leftarrow \mathrm{sign}(g) \max(|g| - \eta \lambda \alpha_j, 0)$ with the
    learning rate $\eta$: factors become 0 and never change their sign by it. $\alpha_j$ is what the channel or block
    costs in multiply-accumulates, divided by the mean over all factors, or 1.

    A channel's factor multiplies what the layers after it take from it (their weights' columns), a block's the last
    normalisation or convolution before the sum with its input. Both fold into weights without remainder, whatever
    stands between. Factors are learnable parts of this distiller and begin at 1.

    Args:
        space: of the network, as `kdnas.convert.convert` makes it; the network is its largest.
        penalty: lambda.
        by_cost: whether costs weigh the penalty.
        temperature: T.

    Raises:
        ValueError: nothing in the space has a factor, or a negative penalty.

    Reference: Gu, Tresp, Search for Better Students to Learn Distilled Knowledge, ECAI 2020 (arXiv 2001.11612), the
        objective of section 3.
    Differs: the paper prints KL(student, teacher) in the formula and both networks without order in the text; this is
        the usual direction. What alpha is, is not published. Channels of the residual stream have no factor:
        they are shared by all blocks of a stage.
    """

    def __init__(
        self, space: Converted, *, penalty: float = 1e-3, by_cost: bool = True, temperature: float = 1.0
    ) -> None:
        super().__init__()
        self.space, self.units = space, tuple(units(space))
        if not self.units:
            raise ValueError("no channel and no block of this network can be removed. See `kdnas convert` for why.")
        prices = saved(space, self.units)
        shares = tuple(max(prices[u.key].macs, 1) for u in self.units) if by_cost else None
        self.regulariser = ScaleFactors(strength=penalty, costs=shares)
        self.divergence = SoftTargets(temperature=temperature)
        self.factors = nn.ParameterDict({unit.key: nn.Parameter(torch.ones(unit.size)) for unit in self.units})
        self.rate = 0.0

    def shown(self, model: Network, images: Tensor) -> Outputs:
        """What the network shows with its factors in place."""
        return functional_call(model, self.folded(model), (images,))

    def folded(self, model: Network) -> dict[str, Tensor]:
        """The weights that the factors change, with the factors in them."""
        held = dict(model.named_parameters())
        changed: dict[str, Tensor] = {}
        for unit in self.units:
            part, factor = part_of(self.space, unit.position), self.factors[unit.key]
            for name, weight in _touched(part, unit):
                key = f"{unit.position}.{name}"
                if key in held:
                    shape = [1, -1, *[1] * (held[key].dim() - 2)] if weight else [-1, *[1] * (held[key].dim() - 1)]
                    changed[key] = changed.get(key, held[key]) * factor.reshape(shape)
        return changed

    def losses(self, model: Model, batch: Batch, step: Step) -> Iterator[tuple[str, Tensor]]:
        """The divergence from the teacher."""
        del step
        assert isinstance(model, Network)
        yield "teacher", self.divergence(self.shown(model, batch.images), batch.teacher, batch.labels)

    def after(self, model: Model, batch: Batch, step: Step) -> None:
        """The proximal step."""
        del model, batch
        self.regulariser.proximal([self.factors[u.key] for u in self.units], self.rate_of(step))

    def rate_of(self, step: Step) -> float:
        """The length of the proximal step: a cosine from 1 to 0, in units that the penalty sets."""
        return (1 + math.cos(math.pi * step.progress)) / 2


def units(space: Converted) -> Iterator[Unit]:
    """What has factors: inner widths that no grouped convolution shares, and blocks that add to their input."""
    blueprint = space.blueprint(space.largest)
    for position, _ in blueprint.named():
        part = part_of(space, position)
        for index, options in enumerate(part.widths):
            name = f"w{index}"
            grouped = any(n.op == "conv" and n.values[6] not in (0, 1) and name in n.values[:2] for n in part.nodes)
            if not grouped and any(_takes(node, name) for node in part.nodes):
                yield Unit(position, name, options[-1])
        if position.startswith("stages") and _branch_end(part) is not None:
            yield Unit(position, "", 1)


def part_of(space: Converted, position: str) -> Part:
    """The part at a layer's position."""
    if position in ("stem", "head"):
        return getattr(space, position)
    _, stage, place = position.split(".")
    return space.stages[int(stage)].parts[int(place)]


def saved(space: Converted, of: tuple[Unit, ...]) -> dict[str, Cost]:
    """What removing one factor of each unit saves, by its key."""
    whole = cost(space.blueprint(space.largest))
    kept = {unit.key: torch.ones(unit.size, dtype=torch.bool) for unit in of}
    found = {}
    for unit in of:
        mask = kept[unit.key].clone()
        mask[-1] = False
        left = cost(blueprint_of(space, of, {**kept, unit.key: mask}))
        found[unit.key] = Cost(whole.params - left.params, whole.macs - left.macs)
    return found


def blueprint_of(space: Converted, of: tuple[Unit, ...], kept: Mapping[str, Tensor]) -> Blueprint:
    """The network with the kept channels and blocks alone.

    Args:
        space: of the whole network.
        of: its units.
        kept: per unit which factors stay, `[size]`; of a block one.
    """
    whole = space.blueprint(space.largest)
    layers: dict[str, Layer] = {}
    for position, one in whole.named():
        mine = [unit for unit in of if unit.position == position]
        block = next((u for u in mine if not u.width), None)
        if block is not None and not bool(kept[block.key][0]):
            end = part_of(space, position).nodes[-1].op
            # What stood behind the sum stays: it acts on the input alone then.
            layers[position] = layer("kdnas.blocks.graph:Graph", nodes=((end, (0,)),) if end in _ACTIVATIONS else ())
            continue
        widths = {unit.width: int(kept[unit.key].sum()) for unit in mine if unit.width}
        part = part_of(space, position)
        known: dict[Any, Any] = {f"w{i}": options[-1] for i, options in enumerate(part.widths)} | widths
        known |= {"classes": space.classes, "channels": space.image_channels}
        nodes = tuple((n.op, n.inputs, *(known.get(v, v) for v in n.values)) for n in part.nodes)
        layers[position] = layer("kdnas.blocks.graph:Graph", nodes=nodes) if widths else one
    stages = tuple(tuple(layers[f"stages.{i}.{j}"] for j in range(len(s))) for i, s in enumerate(whole.stages))
    return Blueprint(layers["stem"], stages, layers["head"], whole.image)


def removed(model: Network, factors: Factors, kept: Mapping[str, Tensor]) -> Network:
    """The smaller network with the factors folded in; where all that is removed has factor 0, its outputs are equal."""
    space = factors.space
    blueprint = blueprint_of(space, factors.units, kept)
    state = {**model.state_dict(), **{name: t.detach() for name, t in factors.folded(model).items()}}
    made: dict[str, Tensor] = {}
    for position, _ in blueprint.named():
        part = part_of(space, position)
        masks = {u.width: kept[u.key] for u in factors.units if u.position == position and u.width}
        for place, node in enumerate(part.nodes):
            for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
                tensor = state.get(f"{position}.parts.{place}.{name}")
                if tensor is None:
                    continue
                out = node.values[1] if node.op in _DENSE else node.values[0] if node.op == "norm" else ""
                if out in masks and tensor.dim():
                    tensor = tensor[masks[str(out)]]
                taken = node.values[0]
                if name == "weight" and node.op in _DENSE and taken in masks and _takes(node, str(taken)):
                    tensor = tensor[:, masks[str(taken)]]
                made[f"{position}.parts.{place}.{name}"] = tensor.clone()
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
    kept = {u.key: factors.factors[u.key].detach() != 0 for u in factors.units}
    for unit in factors.units:
        if unit.width and not bool(kept[unit.key].any()):
            kept[unit.key][factors.factors[unit.key].detach().abs().argmax()] = True
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
            if (unit.key, place) in spared or (unit.width and int(made[unit.key].sum()) == 1):
                continue
            made[unit.key][place] = False
            gone += 1
        return made

    def costs(count: int) -> Cost:
        return cost(blueprint_of(factors.space, factors.units, after(count)))

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


def _takes(node: Node, width: str) -> bool:
    """Whether a layer mixes the channels of a width: then their factors are its weight's columns."""
    return node.op in _DENSE and node.values[0] == width and not (node.op == "conv" and node.values[6])


def _touched(part: Part, unit: Unit) -> Iterator[tuple[str, bool]]:
    """Tensors that a unit's factors multiply, and whether along their columns."""
    if unit.width:
        for place, node in enumerate(part.nodes):
            if _takes(node, unit.width):
                yield f"parts.{place}.weight", True
        return
    end = _branch_end(part)
    assert end is not None
    yield f"parts.{end}.weight", False
    yield f"parts.{end}.bias", False


def _branch_end(part: Part) -> int | None:
    """The node before the sum of a part with its own input, where it is a normalisation or a convolution."""
    last = len(part.nodes) - 1
    if last > 0 and part.nodes[last].op in _ACTIVATIONS:
        last -= 1
    if last < 0 or part.nodes[last].op != "add" or 0 not in part.nodes[last].inputs:
        return None
    others = [number for number in part.nodes[last].inputs if number != 0]
    if len(others) != 1 or part.nodes[others[0] - 1].op not in ("norm", "conv"):
        return None
    used = [n for place, n in enumerate(part.nodes) if others[0] in n.inputs and place != last]
    return None if used else others[0] - 1
