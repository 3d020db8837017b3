"""No file chooses code: what a run, a student or a table may name, and what kdnas remembers."""

import contextlib
import copy
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
from torch import nn

from kdnas import trust
from kdnas.cli.commands import main
from kdnas.data.cifar import cifar10
from kdnas.data.load import LOADERS, load_data
from kdnas.jobs._run import Run
from kdnas.plain import show, show_everything
from kdnas.runs.folder import RunFolder
from kdnas.specs import algorithms, spec
from kdnas.students.load import load_student
from kdnas.tables import load_space, space_from_table, table_of
from kdnas.teachers.weights import load_weights
from kdnas.trust import Untrusted, admit, foreign_specs, is_own, remember, trusting
from tests.counting import counted
from tests.spaces.own_space import Own

GOLDEN = Path(__file__).parent / "golden"
EVIL = "evil_module:go"


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """A file that importing or calling the hostile module would write."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    path = folder / "marker"
    (folder / "evil_module.py").write_text(f"open({str(path)!r}, 'w')\n\ndef go(**kwargs):\n    return kwargs\n")
    monkeypatch.syspath_prepend(folder)
    yield path
    sys.modules.pop("evil_module", None)


@pytest.fixture
def state(tmp_path, monkeypatch):
    """An empty memory, as in a new process of the same user."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(trust, "_ADMITTED", set())
    return tmp_path / "state" / "kdnas"


@pytest.fixture
def stored(tmp_path, monkeypatch):
    shutil.copytree(GOLDEN, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def places(value, *path):
    """The path of every text in JSON content."""
    if isinstance(value, str):
        yield path
    for key, entry in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(entry, *path, key)


def replaced(content, path, value):
    changed = copy.deepcopy(content)
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return changed


def refusal(capsys, *arguments):
    """The message of a command that must end in one sentence and exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    error = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and "Traceback" not in error and len(error) < 500
    return error


def test_every_algorithm_and_what_people_type_is_kdnass_own():
    for kind in ("losses", "scorers", "searchers", "distillers", "spaces"):
        for path in algorithms(f"kdnas.{kind}").values():
            assert is_own(path), path
    for name, (_, more) in LOADERS.items():
        text = f"{name}:4" if more == "COUNT" else f"{name}:x" if more else name
        for each in (text, f"strong:{text}"):
            admit(load_data(each).to_json(), each)
    assert is_own("kdnas.losses:SoftTargets") and is_own("kdnas.data:digits") and is_own("optuna.pruners:MedianPruner")


def test_every_layer_of_every_space_is_kdnass_own():
    for path in sorted(Path("search_spaces").glob("*.toml")):
        space = load_space(path)
        admit(space.blueprint(space.sample(random.Random(0))).to_json(), path)


@pytest.mark.parametrize(
    "path",
    [
        "subprocess:run",
        "kdnas.specs:resolve",
        "kdnas.jobs.commands:run",
        "kdnas.blocks.basic:torch.load",
        "kdnas.blocks.basic:nn",
        "kdnas.blocks.basic:resize",
        "kdnas.data.load:Path",
        "kdnas.data.files:Image.open",
        "kdnas.losses.base:Loss.__init__",
        "kdnas.lossesx:SoftTargets",
        "kdnas.__main__:main",
        "kdnas.teachers.weights:load_weights",
        "kdnas.jobs._memory:keep",
        "optuna.pruners:os.system",
        "torch.hub:load",
        "builtins:eval",
    ],
)
def test_nothing_else_is(path):
    assert not is_own(path)
    with pytest.raises(Untrusted, match="names code that is none of kdnas's algorithms"):
        admit({"make": path, "arguments": {}}, "run.json")


@pytest.mark.parametrize(
    "content",
    [
        {"make": "kdnas.teachers.zoo:own_teacher", "arguments": {"function": EVIL}},
        {"make": "kdnas.distillers.from_teacher:FromTeacher", "arguments": {"terms": [[1.0, f"{EVIL},a=1"]]}},
        {"make": "kdnas.distillers.ranked:Ranked", "arguments": {"inner": {"make": EVIL, "arguments": {}}}},
        {"make": "kdnas.searchers.optuna_sampler:OptunaSampler", "arguments": {"sampler": EVIL}},
        {"family": EVIL},
        {"deep": [[{"x": {"family": EVIL}}]]},
    ],
)
def test_names_within_arguments_and_families_are_looked_at(content, marker):
    with pytest.raises(Untrusted, match=EVIL):
        admit(content, "a file")
    assert not marker.exists()


def test_no_text_of_a_run_json_runs_code(stored, marker, capsys):
    path = stored / "run.json"
    content = json.loads(path.read_text())
    for where in places(content):
        path.write_text(json.dumps(replaced(content, where, EVIL)))
        try:
            run = Run(stored)
            _ = run.experiment, run.teacher_spec
            _ = run.data if "data" in where else None
        except ValueError as error:
            assert len(str(error)) < 500 and "\n" not in str(error), where
        RunFolder(stored, strict=False)
        assert not marker.exists(), where
    named = replaced(content, ("job", "train", "data", "make"), "subprocess:run")
    named["job"]["train"]["data"]["arguments"] = {"args": ["touch", str(marker)]}
    path.write_text(json.dumps(named))
    for command in (
        ["search", stored],
        ["export", stored],
        ["why", stored, "00"],
        ["retrain", stored / "students/place-1"],
    ):
        assert "run.json names code that is none of kdnas's algorithms: subprocess:run." in refusal(capsys, *command)
    main(["report", str(stored)])
    assert not marker.exists()


def test_no_text_of_a_student_json_runs_code(stored, marker, capsys):
    student = stored.parent / "student"
    shutil.copytree(stored / "students" / "place-2", student)
    path = student / "student.json"
    content = json.loads(path.read_text())
    for where in places(content):
        path.write_text(json.dumps(replaced(content, where, EVIL)))
        try:
            load_student(student)
        except ValueError as error:
            assert len(str(error)) < 500, where
        assert not marker.exists(), where
    for where in (("blueprint", "stem", "make"), ("origin", "data", "make"), ("origin", "teacher", "make")):
        path.write_text(json.dumps(replaced(content, where, EVIL)))
        assert EVIL in refusal(capsys, "retrain", student, "--steps", "1")
    path.write_text(json.dumps(replaced(content, ("space", "family"), EVIL)))
    assert EVIL in refusal(capsys, "retrain", student, "--assistants", "auto")
    path.write_text(json.dumps(replaced(content, ("origin", "data", "make"), EVIL)))
    assert EVIL in refusal(capsys, "quantize", student)
    assert not marker.exists()


def test_the_report_of_a_hostile_student_draws_nothing_of_it(stored, marker):
    path = stored / "students" / "student" / "student.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(replaced(content, ("blueprint", "stem", "make"), EVIL)))
    main(["report", str(stored)])
    assert "has no blueprint that can be drawn here" in (stored / "report.html").read_text()
    assert not marker.exists()


def test_a_table_may_name_a_family_of_kdnas_only(tmp_path, marker, state, capsys):
    table = tmp_path / "mine.toml"
    table.write_text(f'family = "{EVIL}"\n')
    assert EVIL in refusal(capsys, "run", "--data", "digits", "--space", table, "--out", tmp_path / "out")
    assert not marker.exists()
    table.write_text('family = "tests.spaces.own_space:Own"\nwidths = [4, 8]\nresolutions = [8]\n')
    with pytest.raises(Untrusted, match="own_space:Own"):
        load_space(table)
    assert load_space(table, trust=True).count() > 1
    assert isinstance(space_from_table(table_of(Own(widths=(4, 8), resolutions=(8,)))), Own)


def test_what_was_begun_here_needs_no_flag_in_a_later_process_and_wherever_the_folder_lies(
    tmp_path, state, monkeypatch
):
    job = {"data": spec("tests.toy:data", size=3).to_json()}
    RunFolder.create(tmp_path / "run", job, 0)
    (tmp_path / "run").rename(tmp_path / "moved")
    monkeypatch.setattr(trust, "_ADMITTED", set())
    RunFolder(tmp_path / "moved")
    assert (state / "secret").stat().st_mode & 0o777 == 0o600
    assert all("tests" not in path.name for path in (state / "begun").iterdir())
    changed = json.loads((tmp_path / "moved" / "run.json").read_text())
    for value in (4, [3], "3"):
        changed["job"]["data"]["arguments"]["size"] = value
        (tmp_path / "moved" / "run.json").write_text(json.dumps(changed | {"format": 1}))
        with pytest.raises(Untrusted, match=r"tests\.toy:data"):
            RunFolder(tmp_path / "moved")


def test_a_run_of_another_user_needs_trust_once(tmp_path, state, monkeypatch):
    content = {"make": "tests.toy:data", "arguments": {"size": 3}}
    with pytest.raises(Untrusted):
        admit(content, "run.json")
    with trusting(True):
        admit(content, "run.json")
    monkeypatch.setattr(trust, "_ADMITTED", set())
    admit(content, "run.json")
    (state / "secret").write_bytes(bytes(32))
    monkeypatch.setattr(trust, "_ADMITTED", set())
    with pytest.raises(Untrusted):
        admit(content, "run.json")


def test_a_module_of_the_same_name_elsewhere_is_another_one(tmp_path, state, monkeypatch):
    content = {"make": "mine_alone:data", "arguments": {}}
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine_alone.py").write_text("def data(): ...\n")
    with monkeypatch.context() as patch:
        patch.syspath_prepend(tmp_path / "first")
        remember(content)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if str(tmp_path) not in p])
    monkeypatch.setattr(trust, "_ADMITTED", set())
    admit(content, "run.json")
    assert sys.path[-1] == str(tmp_path / "first")
    sys.path[-1] = str(tmp_path / "second")
    monkeypatch.setattr(trust, "_ADMITTED", set())
    with pytest.raises(Untrusted, match="mine_alone:data"):
        admit(content, "run.json")


@pytest.mark.parametrize("place", ["a-file", "relative", "theirs"])
def test_without_a_memory_of_its_own_a_process_remembers_alone(tmp_path, state, monkeypatch, place):
    (tmp_path / "a-file").write_text("")
    (tmp_path / "theirs" / "kdnas").mkdir(parents=True)
    (tmp_path / "theirs" / "kdnas").chmod(0o777)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "a-file"))
    monkeypatch.setenv("XDG_STATE_HOME", place if place == "relative" else str(tmp_path / place))
    content = {"make": "tests.toy:data", "arguments": {}}
    remember(content)
    admit(content, "run.json")
    monkeypatch.setattr(trust, "_ADMITTED", set())
    with pytest.raises(Untrusted):
        admit(content, "run.json")
    assert not (tmp_path / "relative").exists()


def test_a_refusal_lists_names_that_a_terminal_shows(capsys):
    with pytest.raises(Untrusted) as error:
        admit([{"make": f"m\x1b[2J{i}:f", "arguments": {}} for i in range(9)], "run\n.json")
    assert "and 4 more" in str(error.value) and len(error.value.names) == 9 and str(error.value).isprintable()


def test_specs_are_named_once_and_canonically():
    content = {"a": {"make": "x:y", "arguments": {"b": 1, "a": [2]}, "bank": "shared"}}
    other = {"other": [{"arguments": {"a": [2], "b": 1}, "make": "x:y"}]}
    assert dict(foreign_specs(content)) == dict(foreign_specs(other))


def test_a_file_in_the_working_folder_stands_in_for_no_module(tmp_path):
    marker = tmp_path / "marker"
    for name in ("json", "torch", "numpy", "logging", "pathlib", "typing", "datetime", "cattrs", "timm", "torchao"):
        (tmp_path / f"{name}.py").write_text(f"open({str(marker)!r}, 'w').close()\nraise SystemExit(9)\n")
    script = tmp_path / "bin" / "kdnas"
    script.parent.mkdir()
    script.write_text("from kdnas.cli.commands import main\nmain()\n")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    for start, what in ((["-m", "kdnas"], "data"), ([str(script)], "spaces")):
        command = [sys.executable, *start, "list", what]
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
        assert not marker.exists()


def test_a_module_that_the_command_line_names_is_found_where_the_user_stands(tmp_path, monkeypatch, capsys):
    (tmp_path / "mymodels_here.py").write_text("def make():\n    return 3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    assert "mymodels_here:make must return a Data, it returned a int" in refusal(
        capsys, "run", "--data", "mymodels_here:make", "--space", "toy", "--out", tmp_path / "out"
    )
    assert sys.path[-1] == str(tmp_path)


def test_links_out_of_a_run_are_refused_and_nothing_is_written_through(stored, tmp_path, capsys):
    outside = tmp_path / "outside.txt"
    outside.write_text("mine\n")
    (stored / "ranking.jsonl").unlink()
    (stored / "ranking.jsonl").symlink_to(outside)
    for command in (["search", stored, "--num-evaluations", "3"], ["export", stored]):
        assert "ranking.jsonl is a link that leads out of its folder" in refusal(capsys, *command)
    (stored / "ranking.jsonl").unlink()
    shutil.move(stored / "students", tmp_path / "elsewhere")
    (stored / "students").symlink_to(tmp_path / "elsewhere")
    assert "students is a link" in refusal(capsys, "export", stored)
    assert outside.read_text() == "mine\n"
    with trusting(True):
        RunFolder(stored)
    (stored / "students").unlink()
    (stored / "inside").symlink_to("run.json")
    RunFolder(stored)


@pytest.mark.parametrize("name", ["ranking.jsonl", "students/place-2", "run.json"])
def test_a_link_that_leads_to_itself_is_one_sentence(stored, capsys, name):
    path = stored / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to(path.name)
    for command in (["export", stored], ["retrain", stored / "students" / "place-2"])[name == "students/place-2" :]:
        refusal(capsys, *command)


HOSTILE = "x\x1b]0;title\x07\x9b2J\u202e\u2066\nnext: rm -rf"


def test_no_control_character_of_a_run_reaches_the_terminal(stored, capsys):
    for name in ("run.json", "results.json", "students/student/student.json"):
        content = json.loads((stored / name).read_text())
        for where in places(content):
            if "make" not in where and "family" not in where:
                content = replaced(content, where, HOSTILE)
        (stored / name).write_text(json.dumps(content, ensure_ascii=name == "run.json"))
    lines = [json.loads(line) for line in (stored / "ranking.jsonl").read_text().splitlines()]
    (stored / "ranking.jsonl").write_text("".join(json.dumps(line | {"code": HOSTILE}) + "\n" for line in lines))
    for command in (["report"], ["export"], ["search"], ["why"], ["retrain"]):
        folder = stored / "students" / "student" if command == ["retrain"] else stored
        arguments = [*command, str(folder), *([HOSTILE] if command == ["why"] else [])]
        with contextlib.suppress(SystemExit):
            main(arguments)
        captured = capsys.readouterr()
        for text in (captured.out, captured.err):
            assert not any(c in text for c in HOSTILE if not c.isprintable() and c != "\n"), command
            assert not any(line.startswith("next: rm") for line in text.splitlines()), command


def test_the_handler_the_table_and_a_traceback_print_escapes(capsys):
    logging.getLogger("kdnas").warning(f"class {HOSTILE}")
    show(HOSTILE)
    before = sys.excepthook, warnings.showwarning
    try:
        show_everything()
        sys.excepthook(ValueError, ValueError(HOSTILE), None)
        warnings.showwarning(HOSTILE, UserWarning, "file", 1)
    finally:
        sys.excepthook, warnings.showwarning = before
    captured = capsys.readouterr()
    for text in (captured.out, captured.err):
        assert "x" in text and all(c.isprintable() or c == "\n" for c in text)


def test_a_message_is_one_line_whatever_it_names(capsys, monkeypatch):
    def fail(name, values):
        raise ValueError(f"there is no {HOSTILE}")

    monkeypatch.setattr("kdnas.cli.commands._execute", fail)
    assert refusal(capsys, "list", "losses").startswith(
        r"kdnas list: there is no x\x1b]0;title\x07\x9b2J\u202e\u2066\nnext"
    )


def test_a_message_is_short_however_long_the_name_is(capsys, monkeypatch):
    def fail(name, values):
        raise ValueError(f"there is no {'../' * 9999}end of it. Check the path.")

    monkeypatch.setattr("kdnas.cli.commands._execute", fail)
    message = refusal(capsys, "list", "losses")
    assert len(message) < 500 and "…" in message and message.endswith("/end of it. Check the path.")


def test_what_grows_in_memory_is_refused_before_it_does(tmp_path, stored):
    weights = tmp_path / "bomb.pth"
    with zipfile.ZipFile(weights, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2**24))
    with pytest.raises(ValueError, match="bytes of memory"):
        load_weights(nn.Linear(1, 1), weights)
    bomb = tmp_path / "bomb.npz"
    with zipfile.ZipFile(bomb, "w") as archive:
        archive.writestr("train_jpeg.npy", b"")
        archive.infolist()[0].file_size = 2**40
    with pytest.raises(ValueError, match="bytes, more than"):
        cifar10(str(bomb))
    path = stored / "students" / "place-2" / "student.json"
    content = json.loads(path.read_text())
    wide = replaced(content, ("blueprint", "stem", "arguments", "outputs"), 2**30)
    path.write_text(json.dumps(wide))
    with pytest.raises(ValueError, match=r"numbers, and weights\.safetensors is smaller"):
        load_student(path.parent)


@pytest.mark.parametrize(
    "text",
    [
        "x = " + "[" * 100_000,
        "x = " + "{a = " * 100_000,
        ".".join("a" * 50_000) + " = 1",
        "[" + ".".join("a" * 50_000) + "]",
        ".".join(["'a b'"] * 50_000) + " = 1",
        'family = "toy"\nwidths = [4, 8]\nnum_stages = 100000',
        'family = "toy"\nwidths = [4, 100000000000000000000]',
        'family = "toy"\nx = ' + "[" * 70 + "]" * 70,
        "family = '\udcff'",
    ],
    ids=range(9),
)
def test_a_table_costs_no_more_than_a_table(tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")

    def load():
        with pytest.raises(ValueError) as error:
            load_space(path)
        return str(error.value)

    message, calls = counted(load)
    assert len(message) < 500 and calls < 50_000
    path.write_bytes(b"#" * (2**22 + 1))
    with pytest.raises(ValueError, match="larger than 4 MiB"):
        load_space(path)
