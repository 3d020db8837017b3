"""Every code block in docs/ that is Python or a kdnas command runs, or has the reason why not in a comment above it."""

import ast
import functools
import importlib
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import kdnas
from kdnas.cli.commands import main
from kdnas.scorers.base import CombinedScorer
from kdnas.students.source import load_source

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
BLOCK = re.compile(r"(?:^<!-- (?P<mark>.*?) -->\n)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = sorted(p.name for p in DOCS.glob("*.md"))


class Block(NamedTuple):
    mark: str
    kind: str
    text: str


def blocks(page):
    return blocks_of(DOCS / page)


def blocks_of(path):
    text = path.read_text(encoding="utf-8")
    page_blocks = [Block(m["mark"] or "", m["kind"], m["text"]) for m in BLOCK.finditer(text)]
    assert 2 * len(page_blocks) == len(re.findall(r"^\s*```", text, re.MULTILINE)), "a block is not closed"
    return page_blocks


def commands(text):
    return [line.removeprefix("$ ") for line in text.splitlines() if re.match(r"(\$ )?kdnas ", line)]


@pytest.fixture
def few_references(monkeypatch):
    """The default score compares with 200 random networks, which takes longer than all the rest of a run of four."""
    reference = CombinedScorer.reference
    monkeypatch.setattr(CombinedScorer, "reference", lambda self, evidence, count: reference(self, evidence, 4))


@pytest.mark.usefixtures("few_references")
@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_a_page_runs(page, tmp_path, monkeypatch, capsys):
    # Every graph takes seconds to convert, and has tests of its own.
    monkeypatch.setattr("kdnas.students.forms.graph_of", lambda *_: b"")
    monkeypatch.setattr("kdnas.students.forms.load_graph", lambda path: load_source(path.parent))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    # Another page's package of the same name must not answer.
    for name in [n for n in sys.modules if n.partition(".")[0] == "mine"]:
        monkeypatch.delitem(sys.modules, name)
    names = {}
    for block in blocks(page):
        if block.mark.startswith("not run: "):
            assert len(block.mark) > len("not run: ") + 10, "the reason is missing"
            for test in re.findall(r"tests/[\w/]+\.py", block.mark):
                assert (ROOT / test).exists(), test
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


def test_every_page_is_on_the_map_and_in_the_site():
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in PAGES:
        assert page == "index.md" or f"({page})" in index, page
        assert re.search(rf"^ +- (.*: )?{page}$", navigation, re.MULTILINE), page


LINKED = sorted(p.relative_to(ROOT).as_posix() for p in [*ROOT.glob("*.md"), *ROOT.glob("[deb]*/*.md")])


def anchors(path):
    """The anchors of a page's headings, as both code hosts and mkdocs make them of headings without odd signs."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    heads = re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", head)).strip().lower() for head in heads]
    return {re.sub(r"[-\s]+", "-", head) for head in plain}


@pytest.mark.parametrize("page", LINKED)
def test_every_link_and_anchor_leads_somewhere(page):
    path = ROOT / page
    text = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)  # code has no links
    for target, _, anchor in re.findall(r"\]\(([^)#\s]*)(#([^)\s]+))?\)", text):
        if "://" in target:
            continue
        there = (path.parent / target).resolve() if target else path
        assert there.exists() and there.is_relative_to(ROOT), f"{page}: {target}"
        assert not anchor or anchor in anchors(there), f"{page}: {target}#{anchor}"


def messages():
    """Every text in the code, with a sign in place of what is put in."""
    for path in (ROOT / "kdnas").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_every_message_of_the_troubleshooting_page_is_one_of_the_code():
    known = list(messages())
    rows = re.findall(r"^\| (`.*?) \|", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) > 30
    for row in rows:
        parts = [
            re.escape(part) for words in re.findall(r"`([^`]+)`", row) for part in words.split("…") if part.strip()
        ]
        pattern = re.compile(".*?".join(parts), re.DOTALL)
        assert any(map(pattern.search, known)), row


@pytest.mark.parametrize(
    ("page", "text", "translated"),
    [
        ("jobs.md", "[a](../experiments/README.md#x)", "[a](experiments/README.md#x)"),
        (
            "experiments/README.md",
            "[a](../README.md) [b](dna.py) [c](schemes.md)",
            "[a](../index.md) b [c](schemes.md)",
        ),
        ("zh.md", "[a](../README.md) [b](https://x.org/y) [c](#d)", "[a](index.md) [b](https://x.org/y) [c](#d)"),
        ("CONTRIBUTING.md", "`[a](b.md)` [c](docs/jobs.md#exit-codes)", "`[a](b.md)` [c](jobs.md#exit-codes)"),
    ],
)
def test_links_between_docs_and_other_pages_are_those_of_the_site(page, text, translated):
    assert runpy.run_path(str(ROOT / ".ci" / "site.py"))["translated"](text, page) == translated


def test_every_page_has_its_place_in_the_site():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r"(\S+\.md)$", text, re.MULTILINE))
    outside = runpy.run_path(str(ROOT / ".ci" / "site.py"))["outside"]()
    assert listed == {*outside, *(path.name for path in DOCS.glob("*.md"))}


@pytest.mark.real
def test_the_site_is_built_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    api = (tmp_path / "site" / "api.html").read_text(encoding="utf-8")
    for name in ("run", "doctor", "SearchSpace", "Objective"):
        assert re.search(rf'id="kdnas[\w.]*\.{name}"', api), name
    assert "&gt;&gt;&gt;" not in re.sub("<pre.*?</pre>", "", api, flags=re.DOTALL)  # examples are code


@pytest.mark.usefixtures("few_references")
def test_the_python_example_of_the_readme_is_short_and_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    short = functools.partial(kdnas.run, steps=2, batch_size=32, num_evaluations=4, deploy=False)
    monkeypatch.setattr(kdnas, "run", short)
    (example,) = [block.text for block in blocks_of(ROOT / "README.md") if block.kind == "python"]
    assert len(example.splitlines()) <= 8
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    assert "place" in capsys.readouterr().out
    assert names["student"](torch.rand(2, 1, 8, 8)).shape == (2, 10)


def test_every_name_and_path_in_contributing_exists():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    names = re.findall(r"`(kdnas[\w.]*):([\w.]+)`", text)
    paths = re.findall(r"`((?:kdnas|tests|experiments|search_spaces|docs)/[\w./]*)`", text)
    assert len(names) > 30 and len(paths) > 10
    for module, name in names:
        assert functools.reduce(getattr, name.split("."), importlib.import_module(module)), name
    for path in paths:
        assert (ROOT / path).exists(), path


def test_the_map_of_the_rooms_is_the_import_contract():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    layers = next(c["layers"] for c in contracts if c["type"] == "layers")
    floors = {entry: len(layers) - i for i, layer in enumerate(layers) for entry in layer.split(" | ")}
    sources = [m for c in contracts if c.get("forbidden_modules") == ["torch"] for m in c["source_modules"]]
    rows = re.findall(
        r"^\| (\d+) \| `(\w+)`( ∅)? \|", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert {entry: int(floor) for floor, entry, _ in rows} == floors
    assert [int(floor) for floor, _, _ in rows] == sorted(floors.values(), reverse=True)
    assert {entry for _, entry, mark in rows if mark} == {
        m.removeprefix("kdnas.") for m in sources if m.count(".") == 1
    }


def test_every_command_is_shown_with_an_example():
    from kdnas.cli.commands import parser, sub_parsers

    text = "\n".join((DOCS / page).read_text(encoding="utf-8") for page in PAGES)
    for name in sub_parsers(parser()):
        assert re.search(rf"^(\$ )?kdnas {name} ", text, re.MULTILINE), name


def test_no_library_of_an_extra_is_installed_with_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {
        kind: {re.match(r"[\w-]+", line)[0] for line in lines}
        for kind, lines in project["optional-dependencies"].items()
    }
    optional = set().union(*(found for kind, found in names.items() if kind != "dev"))
    assert not optional & {re.match(r"[\w-]+", line)[0] for line in project["dependencies"]}
