"""Every situation of this folder, and the script that runs files written for older module paths."""

import importlib
import re
import sys
from pathlib import Path

import pytest

from tests.cases import old_paths

HERE = Path(__file__).parent
CASES = sorted(path.stem for path in HERE.glob("[0-9][0-9]_*.py"))


@pytest.mark.parametrize("name", CASES)
def test_case(name, tmp_path, request):
    case = importlib.import_module(f"tests.cases.{name}")
    issue = getattr(case, "ISSUE", None)
    if issue is not None:
        # Only a failed assertion is the known fault: an error says that the case itself is out of date.
        request.applymarker(pytest.mark.xfail(strict=True, raises=AssertionError, reason=f"issue {issue}"))
    case.check(tmp_path)


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    monkeypatch.setattr(sys, "argv", sys.argv)

    def run_text(text):
        path = tmp_path / "old.py"
        path.write_text(text)
        old_paths.run(str(path), "--size", "4")

    return run_text


def test_a_file_written_for_the_old_paths_runs(run, capsys):
    with pytest.raises(SystemExit, match="3"):
        run(
            "import sys\n"
            "from kdnas.run import Run as Folder\n"
            "from kdnas.search import Entry, ranked\n"
            "from kdnas.similarity import kendall, pearson\n"
            "from kdnas.tables import load_space\n"
            "assert __name__ == '__main__'\n"
            "print(Folder.__name__, Entry.__module__, ranked.__module__, kendall.__module__, pearson.__module__)\n"
            "print(sys.argv[1:])\n"
            "sys.exit(3)\n"
        )
    places = "RunFolder kdnas.runs.entry kdnas.ranking.order kdnas.statistics kdnas.similarity"
    assert capsys.readouterr().out == f"{places}\n['--size', '4']\n"


def test_a_name_that_is_nowhere_is_an_error_with_the_places(run):
    with pytest.raises(ImportError, match=re.escape("kdnas.cost.nothing is in none of: costs.count costs.budget")):
        run("from kdnas.cost import nothing\n")


@pytest.mark.parametrize("old", sorted(old_paths.MOVED))
def test_every_old_module_leads_to_modules_of_today(old):
    for module in old_paths.MOVED[old].split():
        importlib.import_module(f"kdnas.{module}")


@pytest.mark.parametrize("old, name", sorted(old_paths.RENAMED))
def test_every_renamed_name_exists_today(run, old, name):
    run(f"from kdnas.{old} import {name}\n")


def test_the_changelog_lists_the_same_moves_and_names():
    text = (HERE.parents[1] / "docs" / "changelog.md").read_text(encoding="utf-8")
    moves = re.findall(r"^\| `kdnas\.([\w.]+)` \| (.*) \|$", text, re.MULTILINE)
    assert {old: set(re.findall(r"`kdnas\.([\w.]+)`", new)) for old, new in moves} == {
        old: set(new.split()) for old, new in old_paths.MOVED.items()
    }
    names = re.findall(r"^\| `kdnas\.([\w.]+):(\w+)` \| `(\w+)` \|$", text, re.MULTILINE)
    assert {(old, name): new for old, name, new in names} == old_paths.RENAMED
