"""A run whose files are damaged, moved, or hold values that cannot be right."""

import json
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kdnas.cli.commands import main
from kdnas.jobs import track
from kdnas.jobs._run import Run
from kdnas.jobs.prune import CANDIDATES
from kdnas.jobs.retrain import retrain
from kdnas.jobs.search import search
from kdnas.report import write_report
from kdnas.runs import folder as names
from kdnas.runs.checkpoint import load_state, save_state
from kdnas.runs.files import read_json, write_json
from kdnas.runs.folder import RunFolder
from kdnas.runs.lock import is_lock
from kdnas.settings import Recipe, Retrain
from kdnas.specs import spec
from kdnas.students.card import form_of
from kdnas.students.folder import read_student, write_student
from kdnas.students.trust import source_of
from tests.killing import no_graph  # noqa: F401

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def stored(tmp_path, monkeypatch):
    shutil.copytree(GOLDEN, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


@pytest.fixture(scope="module")
def current(tmp_path_factory):
    """A run of today's format with a file of every kind, searched twice, exported, trained, quantised and explained."""
    folder = tmp_path_factory.mktemp("current") / "run"
    shutil.copytree(GOLDEN / "format_2", folder)
    run = RunFolder(folder)
    run.add(names.LATENCIES, [{"reference": 0.5, "device": "cpu", "threads": 1}, {"layer": "x", "seconds": 0.25}])
    run.add(names.IMPORTED, [{"code": "000000", "accuracy": 0.5, "file": "a.csv"}])
    run.add(CANDIDATES, [{"counts": {"a": 1}, "score": 0.5}])
    (folder / track.FOLDER / "tensorboard").mkdir(parents=True)
    write_json(folder / track.FOLDER / "tensorboard" / "written.json", {"train": 29})
    write_report(folder)
    return folder


UNREAD = {
    names.REPORT: "a page for people, which the next report writes anew",
    names.README: "for people, who may edit it",
    "student-int8.onnx": "beside a student: what `kdnas quantize` wrote for other programs",
}
"""Files of a run in which a flipped bit is not noticed, by name, and why: no command reads them."""


def plain(value):
    """A state as it can be compared."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value.tolist() if isinstance(value, torch.Tensor) else value


def content_of(path, top):
    """Everything that any command reads of a file."""
    run = RunFolder(top, builds=False)
    inner = str(path.relative_to(top))
    if (path.parent / names.CARD).exists():
        if path.name not in (names.CARD, names.WEIGHTS):
            return form_of(path.parent, path.name).read_bytes()
        network, card = read_student(path.parent)
        return card.to_json(), plain(network.state_dict())
    if path.suffix == ".safetensors":
        return plain(load_state(path))
    if path.suffix == ".jsonl":
        return run.lines(inner), run.ranking() if path.name == names.RANKING else None
    return run.manifest if path.name == names.MANIFEST else run.read(inner)


def test_no_flipped_bit_of_any_file_of_a_run_goes_unnoticed(current):
    files = sorted(path for path in current.rglob("*") if path.is_file() and not is_lock(path.name))
    assert {path.name for path in files} >= UNREAD.keys()
    files = [path for path in files if path.name not in UNREAD]
    assert {path.name for path in files} >= {names.METRICS, names.RESULTS, names.TRAININGS, names.HITS, names.WHY}
    whole = {path: content_of(path, current) for path in files}
    rng, refused = random.Random(0), 0
    for number in range(500):
        path = files[number % len(files)]
        content = path.read_bytes()
        place, bit = rng.randrange(len(content)), rng.randrange(8)
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
        try:
            same = content_of(path, current) == whole[path]
        except ValueError as error:
            refused += 1
            assert len(str(error)) < 500 and "\n" not in str(error), error
            assert path.name in str(error) or path.parent.name in str(error), (path, error)
        else:
            assert same, (path, place, bit)
        finally:
            path.write_bytes(content)
    assert refused > 400


def test_the_report_tolerates_every_kind_of_damage(current, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(current, folder)
    for name in ("run.json", "results.json", "ranking.jsonl", "metrics.jsonl", "students/student/student.json"):
        content = (folder / name).read_bytes()
        for damage in (content[:-30], b"\xff\xfe", b"[" * 100_000, b"[]", b"null", b'{"format": 9}'):
            (folder / name).write_bytes(damage)
            write_report(folder)
        (folder / name).write_bytes(content)


def edit(path, change):
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("run.json", b"[" * 100_000, "nested more than 64 deep"),
        ("run.json", b'{"job": "\xff"}' * 1000, "cannot be read"),
        ("run.json", b'{"job": {}, "phases": []}', "its 'phases' must be an object"),
        ("run.json", b'{"job": {}, "phases": {}, "searches": "x"}', "its 'searches' must be a list"),
        ("run.json", b'{"format": 7, "job": {}, "phases": {}}', "has format 7, and kdnas"),
        ("ranking.jsonl", b"[1, 2]\n", "line 1, is damaged: it holds no JSON object"),
        ("ranking.jsonl", b'{"format": 5}\n', "has format 5"),
        ("ranking.jsonl", b"", "the ranking of search 1"),
    ],
)
def test_damaged_files_are_one_sentence(stored, capsys, name, content, message):
    (stored / name).write_bytes(content)
    with pytest.raises(SystemExit) as end:
        main(["export", str(stored)])
    error = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and message in error and len(error) < 500


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"macs": 0}, "has macs 0 for the network"),
        ({"params": 1}, "has params 1 for the network"),
        ({"code": "ZZZ"}, "has code ZZZ for the network"),
        ({"architecture": {"nope": 1}}, "of another search space"),
        ({"architecture": True}, "its 'architecture' must be an object"),
        ({"score": "high"}, "its 'score' must be a number"),
    ],
)
def test_what_the_ranking_says_of_a_network_is_compared_at_export(stored, capsys, change, message):
    path = stored / "ranking.jsonl"
    lines = [json.dumps(json.loads(line) | change) for line in path.read_text().splitlines()]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(SystemExit) as end:
        main(["export", str(stored)])
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_export_takes_from_the_search_that_is_asked_for_and_replaces_nothing_trained(stored, capsys):
    main(["search", str(stored), "--num-evaluations", "4", "--scorer", "params"])
    capsys.readouterr()
    for number in (1, 2):
        main(["export", str(stored), "--search", str(number), "--out", f"s{number}", "--json"])
        told = json.loads(capsys.readouterr().out)
        assert told["search"] == number == read_json(Path(f"s{number}/student.json"), dict, "")["origin"]["search"]
    for arguments in (["--search", "3"], ["--out", str(stored / "students" / "place-2-retrained")]):
        with pytest.raises(SystemExit) as end:
            main(["export", str(stored), *arguments])
        assert end.value.code == 2
    assert "--force" in capsys.readouterr().err


@pytest.mark.parametrize("out", [["--out", "student"], []])
def test_a_retraining_replaces_no_student_unless_that_is_forced(stored, capsys, monkeypatch, out):
    students = stored / "students"
    monkeypatch.chdir(students)
    source = "student" if out else "place-2"
    before = {path: path.read_bytes() for path in students.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as end:
        main(["retrain", source, "--steps", "5", *out])
    assert end.value.code == 2
    assert "holds a student already. Use another --out, or --force" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in before} == before


def test_no_line_of_a_run_has_a_student_written_elsewhere(stored, capsys):
    folder = stored.parent / "format_1"
    path = folder / "trainings.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line | {"name": f"../../../{line['name']}"}) + "\n" for line in lines))
    before = sorted(stored.parent.parent.glob("*"))
    with pytest.raises(SystemExit) as end:
        main(["finals", str(folder), "--finalists", "2", "--steps", "30", "--batch-size", "32"])
    assert end.value.code == 2 and "which leads out of it" in capsys.readouterr().err
    assert sorted(stored.parent.parent.glob("*")) == before


@pytest.mark.parametrize("change", [{"hits": "xy"}, {"hits": "ff"}, {"images": 3}, {"images": -3}])
def test_hits_that_fit_no_test_images_are_one_sentence(stored, capsys, change):
    folder = stored.parent / "format_1"
    path = folder / "test_hits.jsonl"
    path.write_text("".join(json.dumps(json.loads(line) | change) + "\n" for line in path.read_text().splitlines()))
    with pytest.raises(SystemExit) as end:
        main(["finals", str(folder), "--finalists", "2", "--steps", "30", "--batch-size", "32"])
    error = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and "test_hits.jsonl" in error and "Remove" in error and len(error) < 500


def test_a_student_in_a_run_names_its_teacher_wherever_the_run_is_moved(stored):
    shutil.copytree(stored.parent / "teacher", stored / "teacher")
    network, card = read_student(stored / "students" / "student")
    teacher = {"make": "kdnas.teachers:student_teacher", "arguments": {"path": str(stored / "teacher")}}
    origin = {**card.origin, "teacher": teacher}
    write_student(stored / "students" / "new", network, type(card)(**{**card.__dict__, "origin": origin}), deploy=False)
    assert str(stored.parent) not in (stored / "students" / "new" / "student.json").read_text()
    moved = stored.rename(stored.with_name("moved"))
    student = moved / "students" / "new"
    source = source_of(student, read_student(student)[1], "teacher")
    assert source is not None and source["path"] == str(moved / "teacher")
    assert Run(moved).storage.finish("later", student=str(student)) is None
    assert str(moved.parent) not in (moved / "run.json").read_text()


def test_a_supernet_that_is_not_finite_is_not_searched(stored, capsys):
    path = stored / "checkpoint.safetensors"
    state = load_state(path)
    for tensor in state["training"]["model"].values():
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))
    save_state(path, state)
    with pytest.raises(SystemExit):
        main(["search", str(stored), "--num-evaluations", "3"])
    assert "that are not finite" in capsys.readouterr().err


def test_equal_scores_are_said(stored, log):
    path = stored / "checkpoint.safetensors"
    state = load_state(path)
    for name, tensor in state["training"]["model"].items():
        if tensor.is_floating_point() and not name.endswith("running_var"):
            tensor.zero_()
    save_state(path, state)
    few = {"num_evaluations": 3, "num_images": 8, "control": False, "max_time": 5.0}
    search(Run(stored), replace(Run(stored).experiment.search, scorer=spec("kdnas.scorers.rdm:Rdm"), **few))
    assert "all 3 scores are 0, so their order says nothing" in log.text


def test_a_student_at_chance_is_said_and_a_better_one_is_not(stored, log):
    student = stored / "students" / "place-2"
    recipe = Recipe(steps=1, batch_size=8, learning_rate=1e-9)
    settings = Retrain(distiller=spec("kdnas.distillers.from_labels:FromLabels"), recipe=recipe)
    retrain(student, settings, stored.parent / "new", deploy=False)
    assert re.search(r"The accuracy of the student new on \d+ test images, .*, is near chance \(10\.0%\)", log.text)
    log.clear()
    retrain(student, replace(settings, weights="inherited"), stored.parent / "other", deploy=False)
    assert "near chance" not in log.text


def test_a_student_at_chance_stands_in_the_closing_table(stored, monkeypatch, capsys):
    monkeypatch.setattr("kdnas.jobs.finals.near_chance", lambda hits, data, name: f"{name} is near chance")
    folder = str(stored.parent / "format_1")
    main(["finals", folder, "--finalists", "2", "--steps", "30", "--batch-size", "32"])
    assert "the student is near chance" in capsys.readouterr().out
