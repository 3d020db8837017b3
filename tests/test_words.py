"""The count of identifiers that `make check` runs."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_spec = importlib.util.spec_from_file_location("ci_words", ROOT / ".ci" / "words.py")
words = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(words)


@pytest.fixture
def package(tmp_path):
    (tmp_path / "plain.py").write_text("def area(width, height):\n    return width * height\n")
    return tmp_path


def test_plain_names_pass(package, capsys):
    assert words.main([str(package), "--limit", "0"]) == 0
    assert "0 of 4 identifiers" in capsys.readouterr().out


def test_a_planted_file_over_the_limit_fails_and_is_named(package, capsys):
    (package / "planted.py").write_text("def size(_made, one):\n    found = [one for one in _made]\n    return found\n")
    assert words.main([str(package), "--limit", "500"]) == 1
    out = capsys.readouterr().out
    # `size` is a function's name and not counted; _made 2, one 3, found 2.
    assert "7 of 11 identifiers" in out and "636.4 per thousand, limit 500" in out
    assert f"     7 {package / 'planted.py'}" in out and "plain.py" not in out
    assert words.main([str(package), "--limit", "637"]) == 0


def test_attributes_strings_and_longer_names_are_not_counted(package):
    (package / "planted.py").write_text('width = box.found + found_widths + "made"\n')
    assert words.main([str(package), "--limit", "0"]) == 0


def test_a_folder_without_names_fails_instead_of_passing_empty(tmp_path):
    assert words.main([str(tmp_path)]) == 1


def test_make_check_runs_the_count():
    check = (ROOT / "Makefile").read_text().partition("\ncheck:")[2].partition("\n\n")[0]
    assert "$(BIN)/python .ci/words.py kdnas\n" in check + "\n"
