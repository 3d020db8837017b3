"""Scale factors: exact zeros, exact removal, budgets met, and expensive layers first."""

import dataclasses
import itertools
import json
import re
import types

import pytest
import torch
from torch import nn
from torchvision.ops import StochasticDepth

from kdnas.cli.commands import main
from kdnas.conversion.convert import convert
from kdnas.conversion.importance import sort_by_importance
from kdnas.conversion.removal import ResidualBlock, floor_of
from kdnas.conversion.scale_factors import Factors
from kdnas.costs.budget import Budget
from kdnas.costs.count import cost
from kdnas.costs.latency import LatencyTable
from kdnas.costs.size import shipped_bytes
from kdnas.data.base import Data
from kdnas.distillers.base import Step
from kdnas.distillers.from_labels import FromLabels
from kdnas.evaluation import accuracy
from kdnas.jobs._run import insisting
from kdnas.jobs.prune import begin, prune
from kdnas.network import Network, build
from kdnas.outputs import Outputs
from kdnas.runs.folder import LATENCIES, RunFolder
from kdnas.settings import FitTeacher, Recipe
from kdnas.spaces.converted import Node, Part
from kdnas.specs import spec
from kdnas.students.folder import read_student
from kdnas.teachers.load import load_teacher
from kdnas.training.loop import Training
from tests.killing import no_graph  # noqa: F401
from tests.toy import Cnn, SealedImages, data, files_with, narrow_cnn, pruned


def norm_conv(inputs, outputs, kernel=3, stride=1, groups=1):
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Mixed(nn.Module):
    """An inverted residual without activation behind the sum, a residual with one, a block that shrinks."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(norm_conv(3, 16), nn.ReLU())
        self.a1, self.a2, self.a3 = norm_conv(16, 32, 1), norm_conv(32, 32, 3, 1, 32), norm_conv(32, 16, 1)
        self.b1, self.b2 = norm_conv(16, 24), norm_conv(24, 16)
        self.d1, self.d2, self.short = norm_conv(16, 24, 3, 2), norm_conv(24, 24), norm_conv(16, 24, 1, 2)
        self.relu, self.head = nn.ReLU(), nn.Linear(24, 3)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.a3(self.relu(self.a2(self.relu(self.a1(x)))))
        x = self.relu(x + self.b2(self.relu(self.b1(x))))
        x = self.relu(self.d2(self.relu(self.d1(x))) + self.short(x))
        return self.head(x.mean((2, 3)))


SPACE = convert(Mixed().eval(), image=(3, 8, 8)).space


@pytest.fixture(scope="module")
def conversion():
    torch.manual_seed(0)
    source = Mixed().eval()
    for module in source.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_()
    return convert(source, image=(3, 8, 8))


@pytest.fixture
def found(conversion):
    """A network of its own and its factors."""
    return conversion.supernet.extract(conversion.space.largest).eval(), Factors(conversion.space, penalty=0.0)


def drawn(factors, share=0.4):
    with torch.no_grad():
        for value in factors.factors.values():
            value.copy_(torch.randn(value.shape) * (torch.rand(value.shape) > share))


@torch.no_grad()
def gap(network, factors):
    images = torch.randn(4, 3, 8, 8)
    small = factors.removed(network, factors.within(Budget())).eval()
    return (small(images).logits - factors.outputs(network, images).logits).abs().max().item(), small


def test_what_has_factors_and_what_has_none(found):
    _, factors = found
    # The inverted residual's depthwise channels follow those before them; the shrinking block cannot be left out. The
    # first stream runs from the stem to the block that shrinks, the second from its two branches to the classifier.
    assert {u.key: u.size for u in factors.units} == {
        "stem:0:stream": 16,
        "stages_0_0:0": 32,
        "stages_0_1:0": 24,
        "stages_1_0:0": 24,
        "stages_1_0:3:stream": 24,
        "stages_0_0:block": 1,
        "stages_0_1:block": 1,
    }


def test_blocks_may_be_spared():
    factors = Factors(SPACE, penalty=0.0, blocks=False)
    assert [u.key for u in factors.units] == [
        u.key for u in Factors(SPACE, penalty=0.0).units if not isinstance(u, ResidualBlock)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_the_smaller_network_computes_what_the_one_with_factors_did(found, seed):
    network, factors = found
    torch.manual_seed(seed)
    drawn(factors)
    difference, small = gap(network, factors)
    assert difference < 1e-5
    assert cost(small.blueprint).macs < cost(network.blueprint).macs


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "densenet", "resnext50_32x4d"])
def test_streams_of_known_networks_lose_channels_exactly(name):
    from torchvision import models

    torch.manual_seed(0)
    if name == "densenet":
        source = models.DenseNet(8, (3, 2), 16, num_classes=5).eval()
    else:
        source = models.get_model(name, weights=None, num_classes=5).eval()
    for module in source.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.bias.data.normal_(0, 0.1)
    conversion = convert(source, image=(3, 32, 32))
    network = conversion.supernet.extract(conversion.space.largest).eval()
    factors = Factors(conversion.space, penalty=0.0)
    drawn(factors, 0.2)
    streams = [u for u in factors.units if u.key.endswith("stream")]
    # Streams, and what crosses from layer to layer without one; what is concatenated or grouped stays whole.
    counts = {"resnet18": 4, "mobilenet_v3_small": 9, "densenet": 0, "resnext50_32x4d": 5}
    assert len(streams) == counts[name]
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        shown = factors.outputs(network, images).logits
        small = factors.removed(network, factors.within(Budget())).eval()
        assert (small(images).logits - shown).abs().max() <= 1e-5 * max(1.0, float(shown.abs().max()))
    assert cost(small.blueprint).macs < cost(network.blueprint).macs


class Attentive(Mixed):
    """Drops a branch while it trains, and attends to positions with one channel."""

    def __init__(self):
        super().__init__()
        self.attention, self.path = nn.Conv2d(24, 1, 1), StochasticDepth(0.5, "row")

    def forward(self, x):
        x = self.stem(x)
        x = x + self.path(self.a3(self.relu(self.a2(self.relu(self.a1(x))))))
        y = self.relu(self.b1(x))
        x = self.relu(x + self.b2(y * torch.sigmoid(self.attention(y))))
        x = self.relu(self.d2(self.relu(self.d1(x))) + self.short(x))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("seed", range(3))
def test_a_dropped_path_is_a_block_and_one_channel_spread_over_others_stays(seed):
    torch.manual_seed(seed)
    conversion = convert(Attentive().eval(), image=(3, 8, 8))
    network = conversion.supernet.extract(conversion.space.largest).eval()
    factors = Factors(conversion.space, penalty=0.0)
    sizes = {u.key: u.size for u in factors.units}
    assert sizes["stages_0_0:block"] == 1 and sizes["stages_0_1:0"] == 24 and min(sizes.values()) == 1
    assert not any(u.size == 1 for u in factors.units if not isinstance(u, ResidualBlock))
    drawn(factors)
    with torch.no_grad():
        factors.factors["stages_0_0:block"].zero_()
    difference, small = gap(network, factors)
    assert difference < 1e-5
    assert not list(small.get_submodule("stages.0.0").parameters())


def test_a_block_of_factor_zero_goes_whole_and_what_stood_behind_its_sum_stays(found):
    network, factors = found
    drawn(factors, 0.0)
    with torch.no_grad():
        for unit in factors.units:
            if isinstance(unit, ResidualBlock):
                factors.factors[unit.key].zero_()
    difference, small = gap(network, factors)
    assert difference < 1e-5
    stage = small.blueprint.stages[0]
    assert [len(list(small.get_submodule(f"stages.0.{i}").parameters())) for i in range(len(stage))] == [0, 0]
    assert small.get_submodule("stages.0.1").nodes == (("relu", (0,)),)


def test_it_is_ordinary_trains_and_depthwise_channels_are_gone_with_theirs(found):
    network, factors = found
    drawn(factors)
    with torch.no_grad():
        for unit in factors.units:
            if isinstance(unit, ResidualBlock):
                factors.factors[unit.key].fill_(1.0)
    _, small = gap(network, factors)
    convs = [m for m in small.modules() if isinstance(m, nn.Conv2d)]
    assert any(c.groups == c.in_channels == c.out_channels < 32 and c.groups > 1 for c in convs)
    small.train()(torch.randn(4, 3, 8, 8)).logits.sum().backward()
    assert all(p.grad is not None for p in small.parameters())


def test_every_group_is_the_one_that_torch_pruning_finds(found):
    tp = pytest.importorskip("torch_pruning")
    network, factors = found
    positions = [position for position, _ in network.blueprint.named_layers()]
    plain = nn.Sequential(*[network.get_submodule(position) for position in positions]).eval()
    graph = tp.DependencyGraph().build_dependency(plain, example_inputs=torch.zeros(1, 3, 8, 8))
    layers = (nn.Conv2d, nn.BatchNorm2d, nn.Linear)

    def module(place):
        return plain[positions.index(place[0])].parts[str(place[1])]

    for unit in factors.units:
        if isinstance(unit, ResidualBlock):
            continue
        group = graph.get_pruning_group(module(unit.writers[0]), tp.prune_conv_out_channels, idxs=[0])
        touched = {id(d.target.module) for d, _ in group if isinstance(d.target.module, layers)}
        assert touched == {id(module(place)) for place in (*unit.outputs, *unit.readers)}, unit.key


@pytest.mark.parametrize("share", [0.9, 0.7, 0.5, 0.35])
@pytest.mark.parametrize("name", ["macs", "params"])
def test_a_budget_is_met_within_two_per_cent(found, name, share):
    network, factors = found
    with torch.no_grad():
        for value in factors.factors.values():
            value.copy_(torch.rand(value.shape) + 0.1)
    bound = share * getattr(cost(network.blueprint), name)
    kept = factors.within(Budget(**{name: bound}))
    left = getattr(cost(factors.removal.remaining(kept)), name)
    assert left <= bound
    # One channel of this small network is up to 2 % of it.
    unit = max(getattr(c, name) for key, c in factors.removal.savings().items() if "block" not in key)
    assert left > 0.98 * bound - unit


def test_an_impossible_budget_and_none_at_all(found):
    network, factors = found
    with pytest.raises(ValueError, match="smallest network that can be left"):
        factors.within(Budget(macs=10))
    kept = factors.within(Budget())
    assert factors.removal.remaining(kept) == network.blueprint


def test_the_smallest_factors_go_first(found):
    _, factors = found
    with torch.no_grad():
        for unit in factors.units:
            signs = 1 - 2 * (torch.arange(unit.size) % 2)  # small is near 0, not below it
            factors.factors[unit.key].copy_(torch.linspace(0.5, 1.0, unit.size) * signs)
        wide = next(u for u in factors.units if u.size == 32)
        factors.factors[wide.key][:16] = 0.01
    whole = cost(factors.removal.space.blueprint(factors.removal.space.largest)).macs
    kept = factors.within(Budget(macs=0.97 * whole))
    assert not kept[wide.key][:5].any() and kept[wide.key][16:].all()
    assert all(bool(kept[u.key].all()) for u in factors.units if u is not wide)


def trained(penalty, by_cost=True, steps=30, budget=Budget()):
    torch.manual_seed(0)
    conversion = convert(Mixed().eval(), image=(3, 8, 8))
    network = conversion.supernet.extract(conversion.space.largest)
    from kdnas.teachers.base import Frozen

    loaded: Data = data()
    taught = Frozen(Cnn().eval(), preprocessing=loaded.preprocessing)
    factors = Factors(conversion.space, penalty=penalty, budget=budget, by_cost=by_cost)
    made = Training(network, factors, loaded, taught, Recipe(steps=steps, batch_size=16, learning_rate=0.01))
    signs = {name: value.detach().sign() for name, value in factors.factors.items()}
    while not made.done:
        made.step()
    return network.eval(), factors, signs


def test_what_is_minimised_is_the_divergence_of_the_network_with_its_factors_from_the_teacher(found):
    network, factors = found
    drawn(factors, 0.0)
    images, teacher = torch.randn(4, 3, 8, 8), Outputs(torch.randn(4, 3))
    batch = types.SimpleNamespace(images=images, teacher=teacher, labels=torch.zeros(4, dtype=torch.long))
    ((_, loss),) = factors.losses(network, batch, Step(0, 9, 0))
    log_p = factors.outputs(network, images).logits.log_softmax(1)
    q = teacher.logits.softmax(1)
    assert loss.item() == pytest.approx((q * (q.log() - log_p)).sum(1).mean().item(), rel=1e-5)
    assert not torch.allclose(log_p, network(images).logits.log_softmax(1), atol=1e-2)
    loss.backward()
    assert all(value.grad is not None and value.grad.abs().max() > 0 for value in factors.factors.values())


def test_what_a_factor_costs_by_hand():
    factors = Factors(SPACE, penalty=1.0, by_cost=True)
    costs = dict(zip((u.key for u in factors.units), factors.regulariser.costs, strict=True))
    # Multiply-accumulates of one channel in all that makes, passes on and takes it: 8x8 positions, then 4x4.
    assert costs["stages_0_0:0"] == 64 * (16 + 9 + 16)
    assert costs["stages_1_0:0"] == 16 * (9 * 16 + 9 * 24)
    # A block has the weight of the costliest channel at most, or it would go first whatever it does.
    assert costs["stages_0_0:block"] == max(c for key, c in costs.items() if not key.endswith("block"))
    assert Factors(SPACE, penalty=1.0).regulariser.costs is None


@pytest.mark.parametrize("normalised", [True, False])
def test_the_threshold_is_the_learning_rate_times_the_penalty(found, normalised):
    network, _ = found
    factors = Factors(SPACE, penalty=0.1, normalised=normalised)
    value = factors.factors["stages_0_0:0"]
    value.data[:] = torch.linspace(0.01, 1.5, 32)
    expected = (value.detach() - 0.1 * 0.3).clamp_min(0)
    factors.after(network, None, Step(0, 3, 0, rate=0.3))
    torch.testing.assert_close(
        value.detach(), expected / (expected.square().mean().sqrt() if normalised else expected.max())
    )
    assert value[0] == 0


def test_the_penalty_leaves_each_group_and_the_blocks_together_the_norm_of_ones_and_no_weight_smaller(found):
    network, _ = found
    factors = Factors(SPACE, penalty=2.0)
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    drawn(factors, 0.0)
    for index in range(20):
        factors.after(network, None, Step(index, 20, 0, rate=0.01))
    assert any((value == 0).any() for value in factors.factors.values())
    blocks = torch.cat([value for key, value in factors.factors.items() if key.endswith("block")])
    for value in (blocks, *(value for key, value in factors.factors.items() if not key.endswith("block"))):
        assert value.detach().square().mean().item() == pytest.approx(1, rel=1e-5)
    assert blocks.abs().min() < 0.99 * blocks.abs().max()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in network.state_dict().items())


def test_groups_whose_factors_differ_in_scale_alone_keep_equal_shares():
    bound = 0.6 * cost(SPACE.blueprint(SPACE.largest)).macs
    factors = Factors(SPACE, budget=Budget(macs=bound))
    network = Network(SPACE.blueprint(SPACE.largest))
    scales = torch.logspace(-2, 0, len(factors.units))
    with torch.no_grad():
        for unit, scale in zip(factors.units, scales, strict=True):
            factors.factors[unit.key].copy_(torch.linspace(0.5, 1.5, unit.size) * scale if unit.size > 1 else 1)
    for index in range(200):
        factors.after(network, None, Step(index, 200, 0, rate=0.01))
    assert factors.met
    kept = factors.nonzero()
    shares = [kept[u.key].float().mean() for u in factors.units if u.size > 1]
    assert max(shares) - min(shares) < 2 / 16  # two channels of the smallest group


def test_a_group_that_vanishes_whole_keeps_its_floor(found):
    network, _ = found
    factors = Factors(SPACE, penalty=100.0)
    factors.after(network, None, Step(0, 3, 0, rate=1.0))
    assert all((value == 0).all() for value in factors.factors.values())
    assert {u.key: int(factors.nonzero()[u.key].sum()) for u in factors.units} == {
        u.key: floor_of(u) for u in factors.units
    }


def test_channels_are_sorted_by_their_factors(conversion):
    factors = Factors(conversion.space, penalty=0.0)
    drawn(factors)
    values = {key: value.detach().abs() for key, value in factors.factors.items()}
    orders = sort_by_importance(conversion.supernet, factors.importance)
    assert all(torch.equal(values[key][order], values[key].sort(descending=True)[0]) for key, order in orders.items())


def test_as_published_the_largest_factor_of_a_group_moves_into_the_weights(found):
    network, _ = found
    factors = Factors(SPACE, penalty=0.1, normalised=False)
    images = torch.randn(4, 3, 8, 8)
    unit = next(u for u in factors.units if not isinstance(u, ResidualBlock))
    with torch.no_grad():
        factors.factors[unit.key][:2] = torch.tensor([0.01, 0.5])
    expected = {key: (v.detach().abs() - 0.1 * 0.3).clamp_min(0) for key, v in factors.factors.items()}
    moved = Factors(SPACE, penalty=0.1, normalised=False)
    with torch.no_grad():
        for key, value in expected.items():
            moved.factors[key].copy_(value)
    wanted = moved.outputs(network, images).logits.detach()
    factors.after(network, None, Step(0, 3, 0, rate=0.3))
    for other in factors.units:
        value = factors.factors[other.key].detach()
        channels = not isinstance(other, ResidualBlock)
        torch.testing.assert_close(value, expected[other.key] / (expected[other.key].max() if channels else 1))
    assert factors.factors[unit.key][0] == 0
    torch.testing.assert_close(factors.outputs(network, images).logits, wanted, rtol=1e-4, atol=1e-5)


class Bare(nn.Module):
    """A residual whose branch ends in a convolution: its weights have a factor per channel in and one for the block."""

    def __init__(self):
        super().__init__()
        self.stem, self.relu, self.head = norm_conv(3, 8), nn.ReLU(), nn.Linear(8, 3)
        self.one, self.two = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 8, 3, padding=1)

    def forward(self, x):
        x = self.relu(self.stem(x))
        return self.head((x + self.two(self.relu(self.one(x)))).mean((2, 3)))


def test_two_factors_on_one_weight_both_count():
    torch.manual_seed(0)
    conversion = convert(Bare().eval(), image=(3, 8, 8))
    network = conversion.supernet.extract(conversion.space.largest).eval()
    factors = Factors(conversion.space, penalty=0.0)
    assert [u.size for u in factors.units] == [8, 12, 1]
    images = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        for unit, by in zip(factors.units, (1.0, 2.0, 0.5), strict=True):
            factors.factors[unit.key].fill_(by)
        # The branch's weights times 2 and a half, its bias times a half: a bias of 0 leaves the branch as it was.
        network.get_parameter("stages.0.0.parts.2.bias").zero_()
        assert torch.allclose(factors.outputs(network, images).logits, network(images).logits, atol=1e-5)
    drawn(factors)
    assert gap(network, factors)[0] < 1e-5


def zeros(factors):
    return sum(int((value == 0).sum()) for value in factors.factors.values())


def test_no_penalty_removes_nothing_and_a_larger_one_never_keeps_more():
    counts, macs = [], []
    for penalty in (0.0, 1.0, 20.0, 60.0):
        network, factors, _ = trained(penalty)
        counts.append(zeros(factors))
        macs.append(cost(factors.removed(network, factors.within(Budget())).blueprint).macs)
    assert counts[0] == 0 and macs[0] == cost(network.blueprint).macs
    assert counts == sorted(counts) and counts[-1] > 0
    assert macs == sorted(macs, reverse=True)


@pytest.mark.parametrize(("name", "share"), [("macs", 0.5), ("params", 0.6)])
def test_a_growing_penalty_meets_the_budget_with_zeros_alone_and_leaves_them(name, share):
    whole = cost(SPACE.blueprint(SPACE.largest))
    bound = share * getattr(whole, name)
    _, factors, _ = trained(None, steps=60, budget=Budget(**{name: bound}))
    assert bool(factors.met)
    kept = factors.nonzero()
    assert all(torch.equal(mask, kept[key]) for key, mask in factors.within(Budget(**{name: bound})).items())
    met = getattr(cost(factors.removal.remaining(kept)), name)
    unit = max(getattr(c, name) for key, c in factors.removal.savings().items() if "block" not in key)
    assert 0.98 * bound - unit <= met <= bound
    zeros_before = {key: value == 0 for key, value in factors.factors.items()}
    assert all(torch.equal(zeros_before[key], alive == 0) for key, alive in factors.alive.items())


@pytest.mark.parametrize("total", [200, 20_000])
def test_looks_that_are_far_apart_remove_no_more_than_the_budget_asks(total):
    class Plain(nn.Sequential):
        def __init__(self):
            layers = [layer for i in (3, 64, 64) for layer in (norm_conv(i, 64), nn.ReLU())]
            super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 3))

    torch.manual_seed(0)
    conversion = convert(Plain().eval(), image=(3, 8, 8))
    space, network = conversion.space, conversion.supernet.extract(conversion.space.largest)
    bound = 0.5 * cost(space.blueprint(space.largest)).macs
    factors = Factors(space, budget=Budget(macs=bound), by_cost=True)
    assert not any(isinstance(u, ResidualBlock) for u in factors.units)
    with torch.no_grad():
        for value in factors.factors.values():
            value.uniform_(0.5, 1.5)
    for index in range(total):
        factors.after(network, None, Step(index, total, 0, rate=0.01))
        if factors.met:
            break
    assert 0.98 * bound <= cost(factors.removal.remaining(factors.nonzero())).macs <= bound
    # Of a group, what came back (as it was at the look before) was farther from 0 than what did not.
    came, went = [], []
    for key, value in factors.factors.items():
        before = factors.before[key]
        came.append(before[(value != 0) & (value == before)])
        went.append(before[(value == 0) & (before != 0)])
    assert sum(map(len, went)) > 0
    assert all(not len(c) or not len(w) or c.min() >= w.max() for c, w in zip(came, went, strict=True))
    assert total == 200 or sum(map(len, came)) > 0


@pytest.mark.parametrize("rounds", [1, 3])
def test_each_round_removes_to_its_share_of_the_budget_and_brings_nothing_back(rounds):
    whole = cost(SPACE.blueprint(SPACE.largest)).macs
    factors = Factors(SPACE, budget=Budget(macs=whole / 8), rounds=rounds)
    network = Network(SPACE.blueprint(SPACE.largest))
    total, before = 300, factors.nonzero()
    for index in range(total):
        factors.after(network, None, Step(index, total, 0, rate=0.01))
        nonzero = factors.nonzero()
        done = int(factors.met)
        left = cost(factors.removal.remaining(nonzero)).macs
        assert done <= index * rounds // total + 1
        assert left <= whole * 8 ** (-done / rounds)
        for value in factors.factors.values():  # as a gradient would
            value.data[value == 0] = 0.01 if done == rounds else 0.0
        if done:
            assert all((nonzero[key] <= before[key]).all() for key in nonzero)
        before = nonzero
    assert done == rounds
    factors.after(network, None, Step(total - 1, total, 0, rate=0.01))
    assert all(torch.equal(value != 0, factors.alive[key] != 0) for key, value in factors.factors.items())


def test_rounds_of_a_fixed_penalty_are_refused():
    with pytest.raises(ValueError, match=r"`rounds` belong to a penalty that grows, got 2 of the penalty 0\.1"):
        Factors(SPACE, penalty=0.1, rounds=2)


def test_what_was_met_survives_a_checkpoint(tmp_path):
    from kdnas.runs.checkpoint import load_state, save_state

    budget = Budget(macs=0.5 * cost(SPACE.blueprint(SPACE.largest)).macs)
    _, factors, _ = trained(None, steps=60, budget=budget)
    save_state(tmp_path / "state.safetensors", dict(factors.state_dict()))
    again = Factors(factors.removal.space, budget=budget)
    again.load_state_dict(load_state(tmp_path / "state.safetensors"))
    assert bool(again.met) and all(torch.equal(again.alive[key], alive) for key, alive in factors.alive.items())


def test_costs_move_removal_to_expensive_channels(found):
    network, _ = found

    def left(by_cost):
        """What one step leaves of a factor of 0.5 beside 1, in the costliest group and in the cheapest."""
        factors = Factors(SPACE, penalty=0.1, by_cost=by_cost)
        prices = factors.removal.savings()
        channels = [u for u in factors.units if not isinstance(u, ResidualBlock)]
        for value in factors.factors.values():
            value.data[1:] = 0.5
        factors.after(network, None, Step(0, 3, 0, rate=1.0))
        order = sorted(channels, key=lambda u: prices[u.key].macs)
        values = [factors.factors[unit.key].detach() for unit in (order[-1], order[0])]
        return [float(value[1] / value[0]) for value in values]

    dear, cheap = left(True)
    assert dear < cheap - 0.01
    assert left(False)[0] == pytest.approx(left(False)[1])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "pruned"
    main(["prune", "tests/toy.py:pruned", "--out", str(folder)])
    return folder


def test_one_command_prunes_retrains_and_puts_the_controls_beside(run, capsys):
    held = RunFolder(run)
    rows = {row["name"]: row for row in held.results()["rows"]}
    # The student is the best of the searched removal and its controls on the search part.
    assert {"teacher", "student", "control"} < set(rows) <= {*rows, "equal", "random", "trained"}
    others = {"trained", "equal", "random"} & set(rows)
    searched = {name: held.phase(name)["search_accuracy"] for name in ("student", *others)}
    assert others and max(searched.values()) == searched["student"]
    _, card = read_student(run / "students" / "student")
    assert card.cost.macs <= 350_000 and card.cost.macs == rows["student"]["macs"]
    assert (run / "students" / "student" / "student.onnx").exists()
    removal = held.phase("removal")
    page = (run / "report.html").read_text()
    assert f"{removal['candidates']} removals were scored" in page
    assert not files_with(run, run.parent)
    assert removal["left"]["macs"] <= 350_000 and len(held.lines("removals.jsonl")) >= removal["candidates"]
    assert f"{removal['whole']['macs']:,} MACs" in page and "kdnas search" not in page and "not finished" not in page
    main(["prune", "tests/toy.py:pruned", "--out", str(run), "--json"])
    assert json.loads(capsys.readouterr().out)["accuracy"] == rows["student"]["accuracy"]


def _begun(folder, **changes):
    settings = dataclasses.replace(pruned(), **changes)
    storage = RunFolder.create(folder, settings.to_json(), 0)
    return begin(settings, storage), storage


@pytest.mark.parametrize("finalists", [1, 3])
def test_equal_shares_are_a_candidate_of_their_own_where_the_search_ranks_them_first(tmp_path, monkeypatch, finalists):
    scores = itertools.count(0, -1)  # equal shares are tried first
    monkeypatch.setattr("kdnas.jobs.prune.agreement", lambda *_, **__: float(next(scores)))
    job, storage = _begun(tmp_path / "run", finalists=finalists)
    job.remove()
    folders = sorted(path for path in storage.path("students").glob("removal-*"))
    left = [read_student(path)[0].blueprint for path in folders]
    assert len(folders) == finalists + 2 and len(set(left)) == len(left)
    monkeypatch.setattr("kdnas.jobs.prune.compare", lambda _, tried, __: next(n for n in tried if "chosen" in n))
    variants = job.decide()
    assert {name: variant.student.name for name, variant in variants.items()} == {
        "trained": "removal-chosen",
        "equal": "removal-equal",
        "random": "removal-random",
    }


@pytest.mark.parametrize("bound", ["params=25%", "size=40%", "latency=50%"])
def test_what_random_removal_leaves_is_within_the_budget_whatever_is_bounded(tmp_path, monkeypatch, bound):
    """The search prefers networks of many multiply-accumulates; at as many, random channels have more parameters."""

    def alone(table, layer, shapes):
        return 1e-9 * sum(p.numel() for p in build(layer).parameters())

    monkeypatch.setattr(LatencyTable, "_alone", alone)
    monkeypatch.setattr(LatencyTable, "whole", lambda table, blueprint: 1e-9 * cost(blueprint).params)
    monkeypatch.setattr("kdnas.jobs.prune.agreement", lambda network, *_, **__: float(cost(network.blueprint).macs))
    job, storage = _begun(tmp_path / "run", budget=Budget.parse(bound))
    job.remove()
    blueprints = [read_student(storage.path("students", name))[0].blueprint for name in ("source", "removal-random")]
    size = bound.startswith("size")
    whole, left = (shipped_bytes(each, "fp32") if size else cost(each).params for each in blueprints)
    assert left <= float(bound.partition("=")[2].rstrip("%")) / 100 * whole


def test_the_test_part_is_read_after_the_choice_and_the_choice_is_said(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(SealedImages, "run", tmp_path / "run")
    monkeypatch.setattr(SealedImages, "phase", "choice")
    monkeypatch.setattr(SealedImages, "reads", 0)
    settings = dataclasses.replace(pruned(), data=spec("tests.toy:sealed"), budget=Budget(macs="50%"))
    settings = dataclasses.replace(settings, teacher=load_teacher("tests.toy:steady_cnn"))
    with insisting(True):  # the teacher has random weights
        result = prune(settings, tmp_path / "run")
    storage = RunFolder(tmp_path / "run")
    rows = storage.results()["rows"]
    assert SealedImages.reads == len(rows)
    choice = storage.phase("choice")
    reached = max(choice["reached"].values())
    assert choice["reached"][choice["removal"]] == reached == result["search_accuracy"]
    assert f"the student is of {choice['removal']} removal" in caplog.text
    for name, value in choice["reached"].items():
        assert f"{name} removal {value:.2%}" in caplog.text
    trials = [name for name in storage.manifest["phases"] if name.startswith("trial: ")]
    assert trials and all(f"{name}: accuracy" in caplog.text for name in trials)
    page = (tmp_path / "run" / "report.html").read_text()
    assert f"The student is of {choice['removal']} removal" in page
    claim = storage.results()["controls"]["distillation"]
    assert claim["sentence"] in (tmp_path / "run" / "students" / "student" / "README.md").read_text()


def test_a_student_with_fresh_weights_is_measured_as_it_was_trained(tmp_path):
    """Its images are normalised as the data's, those of the source otherwise."""
    settings = dataclasses.replace(pruned(), weights="fresh", controls=False, budget=Budget(macs="80%"))
    recipe = Recipe(steps=80, batch_size=16, learning_rate=0.1)
    settings = dataclasses.replace(settings, distiller=spec(FromLabels), retrain=recipe)
    settings = dataclasses.replace(settings, teacher=load_teacher("tests.toy:far_cnn"))
    with insisting(True):
        result = prune(settings, tmp_path / "run")
    own = settings.data.build(Data)
    network, card = read_student(tmp_path / "run" / "students" / "student")
    assert card.preprocessing == own.preprocessing
    assert result["search_accuracy"] == accuracy(network, own.search, own)
    assert result["accuracy"] == accuracy(network, own.test, own) > 0.4


def test_its_student_is_retrained_and_quantized_by_what_its_card_and_run_say(run, monkeypatch, tmp_path):
    from kdnas.jobs.retrain import retrain, settings_of
    from kdnas.students.trust import source_of

    student = run / "students" / "student"
    settings = settings_of(student)
    assert settings.recipe == pruned().retrain and settings.weights in ("inherited", "fresh")
    _, card = read_student(student)
    assert source_of(student, card, "data") == pruned().data
    assert source_of(student, card, "teacher")["path"] == str((run / "teacher").resolve())
    found = retrain(student, settings_of(student), tmp_path / "again", deploy=False)
    assert found["macs"] == card.cost.macs


def test_a_source_or_budget_that_does_not_fit_is_refused_before_anything_is_trained(run, tmp_path):
    with pytest.raises(ValueError, match="no_such"):
        prune(dataclasses.replace(pruned(), source="tests.toy:no_such"), tmp_path / "source")
    assert not (tmp_path / "source" / "teacher").exists()
    teacher = f"checkpoint:{run / 'teacher'}"
    whole = read_student(run / "teacher")[1].cost
    for macs, message in (
        (10, r"infeasible: the smallest network that a removal leaves has [\d,]+ params and [\d,]+ macs, not within"),
        (whole.macs, "so there is nothing to remove"),
    ):
        settings = dataclasses.replace(pruned(), source=teacher, budget=Budget(macs=macs))
        with pytest.raises(ValueError, match=message):
            prune(settings, tmp_path / str(macs))
        assert not (tmp_path / str(macs) / "factors.safetensors").exists()


_SMALLEST = r"infeasible: the smallest network that a removal leaves has "


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": Budget(macs=10)}, _SMALLEST + r"[\d,]+ params and [\d,]+ macs, not within macs <= 10\."),
        ({"budget": Budget(params="0.1%")}, _SMALLEST),
        ({"budget": Budget(size="100 B")}, _SMALLEST + r"[\d,]+ params, [\d,]+ macs and size [\d,]+ bytes"),
        ({"budget": Budget(macs=10**9)}, "so there is nothing to remove"),
        ({"budget": Budget(latency="1%")}, _SMALLEST + r"[\d,]+ params, [\d,]+ macs and latency \d"),
        ({"budget": Budget(latency="1 us")}, _SMALLEST),
        ({"budget": Budget(latency="1000 s")}, "so there is nothing to remove"),
        ({"teacher": FitTeacher(members=2, recipe=Recipe(steps=1))}, "the teacher must be one network"),
    ],
)
def test_a_budget_is_refused_before_the_teacher_that_is_cut_down_is_trained(tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(LatencyTable, "_alone", lambda table, layer, shapes: 1e-3)
    monkeypatch.setattr(LatencyTable, "whole", lambda table, blueprint: 1e-9 * cost(blueprint).macs)
    with pytest.raises(ValueError, match=message):
        prune(dataclasses.replace(pruned(), **changes), tmp_path / "run")
    assert not (tmp_path / "run" / "teacher").exists()


def test_a_latency_that_is_predicted_but_not_measured_is_refused(tmp_path, monkeypatch):
    """Layers predict by their parameters; whole networks are measured above a second, however small they are."""
    monkeypatch.setattr(
        LatencyTable, "_alone", lambda table, layer, shapes: sum(p.numel() for p in build(layer).parameters())
    )
    monkeypatch.setattr(LatencyTable, "whole", lambda table, blueprint: 1.0 + 1e-9 * cost(blueprint).macs)
    with pytest.raises(ValueError, match=_SMALLEST + r"[\d,]+ params, [\d,]+ macs and latency 1 s, not within"):
        prune(dataclasses.replace(pruned(), budget=Budget(latency="500 ms")), tmp_path / "run")
    assert not (tmp_path / "run" / "teacher").exists()


def test_latencies_that_were_measured_before_the_teacher_was_trained_are_those_of_the_trained_one(tmp_path):
    job, storage = _begun(tmp_path / "run", budget=Budget(latency="90%"))
    rows = len(storage.lines("latency.jsonl"))
    job.table.seconds(job.source.space.blueprint(job.source.space.largest))
    assert len(storage.lines("latency.jsonl")) == rows


def test_a_seed_decides_the_weights_of_a_source_that_has_none():
    from kdnas.jobs._source import load
    from tests.toy import data

    def weights(seed, count):
        torch.rand(count)  # whatever was drawn before
        source = load("tests.toy:cnn", None, data(), seed)
        return torch.cat([p.detach().flatten() for p in source.supernet.parameters()])

    first = weights(3, 1)
    assert torch.equal(first, weights(3, 2)) and not torch.equal(first, weights(4, 1))


def test_a_source_of_other_classes_is_refused(tmp_path):
    with pytest.raises(ValueError, match="other_classes has 7 classes, the data 3"):
        prune(dataclasses.replace(pruned(), source="tests.toy:other_classes"), tmp_path / "run")


@pytest.mark.parametrize("as_published", [False, True])
def test_factors_choose_and_the_source_gives_the_weights_unless_they_are_as_published(tmp_path, as_published):
    from tests.toy import pruned_by_factors

    settings = dataclasses.replace(pruned_by_factors(), as_published=as_published)
    storage = RunFolder.create(tmp_path / "run", settings.to_json(), 0)
    job = begin(settings, storage)
    job.remove()
    left = read_student(storage.path("students", "removal-chosen"))[0]
    assert cost(left.blueprint).macs <= 350_000
    assert storage.path("students", "removal-equal").exists()
    folder = storage.path("students", "source-factors")
    assert folder.exists() is not as_published
    # The stem reads the images, of which none is removed: what is left of it are its first channels.
    source = read_student(folder if not as_published else storage.path("students", "source"))[0]
    weight, whole = (network.get_parameter("stem.parts.0.weight") for network in (left, source))
    assert torch.equal(weight, whole[: len(weight)]) is not as_published


def test_a_source_in_which_nothing_is_elastic_is_pruned_all_the_same(tmp_path):
    space = convert(narrow_cnn().eval(), image=(3, 8, 8), needs_choices=False).space
    assert space.count() == 1
    whole = cost(space.blueprint(space.largest))
    settings = dataclasses.replace(pruned(), source="tests.toy:narrow_cnn", budget=Budget(macs=0.6 * whole.macs))
    found = prune(settings, tmp_path / "run")
    assert 0.5 * whole.macs < found["macs"] <= 0.6 * whole.macs


@pytest.mark.parametrize(("method", "said"), [("shares", "3 steps of 16"), ("scale_factors", "6 steps of 16")])
def test_the_training_that_is_announced_is_the_first_that_comes(tmp_path, caplog, method, said):
    caplog.set_level("INFO")
    settings = dataclasses.replace(pruned(), method=method)
    begin(settings, RunFolder.create(tmp_path / "run", settings.to_json(), 0))
    assert re.search(rf"training +{said} images, roughly \d+ s; ", caplog.text)
    assert bool(re.search(r"search +6 candidates, roughly \d+ s\n", caplog.text)) is (method == "shares")
    assert re.search(r"finalists +with their controls 4.6 trainings of 3 steps, roughly \d+ s at most", caplog.text)


def test_a_search_of_removals_ends_with_its_time_and_says_so(tmp_path, caplog):
    caplog.set_level("INFO")
    job, storage = _begun(tmp_path / "run", max_time=1e-9)
    assert re.search(r"search +6 candidates, roughly 1 s\n", caplog.text)  # never 0
    job.remove()
    assert storage.phase("removal")["candidates"] == len(storage.lines("removals.jsonl")) == 1
    assert "1 of 6 removals were tried within 1e-09 s" in caplog.text


def test_the_seconds_of_a_search_of_removals_are_announced_by_those_of_a_candidate(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr("kdnas.jobs.prune.image_seconds", lambda call, images: 10.0)
    _begun(tmp_path / "run", num_images=20)
    assert re.search(r"search +6 candidates, roughly 20 min\n", caplog.text)  # 6 candidates, 20 images of 10 s each


def test_what_a_removal_leaves_is_measured_within_its_latency(tmp_path, monkeypatch):
    """Layers predict by their parameters, whole networks take a nanosecond for a multiply-accumulate."""

    def alone(table, layer, shapes):
        return 1e-9 * sum(p.numel() for p in build(layer).parameters())

    monkeypatch.setattr(LatencyTable, "_alone", alone)
    monkeypatch.setattr(LatencyTable, "whole", lambda table, blueprint: 1e-9 * cost(blueprint).macs)
    settings = dataclasses.replace(pruned(), budget=Budget.parse(["latency=50%"]))
    storage = RunFolder.create(tmp_path / "run", settings.to_json(), 0)
    job = begin(settings, storage)
    job.remove()
    assert storage.phase("removal")["candidates"] == job.tried == settings.num_candidates  # not those that are measured
    whole = cost(read_student(storage.path("students", "source"))[0].blueprint).macs
    for name in ("removal-chosen", "removal-equal"):
        macs = cost(read_student(storage.path("students", name))[0].blueprint).macs
        assert 0.35 * whole < macs <= 0.5 * whole
    rows = storage.lines(LATENCIES)
    assert sum("network " in row.get("layer", "") for row in rows) >= 2
    again = RunFolder.create(tmp_path / "run", settings.to_json(), 0)
    monkeypatch.setattr(LatencyTable, "whole", None)  # what was measured is not measured again
    begin(settings, again).remove()
    assert len(storage.lines(LATENCIES)) == len(rows)


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="`penalty` must be at least 0"):
        dataclasses.replace(pruned(), penalty=-1.0)
    with pytest.raises(ValueError, match="got neither"):
        Factors(SPACE)
    with pytest.raises(ValueError, match="no channel"):
        flat = Part(nodes=(Node(op="flatten"), Node(op="linear", inputs=(1,), values=(1024, "classes", 1))))
        Factors(dataclasses.replace(SPACE, streams=((16,), (24,)), stages=(), head=flat))


def test_a_source_is_fed_as_it_was_trained_or_the_difference_is_reported():
    from kdnas.jobs._source import fed_as

    images = data()
    own = images.preprocessing
    assert fed_as(images, own) is images
    other = dataclasses.replace(own, mean=(0.1, 0.2, 0.3), std=(2.0, 2.0, 2.0))
    fed = fed_as(images, other)
    pixels = images.test.take(torch.arange(4))
    torch.testing.assert_close(fed.normalise(pixels)[:, 1], (pixels[:, 1] - 0.2) / 2)
    assert images.preprocessing == own and fed.class_names == images.class_names
    with pytest.raises(ValueError, match=r"was trained on images of 3 x 16 x 16 .*, the data has 3 x 8 x 8"):
        fed_as(images, dataclasses.replace(own, height=16, width=16))
