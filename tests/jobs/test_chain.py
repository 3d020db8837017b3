"""The chain on the toy space: phase by phase, interrupted, and as a new user would type it."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from scipy.stats import kendalltau

from kdnas.cli.commands import main
from kdnas.costs.budget import Budget
from kdnas.costs.check import Infeasible
from kdnas.costs.count import cost
from kdnas.data.base import Data
from kdnas.distillers.from_labels import FromLabels
from kdnas.jobs._run import Run, build_teacher, insisting
from kdnas.jobs.chain import chain, closing_table
from kdnas.jobs.retrain import retrain, settings_of
from kdnas.jobs.train import train
from kdnas.network import Network
from kdnas.randomness import initialised
from kdnas.runs.folder import RunFolder
from kdnas.settings import Experiment, Recipe, Retrain
from kdnas.specs import spec
from kdnas.students.card import Card
from kdnas.students.folder import write_student
from kdnas.students.source import load_source
from kdnas.tables import load_space, table_of
from kdnas.teachers.load import load_teacher
from tests.killing import no_graph  # noqa: F401
from tests.toy import data, experiment

ROOT = Path(__file__).parents[2]


DATA = spec("tests.toy:data")


def drawn_student(folder, space, seed):
    blueprint = space.blueprint(space.smallest)
    card = Card(
        architecture=space.smallest,
        space=table_of(space),
        blueprint=blueprint,
        cost=cost(blueprint),
        preprocessing=DATA.build(Data).preprocessing,
        class_names=("a", "b", "c"),
    )
    write_student(folder, initialised(lambda: Network(blueprint), seed), card, deploy=False)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "trained"
    main(["train", "tests/toy.py", "--out", str(folder)])
    return folder


@pytest.fixture(scope="module")
def searched(trained):
    main(["search", str(trained)])
    return trained


def test_training_leaves_what_later_commands_need(trained):
    storage = RunFolder(trained)
    assert set(storage.manifest["phases"]) == {"teacher", "train"}
    assert storage.phase("train")["steps"] == 12
    assert {m["phase"] for m in storage.lines("metrics.jsonl")} == {"teacher", "train"}
    assert {"largest", "smallest", "random"} == set(storage.lines("metrics.jsonl")[-1]["losses"])
    assert (trained / "teacher" / "weights.safetensors").exists()


def test_the_same_command_on_a_finished_run_changes_nothing(trained):
    before = (trained / "checkpoint.safetensors").read_bytes()
    main(["train", "tests/toy.py", "--out", str(trained)])
    assert (trained / "checkpoint.safetensors").read_bytes() == before


def test_what_a_kill_left_beside_a_finished_teacher_is_removed(trained):
    left = [trained / "teacher.draft.safetensors", trained / ".teacher.draft.safetensors.7.draft"]
    for path in left:
        path.write_text("unfinished")
    main(["train", "tests/toy.py", "--out", str(trained)])
    assert not any(path.exists() for path in left)


def test_other_settings_on_an_existing_run_are_refused(trained, capsys):
    with pytest.raises(SystemExit):
        main(["train", "tests/toy.py", "--out", str(trained), "--steps", "13"])
    assert "train.recipe.steps is 12 there and 13 here" in capsys.readouterr().err


def test_a_search_prints_the_ranking_with_its_controls(searched, capsys):
    main(["search", str(searched), "--scorer", "accuracy", "--num-evaluations", "6"])
    shown = capsys.readouterr().out
    for text in (
        "place",
        "MACs",
        "stopped because",
        "tau between the score and parameters",
        "number of layers",
        "score and depth",
        "score and nwot",
        "score and synflow",
        "score and zen",
        "random",
    ):
        assert text in shown, text


def test_two_networks_are_too_few_for_an_agreement(tmp_path, searched, capsys):
    folder = tmp_path / "run"
    shutil.copytree(searched, folder)
    main(["search", str(folder), "--scorer", "accuracy", "--num-evaluations", "2"])
    shown = capsys.readouterr().out
    assert "Agreement with parameters is left out: 2 networks are too few to be ranked" in shown
    assert "Kendall" not in shown and "size does" not in shown


def test_json_is_one_object_and_nothing_else(searched, capsys):
    main(["search", str(searched), "--num-evaluations", "6", "--budget", "macs=60000", "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["places"][0]["place"] == 1
    assert all(p["macs"] <= 60000 for p in shown["places"])
    taus = {f"tau {name}" for name in ("params", "macs", "layers", "depth", "nwot", "synflow", "zen")}
    assert taus | {"random search"} <= set(shown["controls"])
    storage = RunFolder(searched)
    entries = [e for e in storage.ranking(storage.phase("search")["search"]) if not e.is_control]
    for name in ("params", "macs", "layers"):
        tau = kendalltau([e.score for e in entries], [getattr(e, name) for e in entries]).statistic
        assert shown["controls"][f"tau {name}"]["value"] == pytest.approx(tau)
    for name in taus:
        low, high = shown["controls"][name]["interval"]
        assert low <= shown["controls"][name]["value"] <= high
        assert low < high


def test_the_front_is_what_nothing_beats(searched, capsys):
    main(["search", str(searched), "--num-evaluations", "12", "--front", "--json"])
    shown = json.loads(capsys.readouterr().out)["places"]
    storage = RunFolder(searched)
    number = storage.phase("search")["search"]
    every = [e for e in storage.ranking(number) if not e.is_control]

    def beaten(e):
        return any(
            o.score >= e.score and o.macs <= e.macs and o.params <= e.params and o.code != e.code
            for o in every
            if (o.score, o.macs, o.params) != (e.score, e.macs, e.params)
        )

    assert {p["code"] for p in shown} == {e.code for e in every if not beaten(e)}
    assert [p["macs"] for p in shown] == sorted(p["macs"] for p in shown)


def test_a_search_appends_to_the_ranking(searched):
    storage = RunFolder(searched)
    before = storage.ranking()
    main(["search", str(searched), "--num-evaluations", "5"])
    after = storage.ranking()
    assert after[: len(before)] == before
    assert len({e.architecture for e in after[len(before) :] if e.searcher == "evolution"}) == 5


def test_an_interrupted_search_goes_on_and_ends_like_an_uninterrupted_one(searched):
    arguments = ["search", str(searched), "--num-evaluations", "9", "--max-time", "1000s"]
    main(arguments)
    storage = RunFolder(searched)
    number = len(storage.manifest["searches"])
    whole = storage.ranking(number)
    # As after a kill: the search is still marked as running, and part of its lines were never written.
    storage.manifest["searches"][-1]["state"] = "running"
    storage.save()
    lines = storage.path("ranking.jsonl").read_text().splitlines()
    storage.path("ranking.jsonl").write_text("\n".join(lines[:-14]) + "\n" + lines[-14][:30])
    main(arguments)
    again = RunFolder(searched)
    assert len(again.manifest["searches"]) == number
    assert [(e.code, e.score, e.searcher) for e in again.ranking(number)] == [
        (e.code, e.score, e.searcher) for e in whole
    ]
    before = len(whole) - 14
    assert again.phase("search")["saved"].endswith(f", without those of {before} scores before an interruption")


def test_an_infeasible_budget_names_the_nearest(searched, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["search", str(searched), "--budget", "macs=100"])
    assert stopped.value.code == 2
    assert "infeasible" in capsys.readouterr().err


@pytest.mark.parametrize(
    "bound", [{"macs": 100}, {"latency": 1e-9}, {"latency": "0.1%"}, {"memory": 10, "latency": 9.0}, {"params": "0.1%"}]
)
def test_an_infeasible_budget_is_refused_before_anything_is_written_or_trained(bound, tmp_path):
    base = experiment()
    impossible = dataclasses.replace(base.search, budget=Budget(**bound))
    for settings in (dataclasses.replace(base, search=impossible), dataclasses.replace(base, second=impossible)):
        with pytest.raises(Infeasible, match="infeasible"):
            train(settings, tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_export_and_retrain_write_students_that_need_no_kdnas(searched, capsys):
    main(["search", str(searched), "--num-evaluations", "6"])
    capsys.readouterr()
    main(["export", str(searched), "--place", "2", "--json"])
    exported = json.loads(capsys.readouterr().out)
    assert {"student", "code", "params", "macs", "checks"} <= set(exported)
    folder = Path(exported["student"])
    assert sorted(p.name for p in folder.iterdir() if p.is_file()) == [
        "README.md",
        "config.json",
        "student.json",
        "student.onnx",
        "student.py",
        "weights.safetensors",
    ]
    assert load_source(folder)(torch.rand(2, 3, 8, 8)).shape == (2, 3)
    main(["retrain", str(folder), "--json", "--weights", "inherited", "--loss", "attention_transfer"])
    retrained = json.loads(capsys.readouterr().out)
    part = data().test
    logits = load_source(Path(retrained["student"]))(part.take(torch.arange(len(part))))
    assert retrained["accuracy"] == pytest.approx(float((logits.argmax(1) == part.labels).double().mean()))
    assert Path(retrained["student"]).name == "place-2-retrained"
    card = json.loads((Path(retrained["student"]) / "student.json").read_text())
    assert card["origin"]["retrained"]["weights"] == "inherited"
    main(["retrain", str(folder), "--json", "--teacher", "none", "--steps", "2", "--out", str(searched / "alone")])
    assert (searched / "alone" / "student.onnx").exists()


def test_a_retraining_removes_its_own_drafts_and_not_those_of_its_neighbours(tmp_path):
    space = load_space("toy").fitted(classes=3, image_channels=3)
    student = drawn_student(tmp_path / "drawn", space, 0)
    others = [
        ".new.v2.0123456789ab.draft.safetensors",
        ".new.draft.safetensors",
        ".anew.0123456789ab.draft.safetensors",
    ]
    own = [".new.0123456789ab.draft.safetensors", "..new.0123456789ab.draft.safetensors.7.draft"]
    for name in (*others, *own):
        (tmp_path / name).write_text("unfinished")
    retrain(student, Retrain(distiller=spec(FromLabels), recipe=Recipe(steps=1)), tmp_path / "new", data=DATA)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"drawn", "new", *others}


def test_a_retraining_that_inherits_does_not_go_on_from_another_students(tmp_path, monkeypatch):
    space = load_space("toy").fitted(classes=3, image_channels=3)
    students = [drawn_student(tmp_path / f"drawn-{seed}", space, seed) for seed in (0, 1)]
    drafts = []

    def noted(training, phase, draft, *rest):
        drafts.append(draft.name)
        return 0.0

    monkeypatch.setattr("kdnas.jobs.retrain.train_with_checkpoints", noted)
    for weights in ("inherited", "fresh"):
        how = Retrain(distiller=spec(FromLabels), recipe=Recipe(steps=1), weights=weights)
        for student in students:
            retrain(student, how, tmp_path / "new", data=DATA, deploy=False)
    assert drafts[0] != drafts[1] and drafts[2] == drafts[3]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--teacher", "none", "--distiller", "from_teacher"], "--distiller needs a teacher, got --teacher none"),
        (["--teacher", "none", "--distiller", "born_again,taught=true"], "--distiller needs a teacher"),
        (["--teacher", "none", "--loss", "soft_targets"], "--loss needs a teacher, got --teacher none"),
        (["--teacher", "tests.toy:other_classes", "--distiller", "mutual"], "uses a teacher, mutual does not. Drop"),
        (["--teacher", "tests.toy:other_classes", "--loss", "self_attention"], "from_teacher does not"),
        (["--teacher", "fit"], "must be a trained one, got fit"),
        (["--distiller", ""], "--distiller is empty"),
    ],
)
def test_who_teaches_and_who_is_asked_must_agree(tmp_path, capsys, given, message):
    space = load_space("toy").fitted(classes=3, image_channels=3)
    student = drawn_student(tmp_path / "drawn", space, 0)
    with pytest.raises(SystemExit) as stopped:
        main(["retrain", str(student), "--data", "tests.toy:data", "--out", str(tmp_path / "new"), *given])
    assert stopped.value.code == 2 and not (tmp_path / "new").exists()
    assert message in capsys.readouterr().err


def test_a_place_that_is_not_there_is_refused(searched, capsys):
    with pytest.raises(SystemExit):
        main(["export", str(searched), "--place", "99"])
    assert "`--place` must be between 1 and" in capsys.readouterr().err


def test_a_checkpoint_cut_short_or_of_another_space_is_refused(tmp_path, trained, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(trained, broken)
    path = broken / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(SystemExit):
        main(["search", str(broken)])
    assert "damaged" in capsys.readouterr().err
    shutil.copy(trained / "checkpoint.safetensors", path)
    manifest = json.loads((broken / "run.json").read_text())
    manifest["job"]["train"]["space"]["widths"] = [4, 16]
    (broken / "run.json").write_text(json.dumps(manifest | {"format": 1}))
    with pytest.raises(SystemExit):
        main(["search", str(broken)])
    assert "checkpoint.safetensors does not fit the network: 21 of another shape, such as " in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_chain_from_one_command_line(tmp_path, capsys):
    out = tmp_path / "run"
    main(
        [
            "run",
            "--data",
            "tests.toy:data",
            "--teacher",
            "fit",
            "--space",
            "toy",
            "--budget",
            "macs=70000",
            "--out",
            str(out),
            "--steps",
            "4",
            "--batch-size",
            "16",
            "--num-evaluations",
            "8",
        ]
    )
    shown = capsys.readouterr()
    rows = [line.split()[0] for line in shown.out.splitlines() if line and not line[0].isspace()]
    assert rows[:3] == ["teacher", "student", "control"]
    for command in ("search", "export", "finals", "report"):
        assert f"next: kdnas {command}" in shown.err
    assert "without a teacher" in shown.out
    page = (out / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    students = {p.name for p in (out / "students").iterdir()}
    assert {"place-1", "student", "control-1", "finalist-1"} <= students
    assert (out / "students" / "student" / "student.onnx").exists()
    before = (out / "results.json").read_bytes()
    main(
        [
            "run",
            "--data",
            "tests.toy:data",
            "--teacher",
            "fit",
            "--space",
            "toy",
            "--budget",
            "macs=70000",
            "--out",
            str(out),
            "--steps",
            "4",
            "--batch-size",
            "16",
            "--num-evaluations",
            "8",
        ]
    )
    assert (out / "results.json").read_bytes() == before


def test_a_student_from_elsewhere_runs_no_code_of_its_own(tmp_path, searched, capsys):
    main(["export", str(searched), "--out", str(tmp_path / "taken")])
    card = json.loads((tmp_path / "taken" / "student.json").read_text())
    card["origin"]["data"] = {
        "make": "subprocess:call",
        "arguments": {"args": f"touch {tmp_path / 'ran'}", "shell": True},
    }
    (tmp_path / "taken" / "student.json").write_text(json.dumps(card | {"format": 1}))
    with pytest.raises(SystemExit):
        main(["retrain", str(tmp_path / "taken")])
    assert "none of kdnas's algorithms: subprocess:call" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_what_a_command_does_is_said_first(searched, capsys):
    main(["report", str(searched)])
    assert capsys.readouterr().err.startswith(f"kdnas report: {searched}")
    said = searched / "students" / "said"
    main(["export", str(searched), "--out", str(said)])
    assert capsys.readouterr().err.startswith(f"kdnas export: place 1 of {searched}")
    main(["retrain", str(said), "--steps", "1"])
    assert capsys.readouterr().err.startswith(f"kdnas retrain: {said} into {said}-retrained")
    main(["taps", "tests.toy:cnn", "toy", "--data", "tests.toy:data"])
    assert capsys.readouterr().err.startswith("kdnas taps: tests.toy:cnn beside toy")


def test_a_student_outside_its_run_is_retrained_by_the_recipe_of_its_run(tmp_path, searched):
    main(["export", str(searched), "--out", str(tmp_path / "taken")])
    assert settings_of(tmp_path / "taken").recipe == Run(searched).experiment.retrain.recipe != Recipe()
    card = json.loads((tmp_path / "taken" / "student.json").read_text())
    card["origin"]["recipe"]["steps"] = "many"
    (tmp_path / "taken" / "student.json").write_text(json.dumps(card | {"format": 1}))
    with pytest.raises(ValueError, match="has an invalid recipe"):
        settings_of(tmp_path / "taken")
    del card["origin"]["recipe"]
    (tmp_path / "taken" / "student.json").write_text(json.dumps(card | {"format": 1}))
    assert settings_of(tmp_path / "taken").recipe == Recipe()


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("rollback", "yes"),
        ("teacher_views", 1.5),
        ("teacher.snapshots", "2"),
        ("cache_limit", "4"),
        ("weights", 3),
        ("teacher.blocks", True),
    ],
)
def test_a_manifest_with_a_wrong_type_is_refused(name, wrong):
    job = experiment().to_json()
    *above, key = name.split(".")
    functools.reduce(dict.__getitem__, above, job["train"])[key] = wrong
    with pytest.raises(ValueError, match=f"must be a.*{wrong}"):
        Experiment.from_json(job)


@pytest.mark.parametrize("number", ["0", "-5"])
def test_a_number_of_images_that_is_none_is_refused_everywhere(tmp_path, searched, number, capsys):
    codes = sorted({entry.code for entry in RunFolder(searched).ranking()})
    table = tmp_path / "table.csv"
    table.write_text("arch,mean_acc\n" + "".join(f"{code},{place}\n" for place, code in enumerate(codes)))
    for arguments in (["why", str(searched), codes[0]], ["rank-check", str(searched), str(table)]):
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, "--num-images", number])
        assert stopped.value.code == 2
        assert f"`--num-images` must be at least 3, got {number}" in capsys.readouterr().err


def test_a_teacher_of_other_class_names_is_refused(tmp_path, trained):
    folder = tmp_path / "teacher"
    shutil.copytree(trained / "teacher", folder)
    made = load_teacher(f"checkpoint:{folder}")
    assert build_teacher(made, data()).class_names == ("a", "b", "c")
    card = json.loads((folder / "student.json").read_text())
    card["class_names"] = ["a", "c", "b"]
    (folder / "student.json").write_text(json.dumps(card | {"format": 1}))
    assert build_teacher(made, data()).class_names == ("a", "b", "c")  # turned into the data's order
    card["class_names"] = ["a", "c", "d"]
    (folder / "student.json").write_text(json.dumps(card | {"format": 1}))
    with pytest.raises(ValueError, match="class 1 is 'c' to the teacher and 'b' in the data"):
        build_teacher(made, data())
    card["class_names"] = ["a", "b"]
    (folder / "student.json").write_text(json.dumps(card | {"format": 1}))
    with pytest.raises(ValueError, match="the teacher knows 2 classes, the data has 3"):
        build_teacher(made, data())
    with pytest.raises(ValueError, match=r"the student knows 2 classes, the data has 3. Give the data it was found on"):
        retrain(folder, Retrain(), tmp_path / "new", data=spec("tests.toy:data"))
    card["class_names"] = ["a", "c", "d"]
    (folder / "student.json").write_text(json.dumps(card | {"format": 1}))
    several = load_teacher(f"ensemble:checkpoint:{trained / 'teacher'},checkpoint:{folder}")
    with pytest.raises(ValueError, match="class 1"):
        build_teacher(several, data())


def test_a_teacher_that_was_given_has_a_row_in_the_closing_table(tmp_path):
    made = experiment()
    one = Recipe(steps=2, batch_size=16)
    made = dataclasses.replace(
        made,
        train=dataclasses.replace(made.train, teacher=load_teacher("tests.toy:cnn"), recipe=one),
        search=dataclasses.replace(made.search, num_evaluations=3),
        retrain=Retrain(recipe=one),
    )
    with insisting(True):  # it has random weights
        run = chain(made, tmp_path / "run", deploy=False)
    row = run.storage.results()["rows"][0]
    assert row["name"] == "teacher" and 0 <= row["accuracy"] <= 1
    # Two convolutions with bias, two batch norms, a linear layer; MACs on 8 x 8 and 4 x 4.
    assert row["params"] == 3 * 6 * 9 + 6 + 12 + 6 * 12 * 9 + 12 + 24 + 12 * 3 + 3
    assert row["macs"] == 3 * 6 * 9 * 64 + 6 * 12 * 9 * 16 + 12 * 3
    assert closing_table(run.storage).splitlines()[1].startswith("teacher")
    run.storage.record_result({**row, "macs": None})
    assert closing_table(run.storage).count(" - ") == 1
