"""Bounds on memory and latency: counts by hand, tables of measured layers, and searches under both."""

import json
import time

import pytest
import torch
from torch import nn

from kdnas.cli.commands import main
from kdnas.costs import latency, portable
from kdnas.costs.budget import Budget, Cost
from kdnas.costs.check import BudgetCheck
from kdnas.costs.count import peak_activations, peak_memory
from kdnas.costs.latency import LatencyTable, threads, timed
from kdnas.network import Network
from kdnas.runs.folder import LATENCIES, RunFolder
from kdnas.settings import Compare, Grow, Prune, Search
from kdnas.space import Blueprint, layer
from kdnas.spaces.toy import Toy
from kdnas.specs import spec

SPACE = Toy()
CPU = torch.device("cpu")


def convolution(inputs, outputs):
    return layer(nn.Conv2d, in_channels=inputs, out_channels=outputs, kernel_size=3, padding=1)


def test_peak_memory_of_a_convolution_is_its_input_and_its_output():
    blueprint = Blueprint(layer(nn.Identity), ((convolution(3, 5), convolution(5, 4)),), layer(nn.Flatten), (3, 8, 8))
    assert peak_memory(blueprint) == 4 * 64 * (5 + 4)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(2))

    def forward(self, x):
        found = self.first(x)
        found = self.second(found)
        return x + found


def test_a_shortcut_keeps_its_input_alive():
    # The input, the first convolution's output and the second's; then the input, the second's output and the sum.
    for device in ("cpu", "meta"):
        with torch.device(device):
            image, made = torch.zeros(1, 4, 8, 8), Residual().eval()
        assert peak_activations(lambda made=made, image=image: made(image), image, made) == 3 * 4 * 4 * 64


def test_views_in_place_operations_and_weights_take_no_memory():
    image, linear = torch.zeros(2, 8), nn.Linear(8, 4, bias=False)
    assert peak_activations(lambda: image @ linear.weight.t(), image, linear) == 4 * (16 + 8)
    assert peak_activations(lambda: image.view(16).relu_(), image, linear) == 4 * 16


def test_what_an_operation_is_told_by_name_counts():
    image = torch.zeros(2, 8)
    assert peak_activations(lambda: torch.ones_like(image, dtype=torch.float64), image, nn.Identity()) == (4 + 8) * 16


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("latency=5ms", Budget(latency=0.005)),
        ("latency=0.25s", Budget(latency=0.25)),
        ("memory=256KiB", Budget(memory=262144)),
        ("memory=1.5MB", Budget(memory=1.5e6)),
        ("macs=600M", Budget(macs=6e8)),
        ("params=2e6", Budget(params=2e6)),
    ],
)
def test_bounds_take_units(text, budget):
    assert Budget.parse([text]).bounds() == pytest.approx(budget.bounds())


@pytest.mark.parametrize(
    "text", ["macs=5ms", "latency=5MB", "latency=fast", "latency=5", "memory=", "memory=inf", "latency=-1ms"]
)
def test_a_bound_that_is_none_says_what_one_is(text):
    name = text.partition("=")[0]
    with pytest.raises(ValueError, match=f"the bound of {name} must be"):
        Budget.parse([text])


def test_what_is_bounded_must_be_measured():
    budget = Budget(latency=0.1)
    assert budget.admits(Cost(1, 1), latency=0.1) and not budget.admits(Cost(1, 1), latency=0.11)
    with pytest.raises(ValueError, match="bound on latency"):
        budget.admits(Cost(1, 1))
    with pytest.raises(ValueError, match="needs a latency table"):
        BudgetCheck(SPACE, budget)


@pytest.fixture
def clock(monkeypatch):
    """Time that passes by a layer's parameters: 1 ms for each, twice that while the machine is slow."""
    now = {"seconds": 0.0, "slow": 1.0}
    for name in ("perf_counter", "thread_time"):
        monkeypatch.setattr(time, name, lambda: now["seconds"])

    def passes(module, *_):
        now["seconds"] += 1e-3 * now["slow"] * sum(p.numel() for p in module.parameters(recurse=False))

    registered = nn.modules.module.register_module_forward_hook(passes)
    yield now
    registered.remove()


def test_a_network_takes_the_sum_of_its_layers_and_each_is_measured_once(clock):
    rows = []
    table = LatencyTable(CPU, write=rows.append, repeats=2)
    blueprint = SPACE.blueprint(SPACE.largest)
    params = sum(p.numel() for p in Network(blueprint).parameters())
    assert table.seconds(blueprint) == pytest.approx(1e-3 * params)
    measured = len(rows)
    assert table.seconds(blueprint) == pytest.approx(1e-3 * params) and len(rows) == measured
    again = LatencyTable(CPU, json.loads(json.dumps(rows)), write=rows.append, repeats=2)
    assert again.seconds(blueprint) == table.seconds(blueprint) and len(rows) == measured


def test_a_machine_that_slows_down_meanwhile_changes_nothing(clock):
    table = LatencyTable(CPU, repeats=2)
    clock["slow"] = 2.0
    blueprint = SPACE.blueprint(SPACE.largest)
    params = sum(p.numel() for p in Network(blueprint).parameters())
    assert table.seconds(blueprint) == pytest.approx(1e-3 * params)
    assert table.drift() == pytest.approx(1.0)


def test_calls_that_were_disturbed_change_nothing(clock, monkeypatch):
    table = LatencyTable(CPU, repeats=9)
    calls = []

    def times(call, repeats=None):
        calls.append(call)
        clock["slow"] = 5.0 if len(calls) % 8 < 3 else 1.0  # now a reference, now a layer
        return LatencyTable._times(table, call, repeats)

    monkeypatch.setattr(table, "_times", times)
    blueprint = SPACE.blueprint(SPACE.largest)
    params = sum(p.numel() for p in Network(blueprint).parameters())
    assert table.seconds(blueprint) == pytest.approx(1e-3 * params)


def test_a_whole_network_is_measured_once_and_stored(clock):
    rows = []
    table = LatencyTable(CPU, write=rows.append, repeats=2)
    blueprint = SPACE.blueprint(SPACE.largest)
    first, written = table.measured(blueprint), len(rows)
    assert first == pytest.approx(table.whole(blueprint))
    clock["slow"] = 7.0
    again = LatencyTable(CPU, json.loads(json.dumps(rows)), write=rows.append, repeats=2)
    assert table.measured(blueprint) == again.measured(blueprint) == first and len(rows) == written
    assert again.measured(SPACE.blueprint(SPACE.smallest)) < first


def test_whole_networks_may_be_timed_beside_one_of_them(clock):
    rows, source, small = [], SPACE.blueprint(SPACE.largest), SPACE.blueprint(SPACE.smallest)
    table = LatencyTable(CPU, write=rows.append, repeats=2, beside=source)
    seconds = [1e-3 * sum(p.numel() for p in Network(blueprint).parameters()) for blueprint in (source, small)]
    assert [table.measured(blueprint) for blueprint in (source, small)] == pytest.approx(seconds)
    clock["slow"] = 3.0
    assert table.whole(small) == pytest.approx(seconds[1])
    written = len(rows)
    again = LatencyTable(CPU, json.loads(json.dumps(rows)), write=rows.append, repeats=2, beside=source)
    again._reference = None  # the convolution is not asked again
    assert again.whole(small) == pytest.approx(seconds[1]) and len(rows) == written


def test_the_scale_is_fitted_to_whole_networks_once(clock, monkeypatch):
    rows = []
    table = LatencyTable(CPU, write=rows.append, repeats=2)
    blueprints = [SPACE.blueprint(a) for a in (SPACE.smallest, SPACE.largest)]
    plain = table.seconds(blueprints[0])
    monkeypatch.setattr(table, "whole", lambda blueprint: 0.7 * table.seconds(blueprint))
    table.calibrate(blueprints)
    assert (
        table.offset == 0
        and table.scale == pytest.approx(0.7)
        and table.seconds(blueprints[0]) == pytest.approx(0.7 * plain)
    )
    table.calibrate(blueprints)
    assert table.scale == pytest.approx(0.7)
    assert LatencyTable(CPU, rows).scale == table.scale


def test_rows_of_another_machine_are_refused(clock):
    rows = []
    LatencyTable(CPU, write=rows.append, repeats=1)
    with pytest.raises(ValueError, match="7 threads"):
        LatencyTable(CPU, [{**rows[0], "threads": 7}])
    with pytest.raises(ValueError, match="damaged"):
        LatencyTable(CPU, [*rows, {"layer": "x"}])


def test_the_meter_asks_the_table_only_where_latency_is_bounded():
    def asked():
        raise AssertionError("no latency is bounded")

    meter = BudgetCheck(SPACE, Budget(memory=1e9, macs=1e9), asked)
    assert meter.admits(SPACE.largest)
    assert meter.measured(SPACE.largest) == {"memory": peak_memory(SPACE.blueprint(SPACE.largest))}
    assert not BudgetCheck(SPACE, Budget(memory=peak_memory(SPACE.blueprint(SPACE.largest)) - 1)).admits(SPACE.largest)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "trained"
    main(["train", "tests/toy.py", "--out", str(folder)])
    return folder


def bounded(folder, *more):
    """A search of few evaluations under bounds between the smallest and the largest network's."""
    memory = [peak_memory(SPACE.blueprint(a)) for a in (SPACE.smallest, SPACE.largest)]
    budget = ["--budget", f"memory={sum(memory) / 2}B", "--budget", "latency=50ms"]
    main(["search", str(folder), *budget, "--num-evaluations", "5", *more])


def test_a_search_keeps_both_bounds_and_measures_the_first_places_again(trained, capsys):
    bounded(trained)
    said = capsys.readouterr().out
    run = RunFolder(trained)
    bounds = run.phase("search")["budget"]
    entries = run.ranking(run.phase("search")["search"])
    assert bounds["latency"] == 0.05 and len(entries) >= 5
    for entry in entries:
        assert entry.spent["memory"] == peak_memory(SPACE.blueprint(entry.architecture)) <= bounds["memory"]
        assert 0 < entry.spent["latency"] <= 0.05
    assert any(peak_memory(SPACE.blueprint(a)) > bounds["memory"] for a in SPACE.all())
    again = run.results()["controls"]["latency"]
    assert len(again["seconds"]) == min(5, len([e for e in entries if not e.is_control]))
    assert "measured whole" in said and "bytes" in said and " ms" in said
    measured = [row for row in run.lines(LATENCIES) if "layer" in row]
    assert measured
    bounded(trained)
    assert [row for row in run.lines(LATENCIES) if "layer" in row][: len(measured)] == measured


def test_a_latency_that_no_network_has_names_the_nearest(trained):
    with pytest.raises(SystemExit):
        main(["search", str(trained), "--budget", "latency=1us"])


def test_places_that_are_slower_than_promised_are_named(trained, monkeypatch):
    monkeypatch.setattr(LatencyTable, "whole", lambda table, blueprint: 1.0)
    bounded(trained, "--searcher", "random_search")
    said = RunFolder(trained).results()["controls"]["latency"]["sentence"]
    assert "Over the bound as measured: place 1" in said


def test_jobs_that_cannot_bound_it_say_so(trained):
    with pytest.raises(ValueError, match="an exact search bounds params and macs, got a bound on memory"):
        Search(exact=True, budget=Budget(memory=1e6))
    with pytest.raises(ValueError, match="a growing ensemble bounds"):
        Grow(space=SPACE, data=spec("tests.toy:data"), budget=Budget(latency=1.0))
    with pytest.raises(ValueError, match="a pruning bounds"):
        Prune(data=spec("tests.toy:data"), budget=Budget(memory=1e6))
    with pytest.raises(ValueError, match="a comparison bounds params and macs and memory"):
        Compare(data=spec("tests.toy:data"), space=SPACE, budget=Budget(latency=1.0))


@pytest.mark.parametrize(("key", "value"), [("seconds", 1e-9), ("seconds", "1"), ("layer", "other")])
def test_a_row_that_was_changed_is_refused(key, value):
    rows = []
    table = LatencyTable(torch.device("cpu"), write=rows.append, repeats=1)
    table.calibrate([SPACE.blueprint(SPACE.smallest)])
    rows = [portable.signed(row) for row in rows]  # as format 1 has them
    changed = [row | {key: value} if key in row else row for row in rows]
    assert LatencyTable(torch.device("cpu"), rows, repeats=1).layers == table.layers
    with pytest.raises(ValueError, match="a row of the latency table is damaged"):
        LatencyTable(torch.device("cpu"), changed, repeats=1)


class Layered(nn.Module):
    """A module whose forward is one code for all widths."""

    def __init__(self, width):
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, x):
        return self.layer(x)


def test_every_module_is_compiled_however_many_of_one_class_there_are(monkeypatch):
    graphs, compile_ = [], torch.compile

    def counting(graph, _):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda module, dynamic: compile_(module, dynamic=dynamic, backend=counting))
    torch._dynamo.reset()
    calls = [latency.runner("compile", Layered(width), (torch.zeros(1, width),), 1) for width in range(1, 12)]
    assert len(graphs) == 11
    with torch.no_grad():
        assert [call().shape[1] for call in calls] == list(range(1, 12)) and len(graphs) == 11
    entries = [{"shapes": [[1, width]], "module": place} for place, width in enumerate(range(1, 12))]
    modules = [lambda width=width: Layered(width) for width in range(1, 12)]
    for entry in entries:
        portable.call_of_module(entry, modules, compiles=True)()
    assert len(graphs) == 22


@pytest.mark.parametrize(("number", "counts"), [(1, False), (2, True)])
def test_time_without_the_core_counts_only_where_several_threads_compute(number, counts):
    with threads(number):
        seconds = timed(lambda: time.sleep(0.02), CPU, 3)
    assert all((each > 0.015) == counts for each in seconds)
