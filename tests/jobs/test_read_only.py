"""Runs and students that cannot be written: what reads them goes on, what writes says so with the file."""

import shutil
import sys
from pathlib import Path

import pytest

from kdnas.cli.commands import main
from tests.unprivileged import read_only, without_privileges

GOLDEN = Path(__file__).parents[1] / "golden"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="privileges are dropped as Linux has it")


@pytest.fixture
def stored(tmp_path, monkeypatch):
    shutil.copytree(GOLDEN / "format_1", tmp_path / "run")
    shutil.copytree(GOLDEN / "teacher", tmp_path / "teacher")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_read_only_is_read(stored, tmp_path):
    shutil.copytree(GOLDEN / "run", tmp_path / "run2")
    before = contents(stored)
    with read_only(stored):
        for command in (
            ["list", "losses"],
            ["report", "run", "run2", "--out", "both.html"],
            ["quantize", "run/students/student", "--out", "small.onnx", "--num-images", "16", "--most", "1"],
        ):
            code, output = without_privileges(*command)
            assert code == 0, (command, output)
    assert contents(stored) == before


def test_what_writes_into_a_read_only_run_is_one_sentence_with_the_file(stored):
    before = contents(stored)
    with read_only(stored):
        for command in (
            ["search", "run", "--num-evaluations", "3", "--scorer", "params"],
            ["finals", "run", "--finalists", "2", "--steps", "3"],
            ["export", "run"],
            ["report", "run"],
            ["retrain", "run/students/place-1", "--steps", "1"],
            ["quantize", "run/students/student", "--out", "run/students/int8.onnx", "--num-images", "16"],
        ):
            code, output = without_privileges(*command)
            last = output.splitlines()[-1]
            assert code == 2 and "Permission denied" in last and "run/" in last, (command, output)
    assert contents(stored) == before


def test_a_finished_run_needs_nothing_written(stored):
    main(["report", "run"])
    arguments = ["run", "--experiment", "again.py", "--out", "run"]
    Path("again.py").write_text(
        "from kdnas.jobs._run import Run\n\ndef experiment():\n    return Run('run').experiment\n"
    )
    main(arguments)
    before = contents(stored)
    with read_only(stored):
        code, output = without_privileges(*arguments)
    assert code == 0 and "teacher" in output, output
    assert contents(stored) == before


def test_what_cannot_be_read_is_one_sentence_with_the_file(stored):
    for name in ("run.json", "ranking.jsonl", "checkpoint.safetensors"):
        path = stored / name
        path.chmod(0)
        code, output = without_privileges("search", "run", "--num-evaluations", "3")
        last = output.splitlines()[-1]
        assert code == 2 and name in last and len(last) < 500, (name, output)
        path.chmod(0o644)
