"""Bounds on other runtimes and on the shipped file, tables from other devices."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kdnas.costs.latency
import kdnas.runtimes
from kdnas.cli.commands import main
from kdnas.costs.budget import Budget
from kdnas.costs.check import BudgetCheck
from kdnas.costs.elsewhere import adopt
from kdnas.costs.latency import LatencyTable, NotMeasured, calibration_networks, linear_fit
from kdnas.costs.portable import signed
from kdnas.costs.size import shipped_bytes, weights_bytes
from kdnas.costs.target import Target
from kdnas.jobs._arguments import as_budget
from kdnas.jobs.latency import write_measuring_script
from kdnas.network import Network
from kdnas.runs.checkpoint import save_tensors
from kdnas.space import layer
from kdnas.spaces.toy import Toy
from kdnas.students.folder import add_forms, write_student
from tests.alone import run_alone
from tests.students.test_folder import card_of, trained

SPACE = Toy()
CPU = torch.device("cpu")


@given(
    st.sampled_from(["eager", "compile", "onnxruntime", "executorch"]),
    st.integers(0, 1024),
    st.integers(1, 65536),
    st.sampled_from(["", "0123456789abcdef"]),
    st.floats(1e-9, 1e9),
    st.sampled_from(["fp32", "int8"]),
)
def test_a_budget_is_read_as_it_was_written(runtime, threads, batch, table, bound, form):
    target = Target(runtime, threads, batch, table)
    assert Target.parse(str(target)) == target
    budget = Budget(latency=f"{bound!r}s@{target}", size=f"{bound!r}B@{form}", macs="25%")
    assert (budget.target, budget.latency, budget.size, budget.format) == (target, bound, bound, form)
    assert Budget.from_json(json.loads(json.dumps(budget.to_json()))) == budget
    numbers = budget.of({"macs": 8.0})
    assert (numbers.target, numbers.format, numbers.macs) == (target, form, 2.0)


def test_what_is_bounded_on_what_is_printed():
    text = str(Budget.parse(["latency=5ms@onnxruntime,threads=2,batch=8", "size=2MB@int8"]))
    assert text == "latency <= 5 ms on onnxruntime (2 threads, batch 8), size <= 2,000,000 bytes in int8"
    assert str(Budget(latency="5ms")) == "latency <= 5 ms" and "size" not in Budget(latency="5ms").to_json()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("latency=5ms@tpu", "must be eager, compile, onnxruntime or executorch, got 'tpu'"),
        ("latency=5ms@compil", "Did you mean 'compile'"),
        ("latency=5ms@eager,threads=x", "`threads` of a target must be from 0 to 1024, got 'x'"),
        ("latency=5ms@eager,batch=0", "`batch` of a target must be from 1 to 65536, got 0"),
        ("latency=5ms@eager,macs=5M", "got 'macs=5M'. Write another bound by itself"),
        ("latency=5ms@eager,table=../x", "digest of 16 hexadecimal digits"),
        ("latency=5ms@", "must name something after @"),
        ("size=2MB@int4", "a size is that of fp32 or int8, got 'int4'"),
        ("size=0", "the bound of size must be positive"),
        ("macs=5@int8", "the bound of macs must be a number"),
    ],
)
def test_a_target_that_is_none_is_refused(text, message):
    with pytest.raises(ValueError) as error:
        Budget.parse([text])
    assert message in str(error.value)


@given(st.floats(0, 1e-3), st.floats(0.1, 3), st.lists(st.floats(1e-4, 1e-1), min_size=3, max_size=9, unique=True))
def test_a_linear_fit_finds_offset_and_scale(offset, scale, sums):
    found_offset, found_scale = linear_fit(sums, [offset + scale * value for value in sums])
    predicted = [found_offset + found_scale * value for value in sums]
    assert found_offset >= 0 and found_scale > 0
    if max(sums) > 1.5 * min(sums):
        assert predicted == pytest.approx([offset + scale * value for value in sums], rel=1e-3)


@pytest.fixture
def fake(monkeypatch):
    """A runtime whose calls take 5 ms, and 1 ms more for each parameter."""
    now = [0.0]
    for name in ("perf_counter", "thread_time"):
        monkeypatch.setattr(f"time.{name}", lambda: now[0])

    def runner(runtime, module, inputs, threads):
        seconds = 5e-3 + 1e-3 * len(inputs[0]) * sum(p.numel() for p in module.parameters())
        return lambda: now.__setitem__(0, now[0] + seconds)

    hook = torch.nn.modules.module.register_module_forward_hook(lambda *_: now.__setitem__(0, now[0] + 1e-3))
    monkeypatch.setattr(kdnas.costs.latency, "runner", runner)
    monkeypatch.setattr(kdnas.costs.latency, "check_runtime", lambda target: None)
    yield
    hook.remove()


def test_the_call_itself_counts_once_and_rows_are_of_their_target(fake):
    rows = []
    target = Target("onnxruntime", threads=1, batch=2)
    table = LatencyTable(CPU, write=rows.append, repeats=1, target=target)
    table.calibrate([SPACE.blueprint(a) for a in calibration_networks(SPACE)])
    assert table.call == pytest.approx(5e-3)
    for architecture in SPACE.all():
        blueprint = SPACE.blueprint(architecture)
        params = sum(p.numel() for p in Network(blueprint).parameters())
        assert table.seconds(blueprint) == pytest.approx(5e-3 + 2e-3 * params)
    assert all(row["target"] == "onnxruntime,threads=1,batch=2" for row in rows)
    again = LatencyTable(CPU, json.loads(json.dumps(rows)), repeats=1, target=target)
    assert (again.layers, again.offset, again.scale) == (table.layers, table.offset, table.scale)
    assert not LatencyTable(CPU, rows, repeats=1, target=Target("compile")).layers
    assert not LatencyTable(CPU, rows, repeats=1).layers


@pytest.mark.parametrize("runtime", ["compile", "onnxruntime"])
def test_the_call_that_is_subtracted_runs_a_kernel_where_programs_without_one_are_left_out(monkeypatch, runtime):
    modules = []
    monkeypatch.setattr(LatencyTable, "_measure", lambda table, module, shape: modules.append((module, shape)) or 1e-3)
    LatencyTable(CPU, repeats=1, target=Target(runtime)).sum(SPACE.blueprint(SPACE.smallest))
    module, (shape,) = modules[0]
    assert any(module.parameters()) == (runtime == "compile") and module(torch.ones(shape)).shape == shape


def test_a_runtime_that_is_not_installed_is_said_before_anything_is_measured(monkeypatch):
    monkeypatch.setattr(kdnas.runtimes, "_is_installed", lambda module: False)
    with pytest.raises(ValueError, match=r"latency on onnxruntime needs the extra 'onnx'.*kdnas\[onnx\]"):
        LatencyTable(CPU, target=Target("onnxruntime"))
    with pytest.raises(ValueError, match=r"kdnas\[onnx\]"):
        BudgetCheck(SPACE, Budget(size="2MB@int8"))


def test_the_runtimes_compute_what_the_module_does():
    module, image = torch.nn.Linear(3, 2).eval(), torch.rand(2, 3)
    for runtime in ("eager", "onnxruntime"):
        with torch.no_grad():
            assert torch.allclose(kdnas.costs.latency.runner(runtime, module, (image,), 1)(), module(image), atol=1e-6)


def test_the_size_of_weights_is_exact(tmp_path):
    for architecture in (SPACE.smallest, SPACE.largest):
        blueprint = SPACE.blueprint(architecture)
        save_tensors(tmp_path / "weights", Network(blueprint).state_dict(), "0" * 32)
        assert (tmp_path / "weights").stat().st_size == weights_bytes(blueprint)


def test_the_size_is_that_of_the_written_student_and_bounds_it(tmp_path):
    blueprint = SPACE.blueprint(SPACE.smallest)
    write_student(tmp_path / "a", trained(blueprint), card_of(blueprint, architecture=SPACE.smallest), forms=())
    size = (tmp_path / "a" / "weights.safetensors").stat().st_size
    assert size == shipped_bytes(blueprint, "fp32")
    check = BudgetCheck(SPACE, Budget(size=size))
    assert check.admits(SPACE.smallest) and not check.admits(SPACE.largest)
    assert check.measured(SPACE.smallest) == {"size": size} and "bytes" in check.describe(SPACE.smallest)
    assert not BudgetCheck(SPACE, Budget(size=size - 1)).admits(SPACE.smallest)


@pytest.mark.slow
def test_the_size_in_integers_is_that_of_the_written_graph(tmp_path):
    from kdnas.data.builtin import digits

    data = digits()
    space = SPACE.fitted(classes=10, image_channels=1)
    blueprint = space.blueprint(space.largest)
    from kdnas.students.card import Card

    card = Card.of(trained(blueprint), data, {})
    write_student(tmp_path / "a", trained(blueprint), card, forms=())
    record = add_forms(tmp_path / "a", tmp_path / "a", ("int8",), data=data)["int8"]
    if "problem" not in record:  # an untrained network may lose accuracy
        assert record["bytes"] == pytest.approx(shipped_bytes(blueprint, "int8"), abs=8)


def table_file(path, target="eager,threads=1", seconds=1e-3):
    """A table of all layers of the space, as the script writes it."""
    script = path.with_suffix(".py")
    write_measuring_script(SPACE, script, Target.parse(target), 5)
    names = {"__name__": "script", "__file__": str(script)}
    exec(script.read_text(), names)
    names["LEAST_CALLS"] = names["ROUNDS"] = 1
    names["SECONDS"] = 0.0
    names["main"](json.loads(names["PAYLOAD"]), [str(path)], names["MODULES"])
    return json.loads(path.read_text())


def test_a_table_from_elsewhere_predicts_every_network_and_measures_none(tmp_path, capsys):
    content = table_file(tmp_path / "table.json")
    target = adopt(tmp_path / "table.json")
    assert (target.runtime, target.threads, target.batch) == ("eager", 1, 1) and len(target.table) == 16
    rows = []
    table = LatencyTable(CPU, write=rows.append, target=target)
    assert all(table.seconds(SPACE.blueprint(a)) > 0 for a in SPACE.all())
    stored = LatencyTable(CPU, json.loads(json.dumps(rows)), target=target)
    assert stored.layers == table.layers == {r["layer"]: r["seconds"] for r in content["layers"]}
    with pytest.raises(NotMeasured, match="has no layer"):
        table._layer(layer(torch.nn.Identity), ((1, 2),))
    with pytest.raises(ValueError, match=r"is not known here\. Give it again with --latency-table FILE"):
        LatencyTable(CPU, target=Target("eager", table="0" * 16))


def test_a_network_with_a_layer_that_was_not_measured_is_left_out_with_a_warning(tmp_path, log):
    content = table_file(tmp_path / "table.json")
    known = {key for network in content["networks"] for key in network["layers"]}
    content["layers"] = [row for row in content["layers"] if row["layer"] in known][:-1]
    lacking = {row["layer"] for row in content["layers"]}
    content["networks"] = [n for n in content["networks"] if set(n["layers"]) <= lacking]
    (tmp_path / "table.json").write_text(json.dumps(signed({k: v for k, v in content.items() if k != "checksum"})))
    budget = as_budget("latency=1s", tmp_path / "table.json")
    check = BudgetCheck(SPACE, budget, lambda: LatencyTable(CPU, target=budget.target))
    admitted = [check.admits(architecture) for architecture in SPACE.all()]
    assert any(admitted) and not all(admitted)
    assert log.text.count("Networks with such layers are left out") == 1


def broken(content):
    """Ways to damage a table."""
    first = content["layers"][0]
    yield "", "cannot be read"
    yield [], "holds no JSON object"
    yield content | {"target": "tpu"}, "runtime of a latency"
    yield content | {"layers": []}, "must have layers and networks"
    yield content | {"layers": [first | {"seconds": first["seconds"] * 2}]}, "checksum"
    yield content | {"layers": [signed({"layer": first["layer"], "seconds": -1.0})]}, "has -1.0 seconds"
    yield content | {"layers": [signed({"layer": first["layer"], "seconds": 0.0})]}, "has 0.0 seconds"
    yield content | {"layers": content["layers"][:1]}, "has a network of a layer that it lacks"
    yield content | {"layers": [first | {"seconds": "1"}]}, "must be"
    yield content | {"threads": "many"}, "'threads' must be"
    yield content | {"threads": 2}, "its checksum is another"
    yield {k: v for k, v in content.items() if k != "call"}, "has no 'call'"
    yield content | {"format": 99}, "newer version"


def test_a_damaged_table_is_one_sentence(tmp_path):
    path = tmp_path / "table.json"
    content = table_file(path)
    for damaged, message in broken(content):
        path.write_text(damaged if isinstance(damaged, str) else json.dumps(damaged))
        with pytest.raises(ValueError) as error:
            adopt(path)
        assert message in str(error.value), (message, str(error.value))
    with pytest.raises(ValueError, match="there is no latency table"):
        adopt(tmp_path / "none.json")
    path.write_text(json.dumps(content))
    for budget in ("macs=5M", "latency=5ms@compile"):
        with pytest.raises(ValueError, match="`latency_table` is for a bound on latency without a target"):
            as_budget(budget, path)


def test_a_run_within_a_table_from_elsewhere(tmp_path, capsys):
    space = "toy"
    main(
        [
            "latency",
            space,
            "--write-script",
            str(tmp_path / "m.py"),
            "--target",
            "eager",
            "--classes",
            "10",
            "--channels",
            "1",
        ]
    )
    text = (tmp_path / "m.py").read_text().replace("SECONDS = 0.2", "SECONDS = 0.0")
    names = {"__name__": "script", "__file__": "m.py"}
    exec(text, names)
    names["main"](json.loads(names["PAYLOAD"]), [str(tmp_path / "t.json")], names["MODULES"])
    options = "--data digits --scorer params --steps 1 --batch-size 8 --num-evaluations 4 --finalists 1 --no-deploy"
    bounds = ["--budget", "latency=1s", "--latency-table", str(tmp_path / "t.json")]
    command = ["run", "--space", space, *options.split(), *bounds, "--out", str(tmp_path / "run")]
    main(command)
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    assert "@eager,threads=1,table=" in manifest["job"]["search"]["budget"]["latency"]
    kdnas.costs.latency._ADOPTED.clear()  # another process has the run's own rows
    main(["search", str(tmp_path / "run"), "--num-evaluations", "3"])
    assert "predicted by a table of another device" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "target", "message"), [("m.txt", "eager", ".py file"), ("m.py", "executorch", "executorch")]
)
def test_a_script_that_cannot_be_written_says_why(tmp_path, name, target, message):
    with pytest.raises(ValueError, match=message):
        write_measuring_script(SPACE, tmp_path / name, Target(target), 5)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "distribution"), [("eager,threads=1", "torch"), ("onnxruntime,threads=1", "onnxruntime")]
)
def test_the_script_runs_where_only_its_runtime_is_installed(tmp_path, target, distribution):
    write_measuring_script(Toy(depths=(1,), num_stages=1), tmp_path / "m.py", Target.parse(target), 3)
    text = (tmp_path / "m.py").read_text().replace("SECONDS = 0.2", "SECONDS = 0.0")
    said = run_alone(distribution, text, "table.json", folder=tmp_path)
    adopted = adopt(tmp_path / "table.json")
    assert "wrote table.json" in said and f"{adopted.runtime},threads={adopted.threads}" == target


@pytest.mark.real
@pytest.mark.filterwarnings("ignore")
def test_executorch_and_compile_are_measured():
    blueprint = SPACE.blueprint(SPACE.smallest)
    for runtime in ("executorch", "compile"):
        table = LatencyTable(CPU, repeats=2, target=Target(runtime, threads=1))
        assert table.seconds(blueprint) > 0 and table.whole(blueprint) > 0
