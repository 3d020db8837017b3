"""Scale factors: exact zeros, exact removal, budgets met, and expensive layers first."""

import dataclasses
import json

import pytest
import torch
from torch import nn

from kdnas.cli import main
from kdnas.convert import convert
from kdnas.cost import Budget, cost
from kdnas.data import Data
from kdnas.pruning import Factors, blueprint_of, chosen, part_of, removed, saved
from kdnas.run import Run
from kdnas.student import read_student
from kdnas.training import Recipe, Training
from tests.toy import Cnn, data


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


@pytest.fixture
def found():
    torch.manual_seed(0)
    source = Mixed().eval()
    for module in source.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_()
    conversion = convert(source, image=(3, 8, 8))
    return conversion.supernet.extract(conversion.space.largest).eval(), Factors(conversion.space)


def drawn(factors, share=0.4):
    with torch.no_grad():
        for value in factors.factors.values():
            value.copy_(torch.randn(value.shape) * (torch.rand(value.shape) > share))


@torch.no_grad()
def gap(network, factors):
    images = torch.randn(4, 3, 8, 8)
    small = removed(network, factors, chosen(factors, Budget())).eval()
    return (small(images).logits - factors.shown(network, images).logits).abs().max().item(), small


def test_what_has_factors_and_what_has_none(found):
    _, factors = found
    sizes = {(u.position, u.width): u.size for u in factors.units}
    # The inverted residual's depthwise channels follow those before them; the shrinking block cannot be left out.
    assert sizes == {
        ("stages.0.0", "w0"): 32,
        ("stages.0.0", ""): 1,
        ("stages.0.1", "w0"): 24,
        ("stages.0.1", ""): 1,
        ("stages.1.0", "w0"): 24,
    }


@pytest.mark.parametrize("seed", range(5))
def test_the_smaller_network_computes_what_the_one_with_factors_did(found, seed):
    network, factors = found
    torch.manual_seed(seed)
    drawn(factors)
    difference, small = gap(network, factors)
    assert difference < 1e-5
    assert cost(small.blueprint).macs < cost(network.blueprint).macs


def test_a_block_of_factor_zero_goes_whole_and_what_stood_behind_its_sum_stays(found):
    network, factors = found
    drawn(factors, 0.0)
    with torch.no_grad():
        for unit in factors.units:
            if not unit.width:
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
            if not unit.width:
                factors.factors[unit.key].fill_(1.0)
    _, small = gap(network, factors)
    convs = [m for m in small.modules() if isinstance(m, nn.Conv2d)]
    assert any(c.groups == c.in_channels == c.out_channels < 32 and c.groups > 1 for c in convs)
    small.train()(torch.randn(4, 3, 8, 8)).logits.sum().backward()
    assert all(p.grad is not None for p in small.parameters())


def test_a_group_is_the_one_that_torch_pruning_finds(found):
    tp = pytest.importorskip("torch_pruning")
    network, _ = found
    plain = nn.Sequential(network.stem, *[layer for stage in network.stages for layer in stage], network.head).eval()
    graph = tp.DependencyGraph().build_dependency(plain, example_inputs=torch.zeros(1, 3, 8, 8))
    first = plain[1].parts["0"]
    group = graph.get_pruning_group(first, tp.prune_conv_out_channels, idxs=[0])
    layers = (nn.Conv2d, nn.BatchNorm2d)
    touched = {id(d.target.module) for d, _ in group if isinstance(d.target.module, layers)}
    inner = part_of(Factors(convert(Mixed().eval(), image=(3, 8, 8)).space).space, "stages.0.0")
    mine = {
        id(plain[1].parts[str(place)])
        for place, node in enumerate(inner.nodes)
        if node.op in ("conv", "norm") and "w0" in node.values[:2]
    }
    assert touched == mine


@pytest.mark.parametrize("share", [0.9, 0.7, 0.5, 0.35])
@pytest.mark.parametrize("name", ["macs", "params"])
def test_a_budget_is_met_within_two_per_cent(found, name, share):
    network, factors = found
    with torch.no_grad():
        for value in factors.factors.values():
            value.copy_(torch.rand(value.shape) + 0.1)
    bound = share * getattr(cost(network.blueprint), name)
    kept = chosen(factors, Budget(**{name: bound}))
    left = getattr(cost(blueprint_of(factors.space, factors.units, kept)), name)
    assert left <= bound
    # One channel of this small network is up to 2 % of it.
    unit = max(getattr(c, name) for key, c in saved(factors.space, factors.units).items() if "block" not in key)
    assert left > 0.98 * bound - unit


def test_an_impossible_budget_and_none_at_all(found):
    network, factors = found
    with pytest.raises(ValueError, match="smallest network that is left"):
        chosen(factors, Budget(macs=10))
    kept = chosen(factors, Budget())
    assert blueprint_of(factors.space, factors.units, kept) == network.blueprint


def test_the_smallest_factors_go_first(found):
    _, factors = found
    with torch.no_grad():
        for unit in factors.units:
            factors.factors[unit.key].copy_(torch.linspace(0.5, 1.0, unit.size))
        wide = next(u for u in factors.units if u.size == 32)
        factors.factors[wide.key][:16] = 0.01
    whole = cost(factors.space.blueprint(factors.space.largest)).macs
    kept = chosen(factors, Budget(macs=0.97 * whole))
    assert not kept[wide.key][:5].any() and kept[wide.key][16:].all()
    assert all(bool(kept[u.key].all()) for u in factors.units if u is not wide)


def trained(penalty, by_cost=True, steps=30):
    torch.manual_seed(0)
    conversion = convert(Mixed().eval(), image=(3, 8, 8))
    network = conversion.supernet.extract(conversion.space.largest)
    from kdnas.teachers import Frozen

    loaded: Data = data()
    taught = Frozen(Cnn().eval(), preprocessing=loaded.preprocessing)
    factors = Factors(conversion.space, penalty=penalty, by_cost=by_cost)
    made = Training(network, factors, loaded, taught, Recipe(steps=steps, batch_size=16, learning_rate=0.01))
    signs = {name: value.detach().sign() for name, value in factors.factors.items()}
    while not made.done:
        made.step()
    return network.eval(), factors, signs


def zeros(factors):
    return sum(int((value == 0).sum()) for value in factors.factors.values())


def test_no_penalty_removes_nothing_and_a_larger_one_never_keeps_more():
    counts, macs = [], []
    for penalty in (0.0, 0.05, 0.2, 1.0):
        network, factors, _ = trained(penalty)
        counts.append(zeros(factors))
        macs.append(cost(removed(network, factors, chosen(factors, Budget())).blueprint).macs)
    assert counts[0] == 0 and macs[0] == cost(network.blueprint).macs
    assert counts == sorted(counts) and counts[-1] > 0
    assert macs == sorted(macs, reverse=True)


def test_costs_move_removal_to_expensive_channels():
    def share(by_cost):
        _, factors, _ = trained(0.15, by_cost)
        prices = saved(factors.space, factors.units)
        channels = [u for u in factors.units if u.width]
        dear = max(channels, key=lambda u: prices[u.key].macs)
        cheap = min(channels, key=lambda u: prices[u.key].macs)
        size = {u: float(factors.factors[u.key].detach().abs().mean()) for u in (dear, cheap)}
        return size[dear] - size[cheap]

    assert share(True) < share(False) - 0.05


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "pruned"
    main(["prune", "tests/toy.py:pruned", "--out", str(folder)])
    return folder


def test_one_command_prunes_retrains_and_puts_the_controls_beside(run, capsys):
    held = Run(run)
    rows = {row["name"]: row for row in held.results()["rows"]}
    assert set(rows) == {"student", "control", "random"}
    _, card = read_student(run / "students" / "student")
    assert card.cost.macs <= 350_000 and card.cost.macs == rows["student"]["macs"]
    assert rows["random"]["macs"] <= rows["student"]["macs"]
    assert (run / "students" / "student" / "student.onnx").exists()
    assert (run / "report.html").exists()
    main(["prune", "tests/toy.py:pruned", "--out", str(run), "--json"])
    assert json.loads(capsys.readouterr().out)["accuracy"] == rows["student"]["accuracy"]


def test_an_interrupted_pruning_ends_as_an_uninterrupted_one(run, tmp_path, monkeypatch):
    from kdnas.jobs import prune as job

    drive, calls = job.drive, []

    def killed(training, phase, draft, around, watch):
        calls.append(phase)
        while training.index < 3:
            training.step()
        from kdnas.checkpoint import save_state

        save_state(draft, {"training": training.state(), "seconds": 0.0})
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "drive", killed)
    with pytest.raises(SystemExit):
        main(["prune", "tests/toy.py:pruned", "--out", str(tmp_path / "again")])
    monkeypatch.setattr(job, "drive", drive)
    main(["prune", "tests/toy.py:pruned", "--out", str(tmp_path / "again")])
    assert calls == ["factors"]
    first, second = (read_student(folder / "students" / "student") for folder in (run, tmp_path / "again"))
    assert first[1].blueprint == second[1].blueprint
    for name, tensor in first[0].state_dict().items():
        assert torch.equal(tensor, second[0].state_dict()[name]), name


def test_settings_that_make_no_sense_are_refused():
    from tests.toy import pruned

    with pytest.raises(ValueError, match="penalty must not be negative"):
        dataclasses.replace(pruned(), penalty=-1.0)
    with pytest.raises(ValueError, match="no channel"):
        Factors(dataclasses.replace(convert(Mixed().eval(), image=(3, 8, 8)).space, stages=()))
