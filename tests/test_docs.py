"""Every code block in docs/ that is Python or a kdnas command runs, or says above it why it is not run."""

import re
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from kdnas.cli.commands import main
from kdnas.students.folder import load_source

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"(?:^<!-- (?P<mark>.*?) -->\n)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = sorted(p.name for p in DOCS.glob("*.md"))


class Block(NamedTuple):
    mark: str
    kind: str
    text: str


def blocks(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    found = [Block(m["mark"] or "", m["kind"], m["text"]) for m in BLOCK.finditer(text)]
    assert 2 * len(found) == len(re.findall(r"^\s*```", text, re.MULTILINE)), "a block is not closed"
    return found


def commands(text):
    return [line.removeprefix("$ ") for line in text.splitlines() if re.match(r"(\$ )?kdnas ", line)]


@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_a_page_runs(page, tmp_path, monkeypatch, capsys):
    # Every graph takes seconds to convert, and has tests of its own.
    monkeypatch.setattr("kdnas.students.folder.graph_of", lambda *_: b"")
    monkeypatch.setattr("kdnas.students.folder._runtime", lambda path: load_source(path.parent))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    # Another page's package of the same name must not answer.
    for name in [n for n in sys.modules if n.partition(".")[0] == "mine"]:
        monkeypatch.delitem(sys.modules, name)
    names = {}
    for block in blocks(page):
        if block.mark.startswith("not run: "):
            assert len(block.mark) > len("not run: ") + 10, "say why"
            continue
        if block.mark.startswith("file: "):
            path = tmp_path / block.mark.removeprefix("file: ")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")
            if path.suffix == ".py":
                compile(block.text, str(path), "exec")
            if path.name.startswith("test_"):
                assert pytest.main(["-q", "-p", "no:cacheprovider", "-c", "/dev/null", str(path)]) == 0
        elif block.kind == "python":
            exec(compile(block.text, page, "exec"), names)
        else:
            for command in commands(block.text):
                main(shlex.split(command, comments=True)[1:])
    capsys.readouterr()


def test_every_page_is_on_the_map_and_every_link_leads_somewhere():
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    for page in PAGES:
        assert page == "index.md" or f"({page})" in index, page
        for link in re.findall(r"\]\(([^)#]+)\)", (DOCS / page).read_text(encoding="utf-8")):
            assert link.startswith("https://") or (DOCS / link).exists(), f"{page}: {link}"


def test_every_command_is_shown_with_an_example():
    from kdnas.cli.commands import _commands, parser

    shown = "\n".join((DOCS / page).read_text(encoding="utf-8") for page in PAGES)
    for name in _commands(parser()):
        assert re.search(rf"^(\$ )?kdnas {name} ", shown, re.MULTILINE), name
