"""No file of a run holds a path of this machine; what lies elsewhere is found again, or named again and compared."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from kdnas import state
from kdnas.cli.commands import main
from kdnas.jobs import export as job_of_export
from kdnas.jobs._run import Run
from kdnas.runs import places
from kdnas.runs.folder import RunFolder, top_of
from kdnas.runs.places import by_name, located, missing, moved, portable
from kdnas.students.folder import read_student
from tests.toy import files_with

GOLDEN = Path(__file__).parents[1] / "golden"
SHORT = ["--steps", "2", "--batch-size", "8"]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A function after which kdnas runs as on another machine."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))

    def leave():
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "other"))
        places._HERE.clear()

    return leave


def test_paths_inside_are_relative_and_outside_a_key_and_a_name(tmp_path, elsewhere):
    run = tmp_path / "run"
    content = {"a": [str(run / "teacher"), f"checkpoint:{tmp_path}/big"], "b": f"timm:x@{tmp_path}/w.pth", "c": "a/b"}
    content |= {"d": "/", "e": "http://host/x", "f": 3, "g": "relative"}
    stored = portable(content, run / "students" / "s", run)
    assert stored["a"][0] == "../../teacher"
    assert re.fullmatch(r"checkpoint:elsewhere/[0-9a-f]{16}/big", stored["a"][1])
    assert re.fullmatch(r"timm:x@elsewhere/[0-9a-f]{16}/w\.pth", stored["b"])
    assert str(tmp_path) not in json.dumps(stored)
    assert {k: stored[k] for k in "cdefg"} == {k: content[k] for k in "cdefg"}
    assert portable(stored, run / "students" / "s", run) == stored
    assert located(stored, run / "students" / "s", run) == content
    places._HERE.clear()  # as in a later process
    assert located(stored, run / "students" / "s", run) == content
    assert by_name(stored)["b"] == "timm:x@w.pth" and by_name(content)["a"][1] == "checkpoint:big"
    elsewhere()
    assert located(stored, run / "students" / "s", run)["b"] == stored["b"]
    assert missing(located(stored, run / "students" / "s", run)) == ["big", "w.pth"]


def test_a_path_that_leads_out_of_the_run_stays_as_it_was_typed(tmp_path):
    assert located(["../../../etc", "../.."], tmp_path / "students" / "s", tmp_path) == ["../../../etc", str(tmp_path)]


def test_what_moved_twice_on_one_machine_is_found(tmp_path, elsewhere):
    old, folder = portable(str(tmp_path / "a"), tmp_path / "run", tmp_path / "run"), tmp_path / "run"
    for before, name in (("a", "b"), ("b", "c")):
        (tmp_path / name).mkdir()
        content, pairs = moved({"path": located(old, folder, folder)}, {"path": str(tmp_path / name)})
        assert content == {"path": str(tmp_path / name)} and list(pairs) == [str(tmp_path / before)]
        places.name_again(pairs)
        places.settle(pairs)
        places._HERE.clear()
        assert located(old, folder, folder) == str(tmp_path / name)
        (tmp_path / name).rmdir()


@pytest.fixture
def pets(tmp_path):
    """Two classes of eight images of 8 x 8 pixels."""
    folder = tmp_path / "pets"
    generator = torch.Generator().manual_seed(0)
    for name, base in (("cat", 0), ("dog", 100)):
        (folder / name).mkdir(parents=True)
        for number in range(12):
            pixels = (torch.rand(8, 8, 3, generator=generator) * 99 + base).to(torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / name / f"{number}.png")
    return folder


def last(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert end.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_a_run_of_data_and_a_teacher_elsewhere_goes_on_on_another_machine(tmp_path, pets, elsewhere, capsys):
    folder, teacher, texts = tmp_path / "run", tmp_path / "mine", (tmp_path, Path.home(), sys.prefix)
    data = ["--data", f"folder:{pets}"]
    main(["fit", *data, "--width", "4", *SHORT, "--out", str(teacher)])
    options = ["--space", "toy", "--scorer", "params", "--num-evaluations", "4", "--finalists", "1", *SHORT, "--insist"]
    arguments = [*options, "--no-deploy", "--out", str(folder)]
    main(["run", *data, "--teacher", str(teacher), *arguments])
    job_of_export.export(Run(folder), deploy=False)
    assert not files_with(folder, *texts) and not files_with(teacher, *texts)

    main(["search", str(folder), "--num-evaluations", "3", "--scorer", "params"])  # in place, without a flag
    new = tmp_path / "there"
    new.mkdir()
    for name in (folder, pets, teacher):
        name.rename(new / name.name)
    elsewhere()
    folder, student = new / "run", new / "run" / "students" / "place-1"
    assert "needs 'pets', which is not where it was" in last(capsys, "search", folder, "--scorer", "params")
    assert "Say where it is now: --data DATA." in last(capsys, "quantize", student)
    other = new / "other"
    shutil.copytree(new / "pets", other)
    (other / "cat" / "0.png").unlink()
    message = last(capsys, "search", folder, "--data", f"folder:{other}", "--scorer", "params")
    assert "other is not what" in message and "images, had" in message
    message = last(capsys, "search", folder, "--data", "digits")
    assert "must be the one that" in message
    data = ["--data", f"folder:{new / 'pets'}"]
    assert "needs 'mine', which is not where it was" in last(capsys, "search", folder, *data, "--scorer", "rdm")
    search = ["search", str(folder), "--num-evaluations", "3", "--scorer", "params"]
    main([*search, *data, "--teacher", str(new / "mine")])
    main(search)  # both are known from now on
    assert Run(folder).experiment.train.data["path"] == str(new / "pets")
    assert read_student(student)[1].origin["teacher"]["arguments"]["path"] == str(new / "mine")
    assert not files_with(folder, tmp_path)


def test_the_command_that_began_a_run_resumes_it_where_it_is_now(tmp_path, pets, elsewhere, capsys):
    folder = tmp_path / "run"
    options = ["--width", "4", *SHORT]
    main(["fit", "--data", f"folder:{pets}", *options, "--out", str(folder)])
    before = (folder / "teacher" / "weights.safetensors").read_bytes()
    folder, pets = folder.rename(tmp_path / "moved"), pets.rename(tmp_path / "animals")
    elsewhere()
    main(["fit", "--data", f"folder:{pets}", *options, "--out", str(folder)])
    assert (folder / "teacher" / "weights.safetensors").read_bytes() == before
    assert "--steps" not in last(capsys, "fit", "--data", "digits", *options, "--out", folder)


def test_weights_that_are_named_again_are_those_of_the_beginning(tmp_path, elsewhere):
    weights = tmp_path / "w.pth"
    weights.write_bytes(b"weights")
    job = {"weights": str(weights), "data": {"make": "kdnas.data:digits", "arguments": {}}}
    run = RunFolder.create(tmp_path / "run", job, 0)
    assert run.manifest["inputs"][0]["path"] == str(weights)
    new = weights.rename(tmp_path / "new.pth")
    elsewhere()
    new.write_bytes(b"others")
    with pytest.raises(ValueError, match=r"new\.pth has another content than the 'w\.pth' of the run"):
        RunFolder.create(tmp_path / "run", job | {"weights": str(new)}, 0)
    new.write_bytes(b"weights")
    assert RunFolder.create(tmp_path / "run", job | {"weights": str(new)}, 0).manifest["job"]["weights"] == str(new)
    assert RunFolder(tmp_path / "run").manifest["job"]["weights"] == str(new)


def test_a_run_that_was_begun_with_absolute_paths_is_read_and_holds_none_once_written(tmp_path, elsewhere):
    shutil.copytree(GOLDEN / "format_1", tmp_path / "run")
    path = tmp_path / "run" / "run.json"
    content = json.loads(path.read_text())
    content["job"]["train"]["teacher"]["arguments"]["path"] = str(tmp_path / "teacher")
    path.write_text(json.dumps(content))
    run = RunFolder(tmp_path / "run")
    assert run.manifest["job"]["train"]["teacher"]["arguments"]["path"] == str(tmp_path / "teacher")
    run.save()
    assert str(tmp_path) not in path.read_text()
    assert RunFolder(tmp_path / "run").manifest["job"] == run.manifest["job"]


def test_runs_of_a_comparison_move_with_it(tmp_path, elsewhere):
    folder = tmp_path / "compared"
    folder.mkdir()
    (folder / "compare.json").write_text("{}")
    job = {"teacher": str(folder / "teacher" / "teacher")}
    RunFolder.create(folder / "simple", job, 0)
    assert "../teacher/teacher" in (folder / "simple" / "run.json").read_text()
    folder = folder.rename(tmp_path / "moved")
    elsewhere()
    assert RunFolder(folder / "simple").manifest["job"] == {"teacher": str(folder / "teacher" / "teacher")}
    assert top_of(folder / "simple" / "students" / "s") == folder


def test_without_a_memory_this_process_alone_knows_where_things_are(tmp_path, monkeypatch):
    (tmp_path / "a-file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "a-file"))
    monkeypatch.setenv("HOME", str(tmp_path / "a-file"))
    stored = portable(str(tmp_path / "x"), tmp_path / "run", tmp_path / "run")
    assert located(stored, tmp_path / "run", tmp_path / "run") == str(tmp_path / "x")
    places._HERE.clear()
    assert located(stored, tmp_path / "run", tmp_path / "run") == stored


def test_the_secret_is_whole_whenever_it_is_there(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    first = state.key_of("x")
    assert first == state.key_of("x") and len((tmp_path / "kdnas" / "secret").read_bytes()) == 32
    for folder in (tmp_path / "kdnas", tmp_path / "kdnas" / "places"):
        state.record("places", first, "y")
        assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
    assert state.recall("places", first) == "y"
