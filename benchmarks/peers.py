"""What kdnas is compared with in same_work.py: pruners of others, uniform widths, equal shares and random removal.

Every contestant gets the traced teacher and a budget in MACs, and returns a network that kdnas can train.
"""

import copy
import json
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
import torch_pruning as tp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kdnas.conversion.channels import ChannelGroup
from kdnas.conversion.convert import convert
from kdnas.conversion.removal import Masks, Removal, units
from kdnas.costs.check import Infeasible
from kdnas.costs.count import cost
from kdnas.data.base import Data
from kdnas.network import Network
from kdnas.randomness import initialised, seed_of, torch_rng
from kdnas.spaces.converted import Converted
from kdnas.teachers.base import Teacher

HALVINGS = 14  # of an interval of ratios or shares, until the budget is met
MOST = 0.9  # channels that Torch-Pruning may remove of a layer, as a share; without a bound, layers become empty
SPARSE_STEPS, SPARSE_BATCH, SPARSE_RATE, SPARSE_REG = 400, 64, 0.01, 5e-4
FASTNAS_BATCHES, FASTNAS_IMAGES = 16, 1500  # for batch norms and for each score; 50 batches gave the same widths
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a contestant says of its network.

    Attributes:
        inherited: whether it has weights of the teacher.
        images: images the search has seen, one forward pass each.
        source: the teacher's network with its channels sorted so that the contestant's network has the first ones of
            every stage; the retraining then matches them one by one. It computes live instead of from remembered
            logits. None for the mixture of labels and teacher alone.
    """

    inherited: bool
    images: int = 0
    source: Network | None = None


Contestant = Callable[[Network, Teacher, Data, float, int], tuple[Network, Facts]]
"""(the teacher's network, the teacher, data, MACs, seed) to the network to retrain."""


def plain(network: Network) -> nn.Sequential:
    """The network as a module that gives logits alone, sharing its weights."""
    return nn.Sequential(network.stem, *(layer for stage in network.stages for layer in stage.children()), network.head)


def traced(module: nn.Module, image: tuple[int, int, int]) -> Network:
    """A module's network and weights as kdnas traces them."""
    conversion = convert(module.eval(), image=image, needs_choices=False)
    return conversion.supernet.extract(conversion.space.largest)


def macs_of(module: nn.Module, image: tuple[int, int, int]) -> int:
    """Multiply-accumulates of one image, as torch counts them on the module."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module.eval()(torch.zeros(1, *image))
    return counter.get_total_flops() // 2


def largest_within(make: Callable[[float], tuple[float, T]], budget: float) -> T:
    """What `make(share)` gives at the largest share in (0, 1] whose cost, its first value, is within the budget.

    Raises:
        Infeasible: there is none.
    """
    low, high = 0.0, 1.0
    best: T | None = None
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        spent, result = make(middle)
        if spent <= budget:
            low, best = middle, result
        else:
            high = middle
    if best is None:
        raise Infeasible(f"no network costs at most {budget:.6g}")
    return best


# Widths of equal shares: of every group of channels the same share remains.


def equal_shares(network: Network, budget: float) -> tuple[Network, Removal, dict[str, int]]:
    """The network with each group's channels in order of their norm, and how many of each remain within the budget."""
    conversion = convert(plain(network), image=network.blueprint.image, needs_choices=False)
    space = conversion.space
    assert isinstance(space, Converted)
    removal = Removal(space, units(space))

    def counts(share: float) -> tuple[int, dict[str, int]]:
        left = {u.key: max(1, round(u.size * share)) if isinstance(u, ChannelGroup) else 1 for u in removal.units}
        return cost(removal.blueprint(left)).macs, left

    left = largest_within(counts, budget)
    return conversion.supernet.extract(space.largest), removal, left


def uniform(network: Network, teacher: Teacher, data: Data, budget: float, seed: int) -> tuple[Network, Facts]:
    """Equal shares, fresh weights."""
    _, removal, counts = equal_shares(network, budget)
    return initialised(lambda: Network(removal.blueprint(counts)), seed), Facts(inherited=False)


def equal_by_norm(network: Network, teacher: Teacher, data: Data, budget: float, seed: int) -> tuple[Network, Facts]:
    """Equal shares, the channels of the largest norm."""
    whole, removal, counts = equal_shares(network, budget)
    masks: Masks = {unit.key: torch.arange(unit.size) < counts[unit.key] for unit in removal.units}
    return removal.network(whole.state_dict(), masks), Facts(inherited=True)


def random_removal(network: Network, teacher: Teacher, data: Data, budget: float, seed: int) -> tuple[Network, Facts]:
    """Equal shares, random channels."""
    whole, removal, counts = equal_shares(network, budget)
    rng = torch_rng("random removal", seed)
    masks: Masks = {u.key: torch.randperm(u.size, generator=rng) < counts[u.key] for u in removal.units}
    return removal.network(whole.state_dict(), masks), Facts(inherited=True)


# Torch-Pruning 1.6.1. It knows ratios of channels, so the ratio is halved down to the budget.


def _pruner(module: nn.Module, image: Tensor, kind: Any, **options: object) -> Any:
    classifier = [part for part in module.modules() if isinstance(part, nn.Linear)][-1]
    importance = tp.importance.GroupMagnitudeImportance(p=2)
    return kind(module, image, importance=importance, ignored_layers=[classifier], **options)


def _pruned(module: nn.Module, image: tuple[int, int, int], budget: float, *, everywhere: bool) -> Network:
    """The largest network within the budget, by magnitude; `everywhere` compares channels of all layers."""

    def at(share: float) -> tuple[int, nn.Module]:
        smaller = copy.deepcopy(module).eval()
        options = {"global_pruning": everywhere, "pruning_ratio": 1 - share, "max_pruning_ratio": MOST}
        _pruner(smaller, torch.zeros(1, *image), tp.pruner.BasePruner, **options).step()
        return macs_of(smaller, image), smaller

    return traced(largest_within(at, budget), image)


def magnitude_local(network: Network, teacher: Teacher, data: Data, budget: float, seed: int) -> tuple[Network, Facts]:
    """Torch-Pruning by group magnitude, the same ratio in every layer."""
    return _pruned(plain(network), data.image, budget, everywhere=False), Facts(inherited=True)


def magnitude_global(network: Network, teacher: Teacher, data: Data, budget: float, seed: int) -> tuple[Network, Facts]:
    """Torch-Pruning by group magnitude, channels of all layers compared."""
    return _pruned(plain(network), data.image, budget, everywhere=True), Facts(inherited=True)


def group_norm(network: Network, teacher: Teacher, data: Data, budget: float, seed: int) -> tuple[Network, Facts]:
    """Torch-Pruning's group norm pruner: a training on labels under its regulariser, then global magnitude."""
    module = plain(copy.deepcopy(network)).train()
    options = {"global_pruning": True, "reg": SPARSE_REG}
    pruner = _pruner(module, torch.zeros(1, *data.image), tp.pruner.GroupNormPruner, **options)
    optimizer = torch.optim.SGD(module.parameters(), SPARSE_RATE, momentum=0.9, weight_decay=5e-4)
    draw = seed_of("group norm", seed)
    for step in range(SPARSE_STEPS):
        ids = data.indices(draw, step, SPARSE_BATCH)
        loss = F.cross_entropy(module(data.normalise(data.pixels(ids, draw, step))), data.train.labels[ids])
        optimizer.zero_grad()
        loss.backward()
        pruner.regularize(module)
        optimizer.step()
    facts = Facts(inherited=True, images=SPARSE_STEPS * SPARSE_BATCH)
    return _pruned(module, data.image, budget, everywhere=True), facts


# FastNAS of nvidia-modelopt 0.47, whose requirements are its own: in another environment.


def fastnas(python: Path) -> Contestant:
    """FastNAS with `channel_divisor` 8, run by the Python of an environment where nvidia-modelopt is installed."""

    def contestant(network: Network, teacher: Teacher, data: Data, budget: float, seed: int) -> tuple[Network, Facts]:
        module = plain(copy.deepcopy(network))
        layers = [dict(layer.make.arguments)["nodes"] for _, layer in network.blueprint.named_layers()]
        ids = data.indices(seed_of("fastnas", seed), 0, 64 * FASTNAS_BATCHES)
        some = torch.randperm(len(data.search), generator=torch_rng("fastnas", seed))[:FASTNAS_IMAGES]
        tensors = {f"w.{name}": tensor.contiguous() for name, tensor in module.state_dict().items()}
        tensors |= {"images": data.normalise(data.train.take(ids)), "labels": data.search.labels[some]}
        tensors["search"] = data.normalise(data.search.take(some))
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            save_file(tensors, folder / "network.safetensors")
            settings = {"layers": layers, "macs": budget, "seed": seed}
            (folder / "network.json").write_text(json.dumps(settings), encoding="utf-8")
            here = Path(__file__).parent
            worker = [str(python), str(here / "fastnas.py"), name]
            done = subprocess.run(worker, env={"PYTHONPATH": str(here.parent)}, capture_output=True, text=True)
            if "NOT all constraints can be satisfied" in done.stderr:
                raise Infeasible(f"FastNAS cannot meet {budget:.6g} MACs with widths of multiples of eight")
            if done.returncode:
                raise RuntimeError(f"FastNAS: {done.stderr[-2000:]}")
            state = load_file(folder / "result.safetensors")
            images = json.loads((folder / "result.json").read_text(encoding="utf-8"))["images"]
        return traced(_resized(module, state), data.image), Facts(inherited=True, images=images)

    return contestant


def _resized(module: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """The module with the widths and weights of a state."""
    for name, part in module.named_modules():
        if isinstance(part, nn.Conv2d):
            outputs, inputs = state[f"{name}.weight"].shape[:2]
            part.groups = outputs if part.groups > 1 else 1
            part.in_channels, part.out_channels = inputs * part.groups, outputs
        elif isinstance(part, nn.BatchNorm2d):
            part.num_features = len(state[f"{name}.weight"])
        elif isinstance(part, nn.Linear):
            part.out_features, part.in_features = state[f"{name}.weight"].shape
    for name in module.state_dict():
        path, _, attribute = name.rpartition(".")
        part, tensor = module.get_submodule(path), state[name]
        setattr(part, attribute, nn.Parameter(tensor) if attribute in dict(part.named_parameters()) else tensor)
    return module
