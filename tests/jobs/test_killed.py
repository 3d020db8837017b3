"""SIGKILL in every phase that trains or searches: the same command then ends as if nothing had happened."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from kdnas.cli.commands import main
from kdnas.runs.checkpoint import load_state
from kdnas.runs.folder import RunFolder
from tests.killing import CHECKPOINT, drafts, killed, no_graph  # noqa: F401

pytestmark = pytest.mark.slow  # each test starts a process of its own


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    main(["train", "tests/toy.py", "--out", str(folder)])
    return folder


def same_weights(one, other):
    mine, theirs = (load_file(folder / "weights.safetensors") for folder in (one, other))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


def test_a_teacher_s_training(tmp_path, trained):
    folder = tmp_path / "run"
    arguments = ["train", "tests/toy.py", "--out", str(folder)]
    killed(arguments, "given[0].name.startswith('teacher.') and given[1]['training']['index'] == 2", **CHECKPOINT)
    assert (folder / "teacher.draft.safetensors").exists()
    assert RunFolder(folder).phase("teacher") is None
    main(arguments)
    same_weights(folder / "teacher", trained / "teacher")
    assert drafts(folder) == []


def test_a_supernet_s_training(tmp_path, trained):
    folder = tmp_path / "run"
    arguments = ["train", "tests/toy.py", "--out", str(folder)]
    killed(arguments, "given[0].name == 'checkpoint.safetensors' and given[1]['training']['index'] == 5", **CHECKPOINT)
    assert load_state(folder / "checkpoint.safetensors")["training"]["index"] == 4
    main(arguments)
    whole, resumed = (load_state(place / "checkpoint.safetensors")["training"] for place in (trained, folder))
    assert whole["index"] == resumed["index"] == 12
    assert all(torch.equal(tensor, resumed["model"][name]) for name, tensor in whole["model"].items())


def test_a_search(tmp_path, trained):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    shutil.copytree(trained, whole)
    shutil.copytree(trained, folder)
    options = ["--num-evaluations", "20"]
    main(["search", str(whole), *options])
    killed(
        ["search", str(folder), *options],
        "len(given[0].ranking()) == 3",
        given="from kdnas.runs.folder import RunFolder",
        name="append",
    )
    assert len(RunFolder(folder).ranking()) == 3
    assert RunFolder(folder).phase("search") is None
    main(["search", str(folder), *options])

    def told(place):
        return [(e.code, e.score, e.searcher, e.search) for e in RunFolder(place).ranking()]

    assert told(folder) == told(whole)
    assert len(RunFolder(folder).manifest["searches"]) == 1


def test_a_retraining(tmp_path, trained):
    main(["search", str(trained), "--num-evaluations", "4"])
    main(["export", str(trained)])
    students = trained / "students"
    arguments = ["retrain", str(students / "place-1"), "--steps", "12", "--out"]
    main([*arguments, str(students / "whole")])
    killed([*arguments, str(students / "killed")], "given[1]['training']['index'] == 5", **CHECKPOINT)
    assert any(students.glob(".killed.*.draft.safetensors"))
    assert not (students / "killed").exists()
    main([*arguments, str(students / "killed")])
    same_weights(students / "killed", students / "whole")
    cards = [json.loads((students / name / "student.json").read_text()) for name in ("killed", "whole")]
    assert cards[0]["origin"]["test_accuracy"] == cards[1]["origin"]["test_accuracy"]
    assert drafts(trained) == []


def test_finals(tmp_path, trained):
    """Killed in the midst of the second finalist: rows, weights and results are those of the run that was not."""
    main(["search", str(trained), "--num-evaluations", "12"])
    whole, folder = tmp_path / "whole", tmp_path / "run"
    for place in (whole, folder):
        shutil.copytree(trained, place, ignore=shutil.ignore_patterns("students"))
    options = ["--steps", "12", "--no-deploy"]
    main(["finals", str(whole), *options])
    here = "given[0].name.startswith('finalist-2.') and given[1]['training']['index'] == 2"
    killed(["finals", str(folder), *options], here, **CHECKPOINT)
    before = RunFolder(folder).lines("trainings.jsonl")
    assert all(row["step"] == 0 for row in before if row["name"] == "finalist-2")  # in the midst of it
    main(["finals", str(folder), *options])

    def told(place):
        rows = RunFolder(place).lines("trainings.jsonl")
        results = RunFolder(place).results()
        for row in (*rows, *results["rows"]):
            row.pop("seconds", None)
        return rows, results

    assert told(folder) == told(whole)
    for student in sorted(path.name for path in (whole / "students").iterdir()):
        same_weights(folder / "students" / student, whole / "students" / student)
    assert drafts(folder) == []
