"""Runs and students of every format that was ever written are read by today's code.

`golden/run` is from before the modules moved and has no format in its files; `golden/format_1` is the first with one,
`golden/format_2` the first whose JSON objects and lines have checksums. A golden is never written anew: a change of the
format adds another one.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

from kdnas.cli.commands import main
from kdnas.jobs._run import Run
from kdnas.ranking.order import ranked
from kdnas.runs.folder import CONFIG
from kdnas.students.folder import read_student
from kdnas.students.source import load_source

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def stored(tmp_path, monkeypatch):
    shutil.copytree(GOLDEN, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def test_a_stored_run_opens_with_its_experiment_teacher_and_weights(stored):
    run = Run(stored)
    experiment = run.experiment
    assert experiment.train.recipe.steps == 30
    assert experiment.search.budget.macs == 30_000
    assert [weight for weight, _ in experiment.train.distiller["terms"]] == [0.9, 10.0]
    assert run.teacher(run.data.test.take(torch.arange(2)), torch.zeros(2)).logits.shape == (2, 10)
    network = run.supernet.extract(run.space.largest).cpu()
    assert torch.isfinite(network(run.data.normalise(run.data.test.take(torch.arange(2)))).logits).all()


def test_a_stored_ranking_keeps_its_order(stored):
    entries = Run(stored).storage.ranking(1)
    places = ranked([entry for entry in entries if not entry.is_control])
    card = json.loads((stored / "students" / "place-2" / "student.json").read_text(encoding="utf-8"))
    assert dict(places[1].architecture) == card["architecture"]
    assert places[1].score == card["origin"]["score"]


@pytest.mark.parametrize(
    "name",
    [
        *(f"run/students/{name}" for name in ("student", "place-1", "place-2", "place-2-retrained")),
        "format_1/students/student",
        "format_2/students/student",
    ],
)
def test_a_stored_student_gives_the_same_logits_as_its_source(stored, name):
    folder = stored.parent / name
    network, card = read_student(folder)
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    p = card.preprocessing
    mean, std = torch.tensor(p.mean).view(1, -1, 1, 1), torch.tensor(p.std).view(1, -1, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(network((images - mean) / std).logits, load_source(folder)(images))


def test_later_commands_go_on_from_a_stored_run(stored, capsys):
    main(["search", str(stored), "--num-evaluations", "6", "--json"])
    main(["report", str(stored)])
    capsys.readouterr()
    assert (stored / "report.html").read_text(encoding="utf-8").startswith("<!")
    main(["retrain", str(stored / "students" / "place-2"), "--steps", "2", "--out", str(stored / "again"), "--json"])
    assert json.loads(capsys.readouterr().out)["params"] == 846


@pytest.mark.parametrize("name", ["run", "format_1", "format_2"])
def test_what_a_stored_run_has_measured_is_read(stored, name):
    run = Run(stored.parent / name)
    assert run.experiment.train.recipe.steps == 30 and run.experiment.search.budget.macs == 30_000
    entries = run.storage.ranking(1)
    assert len({entry.code for entry in entries}) > 5
    best = max(entry.score for entry in entries if not entry.is_control)
    assert name == "format_2" or run.ranking()[0].score == best  # its last search has another score
    names = {row["name"]: row["accuracy"] for row in run.storage.results()["rows"]}
    assert names.keys() >= {"teacher", "student", "control"} and all(0 < value < 1 for value in names.values())
    assert torch.isfinite(torch.cat([p.flatten() for p in run.supernet.parameters()])).all()


def test_the_finals_of_format_1_are_not_trained_again(stored, capsys):
    folder = stored.parent / "format_1"
    before = (folder / "trainings.jsonl").read_bytes(), (folder / "test_hits.jsonl").read_bytes()
    main(["finals", str(folder), "--finalists", "2", "--steps", "30", "--batch-size", "32", "--json"])
    assert json.loads(capsys.readouterr().out)["code"]
    assert ((folder / "trainings.jsonl").read_bytes(), (folder / "test_hits.jsonl").read_bytes()) == before


@pytest.mark.parametrize("number", [1, 2])
def test_every_file_of_a_format_says_so(number):
    folder = GOLDEN / f"format_{number}"
    files = [path for path in folder.rglob("*") if path.suffix in (".json", ".jsonl", ".safetensors")]
    assert len(files) > 10
    stamps = {".safetensors": b'"kdnas":"%d ' % number}
    for path in (path for path in files if path.name != CONFIG):
        content = path.read_bytes()
        assert stamps.get(path.suffix, b'"format": %d' % number) in content, path
        assert number < 2 or content.count(b'"checksum": ') == content.count(b'"format": 2'), path
