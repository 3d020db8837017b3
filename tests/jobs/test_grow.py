"""AdaNAS: who teaches whom, who stays as it is, and what the ensemble computes."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
import torch

import kdnas.jobs.grow as growth
from kdnas.cli.commands import main
from kdnas.costs.budget import Budget
from kdnas.costs.count import cost
from kdnas.distillers.from_labels import FromLabels
from kdnas.distillers.from_teacher import FromTeacher
from kdnas.jobs._arguments import load_settings
from kdnas.jobs._mixture import fitted_weights, mixture, mixture_blueprint
from kdnas.jobs.grow import Member, SubnetEnsemble, grow, next_larger, teacher_of
from kdnas.network import Network
from kdnas.randomness import initialised, torch_rng
from kdnas.runs.folder import RunFolder
from kdnas.settings import Grow, Recipe
from kdnas.specs import spec
from kdnas.students.folder import read_student
from kdnas.students.source import load_source
from kdnas.tables import load_space
from tests.toy import data

ROOT = Path(__file__).parents[2]
SPACE = dataclasses.replace(load_space("toy"), classes=3)
DATA = data()
IMAGE = (3, 8, 8)
SETTINGS = Grow(
    space=load_space("toy"),
    data=spec("tests.toy:data"),
    recipe=Recipe(steps=4, batch_size=16, learning_rate=0.05),
    controls=False,
)


@pytest.fixture(autouse=True)
def no_graph(monkeypatch):
    """The ONNX graph takes seconds, and has a test of its own."""
    monkeypatch.setattr("kdnas.students.forms.graph_of", lambda *_: b"")
    monkeypatch.setattr("kdnas.students.forms.load_graph", lambda path: load_source(path.parent))


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grow") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kdnas.students.forms.graph_of", lambda *_: b"")
        patch.setattr("kdnas.students.forms.load_graph", lambda path: load_source(path.parent))
        return folder, grow(SETTINGS, folder)


def members(count=3):
    architectures = [SPACE.smallest, SPACE.largest, next_larger(SPACE, SPACE.smallest, "depth")][:count]
    made = [initialised(lambda a=a: Network(SPACE.blueprint(a)), k).eval() for k, a in enumerate(architectures)]
    return [Member(a, n, cost(n.blueprint)) for a, n in zip(architectures, made, strict=True)]


def ensemble(count=3):
    return SubnetEnsemble(tuple(members(count)), torch.full((count,), 1 / count), 0.0, 0.0)


def test_equal_weights_are_the_mean_of_the_logits_and_others_a_weighted_sum():
    held, images = members(), torch.rand(5, *IMAGE)
    logits = torch.stack([m.network(images).logits for m in held])
    equal = mixture([m.network for m in held], torch.full((3,), 1 / 3), IMAGE)
    torch.testing.assert_close(equal(images).logits, logits.mean(0))
    weighted = mixture([m.network for m in held], torch.tensor([0.5, 0.2, 0.3]), IMAGE)
    torch.testing.assert_close(weighted(images).logits, 0.5 * logits[0] + 0.2 * logits[1] + 0.3 * logits[2])
    fresh = Network(mixture_blueprint([m.network.blueprint for m in held], IMAGE))
    torch.testing.assert_close(fresh.head.weights.detach(), torch.full((3,), 1 / 3))


def test_an_ensemble_costs_its_members_and_the_weights():
    held = members()
    blueprint = mixture_blueprint([m.network.blueprint for m in held], IMAGE)
    total = cost(blueprint)
    assert total.params == sum(m.cost.params for m in held) + 3
    assert total.macs == sum(m.cost.macs for m in held)
    assert type(blueprint).from_json(json.loads(json.dumps(blueprint.to_json()))) == blueprint


def test_members_of_several_resolutions_resize_the_images_for_themselves():
    space = dataclasses.replace(SPACE, resolutions=(6, 8))
    smallest, largest = (Network(space.blueprint(a)).eval() for a in (space.smallest, space.largest))
    images = torch.rand(2, *IMAGE)
    both = mixture([smallest, largest], torch.tensor([1.0, 0.0]), IMAGE)
    torch.testing.assert_close(both(images).logits, smallest(images).logits)


def test_the_first_member_has_no_teacher_and_later_ones_the_ensemble_or_the_last():
    images = torch.rand(4, *IMAGE)
    held = ensemble()
    assert all(
        teacher_of(how, SubnetEnsemble((), torch.zeros(0), 0.0, 0.0), DATA) is None for how in ("ensemble", "last")
    )
    assert teacher_of("none", held, DATA) is None
    logits = torch.stack([m.network(DATA.normalise(images)).logits for m in held.members])
    torch.testing.assert_close(teacher_of("ensemble", held, DATA)(images).logits, logits.mean(0))
    torch.testing.assert_close(teacher_of("last", held, DATA)(images).logits, logits[-1])
    assert not torch.allclose(logits.mean(0), logits[-1])


def test_what_a_candidate_minimises(tmp_path, monkeypatch):
    seen, begun = [], []

    class Watched(growth.Training):
        def __init__(self, network, distiller, data, teacher, recipe, *rest):
            seen.append((distiller, teacher, recipe.seed))
            begun.append({name: tensor.clone() for name, tensor in network.state_dict().items()})
            super().__init__(network, distiller, data, teacher, recipe, *rest)

    monkeypatch.setattr(growth, "Training", Watched)
    grow(dataclasses.replace(SETTINGS, num_members=2, generator="simple"), tmp_path / "run")
    (first, nobody, seed), (second, teacher, another) = seen
    assert (seed, another) == (0, 1)  # equal architectures begin from other weights and see other batches
    assert not torch.equal(*(state["head.linear.weight"] for state in begun))
    assert isinstance(first, FromLabels) and first.label_smoothing == 0.1 and nobody is None
    assert isinstance(second, FromTeacher) and teacher is not None
    network = members(1)[0].network
    images, labels = torch.rand(4, *IMAGE), torch.tensor([0, 1, 2, 0])
    student, taught = network(images), teacher(images)
    second.prepare(network, type("Batch", (), {"images": images, "teacher": taught}))
    found, _ = second.objective(student, taught, labels)
    task = torch.nn.functional.cross_entropy(student.logits, labels, label_smoothing=0.1)
    soft = -(taught.logits.softmax(1) * student.logits.log_softmax(1)).sum(1).mean()
    assert found.item() == pytest.approx((task + soft).item(), rel=1e-6)


def test_frozen_members_are_bit_identical_in_the_finished_ensemble(grown):
    folder, found = grown
    network, card = read_student(folder / "student")
    assert found["members"] == card.origin["members"] and len(found["members"]) == 3
    written = {p.name: read_student(p) for p in (folder / "members").iterdir()}
    for index, code in enumerate(found["members"]):
        one = next(
            n
            for name, (n, c) in written.items()
            if name.startswith(f"grown-{index + 1}.") and SPACE.code(c.architecture) == code
        )
        own = [t for m in (one.stem, *(m for s in one.stages for m in s), one.head) for t in m.state_dict().values()]
        inside = list(network.stem.members[index].state_dict().values())
        assert len(own) == len(inside) and all(torch.equal(a, b) for a, b in zip(own, inside, strict=True))


def test_members_written_once_are_never_written_again(tmp_path):
    grow(dataclasses.replace(SETTINGS, num_members=1), tmp_path / "run")
    first = tmp_path / "run" / "members" / "grown-1.1" / "weights.safetensors"
    before = (first.read_bytes(), first.stat().st_mtime_ns)
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    manifest["job"]["grow"]["num_members"] = 2
    (tmp_path / "run" / "run.json").write_text(json.dumps(manifest | {"format": 1}))
    Path(tmp_path / "run" / "student").rename(tmp_path / "first")
    grow(dataclasses.replace(SETTINGS, num_members=2), tmp_path / "run")
    assert (first.read_bytes(), first.stat().st_mtime_ns) == before


def test_the_candidate_that_stays_is_the_one_with_which_the_ensemble_is_best(grown):
    folder, found = grown
    part, held = DATA.search, []
    images = DATA.normalise(part.take(torch.arange(len(part))))
    for number in range(1, 4):
        losses = {}
        for path in sorted((folder / "members").glob(f"grown-{number}.*")):
            network, card = read_student(path)
            logits = torch.stack([*held, network(images).logits.detach()]).mean(0)
            losses[SPACE.code(card.architecture)] = (
                torch.nn.functional.cross_entropy(logits, part.labels).item(),
                network,
            )
        assert len(losses) == (1, 2, 1)[number - 1]  # the last one was the deepest already
        best = min(losses, key=lambda code: losses[code][0])
        assert best == found["members"][number - 1]
        held.append(losses[best][1](images).logits.detach())


def test_a_candidate_that_completes_the_ensemble_stays_rather_than_a_better_one_that_repeats_it(tmp_path, monkeypatch):
    part = DATA.search
    said = torch.nn.functional.one_hot(part.labels, 3).float()
    even = (torch.arange(len(part)) % 2 == 0)[:, None]
    # The first member knows even images; the deeper candidate the same ones better, the wider one the others.
    known = iter([3.0 * said * even, 3.5 * said * even, 2.5 * said * ~even])
    logits = {}

    def trained(self, name, architecture, number, teacher, steps=0):
        network = Network(SPACE.blueprint(architecture))
        logits[network] = next(known)
        return Member(architecture, network, cost(network.blueprint)), 0.0

    monkeypatch.setattr(growth._Growth, "train_member", trained)
    monkeypatch.setattr(growth, "_logits", lambda network, *_: logits[network])
    settings = dataclasses.replace(SETTINGS, num_members=2)
    job = growth._Growth(settings, RunFolder.create(tmp_path / "run", settings.to_json(), 0), DATA)
    members = job.grow("grown", settings).members
    _, deeper, wider = (torch.nn.functional.cross_entropy(z, part.labels) for z in logits.values())
    assert deeper < wider
    assert [m.architecture for m in members] == [SPACE.smallest, next_larger(SPACE, SPACE.smallest, "width")]


def test_dynamic_candidates_are_the_last_member_made_deeper_and_wider():
    depths, widths = next_larger(SPACE, SPACE.smallest, "depth"), next_larger(SPACE, SPACE.smallest, "width")
    assert depths["stage0.depth"] == SPACE.smallest["stage0.depth"] + 1
    assert depths["stage0.layer0.width"] == SPACE.smallest["stage0.layer0.width"]
    assert widths["stage0.depth"] == SPACE.smallest["stage0.depth"]
    assert widths["stage0.layer0.width"] > SPACE.smallest["stage0.layer0.width"]
    assert next_larger(SPACE, SPACE.largest, "depth") == SPACE.largest
    with pytest.raises(ValueError, match="no choice named depth"):
        next_larger(load_space("nas_bench_macro"), load_space("nas_bench_macro").smallest, "depth")


def loss_of(weights, logits, labels):
    return torch.nn.functional.cross_entropy(torch.einsum("k,kbc->bc", weights.double(), logits), labels).item()


def test_fitted_weights_never_raise_the_loss_they_are_fitted_by_above_that_of_equal_weights():
    for seed in range(20):
        generator = torch_rng("weights", seed)
        logits = 3 * torch.randn(4, 30, 3, generator=generator, dtype=torch.float64)
        labels = torch.randint(3, (30,), generator=generator)
        weights = fitted_weights(logits, labels)
        assert (weights >= 0).all() and weights.sum().item() == pytest.approx(1, abs=1e-6)
        assert loss_of(weights, logits, labels) <= loss_of(torch.full((4,), 0.25), logits, labels)


def test_fitted_weights_are_the_least_of_a_convex_problem():
    generator = torch_rng("convex")
    labels = torch.randint(3, (60,), generator=generator)
    logits = torch.randn(3, 60, 3, generator=generator, dtype=torch.float64)
    logits = logits + torch.tensor([0.8, 1.2, 0.3])[:, None, None] * torch.nn.functional.one_hot(labels, 3)

    def value(w):
        return loss_of(torch.from_numpy(w), logits, labels)

    simplex = {"type": "eq", "fun": lambda w: w.sum() - 1}
    best = scipy.optimize.minimize(value, np.full(3, 1 / 3), bounds=[(0, 1)] * 3, constraints=[simplex])
    assert loss_of(fitted_weights(logits, labels), logits, labels) == pytest.approx(best.fun, abs=1e-5)


def test_fitting_is_indifferent_between_equal_members_and_survives_extremes():
    logits, labels = torch.randn(1, 20, 3).repeat(3, 1, 1), torch.arange(20) % 3
    torch.testing.assert_close(fitted_weights(logits, labels), torch.full((3,), 1 / 3))
    assert fitted_weights(1e6 * logits, labels).isfinite().all()
    assert fitted_weights(logits[:1], labels).tolist() == [1.0]
    with pytest.raises(ValueError, match="at least one of each"):
        fitted_weights(logits[:0], labels)


def test_learned_weights_are_those_of_the_written_student(tmp_path):
    found = grow(dataclasses.replace(SETTINGS, mixture="learned", num_members=2), tmp_path / "run")
    network, _ = read_student(tmp_path / "run" / "student")
    assert network.head.weights.tolist() == pytest.approx(found["weights"], abs=1e-6)
    assert sum(found["weights"]) == pytest.approx(1, abs=1e-5)
    with torch.no_grad():
        logits = network.stem(DATA.normalise(DATA.search.take(torch.arange(len(DATA.search))))).movedim(1, 0)
    expected = fitted_weights(logits, DATA.search.labels)
    assert found["weights"] == pytest.approx(expected.tolist(), abs=1e-4)
    assert max(found["weights"]) > 0.501


def test_the_budget_bounds_the_whole_ensemble(tmp_path):
    first = cost(SPACE.blueprint(SPACE.smallest))
    asked = dataclasses.replace(SETTINGS, generator="simple", budget=Budget(macs=2.5 * first.macs))
    found = grow(asked, tmp_path / "run")
    assert len(found["members"]) == 2 and found["macs"] == 2 * first.macs
    with pytest.raises(ValueError, match="more than the budget"):
        grow(dataclasses.replace(asked, budget=Budget(macs=10)), tmp_path / "other")


def test_the_controls_stand_beside_it_and_cost_no_more(tmp_path, capsys):
    arguments = ["grow", "--data", "tests.toy:data", "--space", "toy", "--out", str(tmp_path / "run")]
    arguments += ["--num-members", "2", "--steps", "2", "--batch-size", "16"]
    main(arguments)
    shown = capsys.readouterr().out
    rows = {row["name"]: row for row in RunFolder(tmp_path / "run").results()["rows"]}
    assert list(rows) == ["grown", "single network", "random candidates", "not taught"]
    assert all(row["macs"] <= rows["grown"]["macs"] for row in rows.values())
    assert rows["not taught"]["params"] == rows["grown"]["params"]
    page = (tmp_path / "run" / "report.html").read_text()
    for text in ("without distillation", "random candidates", "at equal cost"):
        assert text in shown and text in page
    assert "kdnas train" not in page and "kdnas search" not in page
    before = (tmp_path / "run" / "results.json").read_bytes()
    main([*arguments, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert {"student", "accuracy", "params", "macs", "seconds", "members", "weights", "controls"} <= set(found)
    assert (tmp_path / "run" / "results.json").read_bytes() == before
    with pytest.raises(SystemExit):
        main([*arguments, "--steps", "3"])


def test_the_ensemble_is_a_student_that_can_be_retrained(grown, capsys, tmp_path):
    folder, found = grown
    assert load_source(folder / "student")(torch.rand(2, *IMAGE)).shape == (2, 3)
    retrain = ["retrain", str(folder / "student"), "--data", "tests.toy:data", "--teacher", "none", "--steps", "2"]
    main([*retrain, "--batch-size", "8", "--weights", "inherited", "--out", str(tmp_path / "again"), "--json"])
    assert json.loads(capsys.readouterr().out)["macs"] == found["macs"]


def test_what_a_kill_left_beside_a_finished_member_is_removed(tmp_path):
    settings = dataclasses.replace(SETTINGS, num_members=1)
    grow(settings, tmp_path)
    left = [tmp_path / "grown-1.1.draft.safetensors", tmp_path / ".grown-1.1.draft.safetensors.7.draft"]
    for path in left:
        path.write_text("unfinished")
    grow(settings, tmp_path)
    assert not any(path.exists() for path in left)


def test_fewer_members_than_asked_are_said_and_the_report_names_those_there_are(tmp_path, capsys):
    least = cost(SPACE.blueprint(SPACE.smallest)).macs
    found = grow(dataclasses.replace(SETTINGS, budget=Budget(macs=1.5 * least), generator="simple"), tmp_path)
    assert "no further member is within the budget; 1 of 3 are grown" in capsys.readouterr().err
    page = (tmp_path / "report.html").read_text()
    assert f"members, with their weights: {found['members'][0]} (1" in page
    assert "kdnas search" not in page and "so far" not in page and "not finished" not in page


def test_what_does_not_fit_is_refused(tmp_path):
    for name, value in (("num_members", 0), ("generator", "fast"), ("teacher", "me"), ("mixture", "x")):
        with pytest.raises(ValueError, match=name):
            dataclasses.replace(SETTINGS, **{name: value})
    with pytest.raises(ValueError, match="digits, got"):
        dataclasses.replace(SETTINGS, architecture="1")
    with pytest.raises(ValueError, match="must return a Grow"):
        load_settings(f"{ROOT}/tests/toy.py", Grow)


@pytest.mark.parametrize("size", ["experiment", "small"])
def test_the_experiment_is_what_its_manifest_says(size):
    made = load_settings(f"{ROOT}/experiments/adanas.py:{size}", Grow)
    assert json.loads(json.dumps(made.to_json())) == made.to_json()
    assert made.space.count() > 100
