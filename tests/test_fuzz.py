"""Command lines, tables and stored files of random content end in one sentence; fixed seeds, `make fuzz`."""

import contextlib
import copy
import json
import random
import shutil
import tomllib
from pathlib import Path

import pytest

from kdnas.cli.commands import COMMANDS, main, parser, sub_parsers
from kdnas.jobs._run import Run
from kdnas.students.load import load_student
from kdnas.tables import load_space, space_from_table, table_of
from tests.test_trust import GOLDEN, replaced

pytestmark = pytest.mark.fuzz
ROOT = Path(__file__).parents[1]
VALUES = (
    None,
    True,
    -1,
    0,
    1,
    3,
    10**9,
    10**400,
    2.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\x1b[2J",
    "os:getcwd",
    [],
    [[]],
    {},
    [1, "a"],
)
VALUES += ({"make": "os:getcwd", "arguments": {}}, {"make": "kdnas.data:digits", "arguments": {"x": 1}}, "9" * 5000)
TEXTS = (
    "nan",
    "-1",
    "1e400",
    "0",
    "true",
    "x",
    "a:b",
    "digits",
    "toy",
    "folder:nowhere",
    "macs=nan",
    "macs=-1",
    "rdm,premature=inf",
)
TEXTS += (
    "ensemble:" * 50,
    "strong:" * 50 + "digits",
    "\x1b[2J",
    "é",
    "json:dumps",
    "subprocess:run",
    ",",
    "=",
    "a=b,c",
    "9" * 400,
    "--",
    "-x",
)


def paths(value, *path):
    """The path of every value in plain content."""
    if path:
        yield path
    for key, entry in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from paths(entry, *path, key)


def changed(content, rng):
    """Content with one value replaced, removed or doubled."""
    where = rng.choice(list(paths(content)))
    result = replaced(content, where, copy.deepcopy(rng.choice(VALUES)))
    if rng.random() < 0.2:
        place = result
        for key in where[:-1]:
            place = place[key]
        del place[where[-1]]
    return result


def one_sentence(call, *arguments):
    """Call; a ValueError must be short and printable, and nothing else may be raised."""
    with contextlib.suppress(ValueError):
        try:
            call(*arguments)
        except ValueError as error:
            text = str(error)
            assert len(text) < 1000 and text.replace("\n", "").isprintable(), text
            raise


@pytest.mark.parametrize("seed", range(8))
def test_tables(seed):
    rng = random.Random(seed)
    tables = sorted((ROOT / "search_spaces").glob("*.toml"))
    for _ in range(40):
        content = tomllib.loads(rng.choice(tables).read_text(encoding="utf-8"))
        for _ in range(rng.randint(1, 3)):
            content = changed(content, rng)
        one_sentence(lambda table: table_of(space_from_table(table)), content)


@pytest.mark.parametrize("seed", range(8))
def test_texts_of_tables(seed, tmp_path):
    rng = random.Random(seed)
    path = tmp_path / "mine.toml"
    tables = sorted((ROOT / "search_spaces").glob("*.toml"))
    for _ in range(40):
        content = bytearray(rng.choice(tables).read_bytes())
        for _ in range(rng.randint(1, 5)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(content)
        one_sentence(load_space, path)


@pytest.mark.parametrize("seed", range(4))
def test_stored_files(seed, tmp_path, monkeypatch):
    rng = random.Random(seed)
    shutil.copytree(GOLDEN, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    run, student = tmp_path / "run", tmp_path / "run" / "students" / "place-2"
    manifest, card = (json.loads(path.read_text()) for path in (run / "run.json", student / "student.json"))
    for _ in range(60):
        (run / "run.json").write_text(json.dumps(changed(manifest, rng)))
        one_sentence(lambda: Run(run).experiment)
        (student / "student.json").write_text(json.dumps(changed(card, rng)))
        one_sentence(load_student, student)


@pytest.mark.parametrize("seed", range(4))
def test_command_lines(seed, tmp_path, monkeypatch, capsys):
    rng = random.Random(seed)
    shutil.copytree(GOLDEN, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for _ in range(60):
        name = rng.choice(sorted(set(COMMANDS) - {"demo", "losses", "compare"}))
        options = sub_parsers(parser())[name]._actions
        arguments = [name]
        for option in rng.sample(options, min(len(options), rng.randint(1, 5))):
            text = rng.choice((*TEXTS, "run", "run/students/place-2", "out"))
            arguments += [option.option_strings[0], text] if option.option_strings else [text]
        with contextlib.suppress(SystemExit):
            main(arguments)
        for text in capsys.readouterr():
            assert "Traceback" not in text and text.replace("\n", "").replace("\t", "").isprintable(), arguments
