"""The command line is derived from functions: it stays short."""

from pathlib import Path

import kdnas.cli

LIMIT = 380  # of which each command has a row of one to eight lines


def test_the_command_line_is_short():
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in _files()}
    assert sum(lengths.values()) <= LIMIT, lengths


def test_its_files_are_found():
    assert {"commands.py", "parser.py"} <= {path.name for path in _files()}


def _files() -> list[Path]:
    return sorted(Path(kdnas.cli.__file__).parent.rglob("*.py"))
