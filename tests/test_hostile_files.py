"""No file of a run, a student, a teacher, a comparison or a table chooses code: every text of every file is walked."""

import contextlib
import json
import shutil
from pathlib import Path

import pytest

from kdnas.cli.commands import main
from kdnas.costs.elsewhere import adopt
from kdnas.costs.latency import LatencyTable
from kdnas.costs.portable import signed
from kdnas.jobs._run import Run
from kdnas.jobs._trainings import TrainingRow, Trainings
from kdnas.jobs.finals import _Grades
from kdnas.jobs.predict import ImportedRow
from kdnas.jobs.prune import CANDIDATES, _Candidate
from kdnas.jobs.track import track
from kdnas.report.comparison import read_comparison
from kdnas.runs import folder as names
from kdnas.runs.folder import RunFolder
from kdnas.runs.steps import StudentSteps
from kdnas.students.card import form_of
from kdnas.students.folder import read_student
from kdnas.teachers.cache import INDEX, _stale
from kdnas.teachers.load import load_teacher
from kdnas.teachers.zoo import ZOO_CARD
from tests.report.test_browser import make_compared
from tests.test_flips import SEEN, latencies
from tests.test_trust import EVIL, marker, places, replaced, state

GOLDEN = Path(__file__).parent / "golden"
__all__ = ["marker", "state"]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, content)) if isinstance(content, list) else json.dumps(content))


@pytest.fixture
def everything(tmp_path, monkeypatch):
    """A folder with one of every JSON file that kdnas writes."""
    folder = tmp_path / "everything"
    shutil.copytree(GOLDEN / "format_1", folder / "run")
    shutil.copytree(GOLDEN / "teacher", folder / "teacher")
    run = folder / "run"
    write(run / names.WHY, {"code": "000000", "architecture": {"a": 1}, "changes": [{"choice": "x", "to": "y"}]})
    write(run / names.LATENCIES, [signed({"reference": 1.0, "device": "cpu (x)", "threads": 1}), {"layer": "x"}])
    write(run / names.PICTURES, {"classes": [["a", "#00ff00"]], "images": [{"number": 0, "image": "iVBORw0KGgo="}]})
    write(run / names.IMPORTED, [{"code": "000000", "accuracy": 0.5, "file": "a.csv"}])
    write(run / CANDIDATES, [{"counts": {"a": 1}, "score": 0.5}])
    write(run / "tracking" / "tensorboard" / "written.json", {"train": 1})
    write(folder / "begun" / names.BEGUN, {"settings": "0" * 64})
    write(
        folder / "cache" / INDEX, {"teacher": "x", "augmentation": "none", "files": {"view000-000000.safetensors": "0"}}
    )
    preprocessing = {"height": 8, "width": 8, "mean": [0.5], "std": [0.25], "interpolation": "bilinear"}
    card = {"zoo": "torchvision", "name": "no_such", "size": 0, "preprocessing": preprocessing}
    write(folder / "zoo" / ZOO_CARD, card | {"class_names": ["a", "b"], "origin": {"data": "digits"}})
    (folder / "zoo" / names.WEIGHTS).write_bytes(b"")
    for name in ("compared", "table"):
        (folder / name).mkdir()
    make_compared(folder / "compared")
    latencies(folder / "table")
    monkeypatch.chdir(folder)
    return folder


class Silent:
    """A tracker that does nothing."""

    def __init__(self, *_):
        self.start = self.write = self.close = lambda *_: None


def read_latencies(path):
    rows = RunFolder(path.parent).lines(path.name)
    LatencyTable(Run(path.parent).device, rows)


def lines(kind=dict):
    return lambda path: RunFolder(path.parent).lines(path.name, kind)


def read_card(path):
    read_student(path.parent)
    for name in names.STUDENT_FILES:
        with contextlib.suppress(ValueError):
            form_of(path.parent, name)
    load_teacher(f"checkpoint:{path.parent}").build(classes=10, preprocessing=SEEN)


READERS = {
    names.MANIFEST: lambda path: (Run(path.parent).experiment, Run(path.parent).teacher_spec),
    names.CARD: read_card,
    names.RANKING: lambda path: Run(path.parent).ranking(),
    names.RESULTS: lambda path: str(Run(path.parent)),
    names.METRICS: lines(names.Metric),
    names.TRAININGS: lambda path: Trainings(Run(path.parent)) and lines(TrainingRow)(path),
    names.HITS: lines(_Grades),
    names.IMPORTED: lines(ImportedRow),
    names.LATENCIES: read_latencies,
    names.WHY: lambda path: RunFolder(path.parent).read(names.WHY),
    names.PICTURES: lambda path: RunFolder(path.parent).read(names.PICTURES),
    names.COMPARISON: lambda path: read_comparison(path.parent),
    names.BEGUN: lambda path: StudentSteps(path.parent, settings="other"),
    CANDIDATES: lines(_Candidate),
    INDEX: lambda path: _stale(path.parent, {"teacher": "y"}),
    ZOO_CARD: lambda path: load_teacher(f"checkpoint:{path.parent}").build(classes=2, preprocessing=SEEN),
    "written.json": lambda path: track(path.parents[2], "tensorboard"),
    "a.json": adopt,
}
"""How each file is read, by its name; a file without a reader fails the test."""


def kinds(content):
    """A place of every kind: of the entries of a list one, of numbered names one."""
    seen = set()
    for where in places(content):
        kind = tuple("*" if isinstance(key, int) else key.rstrip("0123456789") for key in where)
        if kind not in seen:
            seen.add(kind)
            yield where


def unsigned(content):
    """Content without its checksum, which whoever plants a name can compute anew."""
    if isinstance(content, list):
        return [unsigned(line) for line in content]
    return (
        content if content.get("format") == 1 else {k: v for k, v in content.items() if k not in ("format", "checksum")}
    )


def planted(path):
    """The text of a file with each of its texts replaced in turn: by a path of foreign code, and by a spec of it."""
    text = path.read_text(encoding="utf-8")
    whole = [json.loads(line) for line in text.splitlines()[:1]] if path.suffix == ".jsonl" else json.loads(text)
    whole = unsigned(whole)
    for where in kinds(whole):
        for evil in (EVIL, {"make": EVIL, "arguments": {}}):
            changed = replaced(whole, where, evil)
            yield (
                where,
                "".join(json.dumps(x) + "\n" for x in changed) if path.suffix == ".jsonl" else json.dumps(changed),
            )


def test_no_text_of_any_file_runs_code(everything, marker, state, monkeypatch):
    monkeypatch.setitem(track.__globals__["_SINKS"], "tensorboard", Silent)
    files = sorted(path for path in everything.rglob("*") if path.suffix in (".json", ".jsonl"))
    cards = [path for path in files if path.name == names.CARD]
    constants = {
        value for value in vars(names).values() if isinstance(value, str) and value.endswith((".json", ".jsonl"))
    }
    assert {path.name for path in files} >= constants - {names.CONFIG}
    for path in (path for path in files if path not in cards[1:]):
        content, count = path.read_bytes(), 0
        for where, text in planted(path):
            path.write_text(text, encoding="utf-8")
            count += 1
            with contextlib.suppress(ValueError):
                try:
                    READERS[path.name](path)
                except ValueError as error:
                    assert len(str(error)) < 500, (path.name, where)
                    raise
            assert not marker.exists(), (path.name, where)
        assert count or path.name in ("written.json", names.BEGUN, CANDIDATES), path.name
        path.write_bytes(content)


def test_no_report_of_hostile_files_runs_code(everything, marker, state):
    for path in everything.rglob("*.json*"):
        content = (
            json.loads("[" + path.read_text(encoding="utf-8").strip().replace("}\n{", "},\n{") + "]")
            if path.suffix == ".jsonl"
            else [json.loads(path.read_text())]
        )
        content = unsigned(content)
        for where in list(places(content)):
            content = replaced(content, where, EVIL)
        path.write_text("\n".join(map(json.dumps, content)))
    for folder in ("run", "compared"):
        with contextlib.suppress(SystemExit):
            main(["report", folder])
    assert not marker.exists()
