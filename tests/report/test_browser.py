"""The reports of all commands in a headless Chromium: nothing is cut off, and a print has no half-empty pages."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from kdnas.report import write_report
from tests.report.test_page import make_run, write, write_lines

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = (1400, 1000, 400)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (apt-get install chromium)")

# Every element whose content is wider than itself or that ends beyond the page, as [element, text, pixels].
MEASURE = """
window.onload = () => {
  const report = {};
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument, width = frame.clientWidth, faults = [];
    for (const details of page.querySelectorAll("details")) details.open = true;
    for (const element of page.body.querySelectorAll("*")) {
      const name = `${element.tagName.toLowerCase()}.${element.getAttribute("class") || ""}`;
      const note = [name, (element.textContent || "").slice(0, 40)];
      const box = element.getBoundingClientRect();
      if (box.width && (box.right > width + 1 || box.left < -1)) faults.push([...note, "page", box.right - width]);
      const html = element instanceof frame.contentWindow.HTMLElement;
      const over = element.scrollWidth - element.clientWidth;
      if (html && element.clientWidth && over > 1 && getComputedStyle(element).display !== "inline")
        faults.push([...note, "element", over]);
      const svg = element.tagName === "text" && element.closest("svg").getBoundingClientRect();
      if (svg && (box.left < svg.left - 1 || box.right > svg.right + 1))
        faults.push([...note, "svg", box.right - svg.right]);
    }
    report[frame.title] = faults;
  }
  const out = document.createElement("pre");
  out.id = "faults";
  out.textContent = JSON.stringify(report);
  document.body.append(out);
};
"""


def chromium(folder, *arguments):
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    done = subprocess.run([*command, *arguments], capture_output=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return done.stdout.decode()


def cut_off(folder: Path, pages: dict[str, str]) -> dict[str, list]:
    """Per page and width of the screen, such as `run 400`, what is cut off."""
    frames = "".join(
        f'<iframe title="{name} {width}" width="{width}" height="900" style="border:0" srcdoc="{html.escape(page)}">'
        "</iframe>"
        for name, page in pages.items()
        for width in WIDTHS
    )
    wrapper = folder / "wrapper.html"
    wrapper.write_text(f"<!DOCTYPE html><body>{frames}<script>{MEASURE}</script></body>", encoding="utf-8")
    dom = chromium(folder, "--window-size=1500,1000", "--dump-dom", wrapper.as_uri())
    return json.loads(html.unescape(re.search(r'<pre id="faults">(.*?)</pre>', dom, re.DOTALL)[1]))


def num_pages(folder: Path, page: str, name: str) -> int:
    """Number of pages of the print."""
    source, pdf = folder / f"{name}.html", folder / f"{name}.pdf"
    source.write_text(page, encoding="utf-8")
    chromium(folder, "--no-pdf-header-footer", f"--print-to-pdf={pdf}", source.as_uri())
    return len(re.findall(rb"/Type /Page\b", pdf.read_bytes()))


def make_long(folder: Path) -> None:
    """An explained architecture, many parts of a score, budgets of all kinds, many classes with long names."""
    rows = [json.loads(line) for line in (folder / "ranking.jsonl").read_text().splitlines()]
    for row in rows:
        row["parts"] = {f"teacher_stage_{stage}_to_student_stage_{stage}": row["score"] for stage in range(6)}
        row["spent"] = {"memory": 123_456_789.0, "latency": 0.012345}
        row["code"] = f"{row['code']}-{'0123456789' * 4}"
    write_lines(folder / "ranking.jsonl", rows)
    choices = [
        {"choice": f"stage{i}.block{i}.expansion", "from": "k3e3", "to": "k7e6", "score difference": 0.01 * i}
        | {"params difference": 10**7, "macs difference": -(10**9), "code": rows[i]["code"]}
        for i in range(20)
    ]
    dot = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII="
    row = {"number": 3, "quality": 0.5} | dict.fromkeys(("image", "truth", "teacher", "student"), dot)
    classes = [[f"a class with the long name {i}", "#4a8df2"] for i in range(40)]
    write(folder / "pictures.json", {"images": [row] * 3, "classes": classes})
    names = [*(f"stage {i}" for i in range(7)), "logits"]
    values = [[(i + j) / 20 for j in range(8)] for i in range(8)]
    stages = [{"stage": f"stage {i}", "layers": 3, "params": 10**8, "macs": 10**10} for i in range(5)]
    similarity = {"student": names, "teacher": names, "values": values}
    write(
        folder / "why.json",
        {"code": rows[0]["code"], "scorer": "rdm", "score": 0.8}
        | {"similarity": similarity, "choices": choices, "stages": stages},
    )
    path = folder / "students" / "student" / "student.json"
    card = json.loads(path.read_text())
    write(path, card | {"class_names": [f"a class with the long name {i}" for i in range(1000)]})


def make_pruned(folder: Path) -> None:
    """A pruning with its controls and trials, of imbalanced classes."""
    make_run(folder)
    manifest, closing = (json.loads((folder / name).read_text()) for name in ("run.json", "results.json"))
    cost = {"params": 1_234_567, "macs": 123_456_789}
    whole = {"params": 12_345_678, "macs": 1_234_567_890}
    counts = {f"stages_{stage}_block_{block}": 96 for stage in range(4) for block in range(6)}
    phases = {"removal": {"whole": whole, "left": cost, "candidates": 1234, "accuracy": 0.5, "counts": counts}}
    for loss in ("half labels, half teacher", "labels", "a tenth labels"):
        phases[f"trial: chosen removal, {loss}, inherited weights"] = {"accuracy": 0.9, "steps": 60, "seconds": 12.3}
    rows = []
    for name in ("teacher", "student", "equal", "random", "control"):
        phases[name] = {"accuracy": 0.9123, **cost, "seconds": 123.4}
        rows.append({"name": name, "balanced_accuracy": 0.8765, **phases[name]})
    job = {"prune": manifest["job"], "budget": {"macs": 0.25}, "source": "teacher"}
    write(folder / "run.json", manifest | {"job": job, "phases": phases})
    sentence = "The student's test accuracy less that of random channels and blocks removed to the same cost: +1.29."
    controls = {row["name"]: {"value": 0.01, "interval": [-0.01, 0.03], "sentence": sentence} for row in rows[2:]}
    write(folder / "results.json", closing | {"rows": rows, "controls": controls})


def make_grown(folder: Path) -> None:
    """An ensemble of five members, each of two candidates, with its controls."""
    make_run(folder)
    manifest = json.loads((folder / "run.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["phase"] == "student"]
    phases = [f"grown {member}.{candidate}" for member in range(1, 6) for candidate in (1, 2)]
    write_lines(folder / "metrics.jsonl", [line | {"phase": phase} for phase in phases for line in lines])
    row = {"accuracy": 0.9123, "params": 12_345_678, "macs": 1_234_567_890, "seconds": 1234.5}
    growth = {**row, "members": ["0123456789" * 3] * 5, "weights": [0.2] * 5}
    write(folder / "run.json", manifest | {"job": {"grow": manifest["job"]}, "phases": {"grow": growth}})
    names = ("grown", "single network", "random candidates", "not taught")
    sentence = "The ensemble's test accuracy less that of an ensemble grown from random candidates: +1.29 points."
    controls = {name: {"value": 0.01, "interval": [-0.01, 0.03], "sentence": sentence} for name in names[1:]}
    write(folder / "results.json", {"rows": [{"name": name, **row} for name in names], "controls": controls})


def make_compared(folder: Path) -> None:
    """Twelve systems with a row each, one of imbalanced accuracy, and three that do not fit."""
    row = {"accuracy": 0.9123, "balanced_accuracy": 0.8765, "interval": [0.8912, 0.9312], "params": 12_345_678}
    row |= {"macs": 1_234_567_890, "seconds": 1234.5, "without teacher": 0.9, "random": None, "evaluations": 12_345}
    said = ["The student's test accuracy less that of the student without a teacher: +1.29 [-0.1, +2.7] points."] * 2
    names = [f"a_system_of_name_{number}" for number in range(12)]
    results = {name: {**row, "macs": (k + 1) * 10**8, "said": said, "run": name} for k, name in enumerate(names)}
    reason = "an exact search needs a supernet trained by block_wise, and blocks of this space may share choices. " * 3
    results |= {f"absent_{number}": {"reason": reason} for number in range(3)}
    systems = dict.fromkeys(results, "a supernet under its sandwich rule, searched by evolution under predicted scores")
    settings = {"budget": {"macs": 45_000_000.0, "params": 1_000_000.0}, "max_time": 36_000.0}
    teacher = {"accuracy": 0.9785, "params": 1_272_330, "macs": 311_422_976, "seconds": 18.4}
    content = {"settings": settings, "systems": systems, "teacher": teacher, "results": results}
    write(folder / "compare.json", content)


def make_chain(folder: Path) -> None:
    """A run of the whole chain, explained."""
    make_run(folder)
    make_long(folder)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    makers = {"run": make_chain, "pruning": make_pruned, "growth": make_grown, "comparison": make_compared}
    texts = {}
    for name, make in makers.items():
        folder = tmp_path_factory.mktemp("runs") / (f"a-{name}-with-a-long-name-" * 4)
        folder.mkdir()
        make(folder)
        texts[name] = write_report(folder).read_text(encoding="utf-8")
    return texts


@pytest.fixture(scope="module")
def faults(pages, tmp_path_factory):
    return cut_off(tmp_path_factory.mktemp("screens"), pages)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["run", "pruning", "growth", "comparison"])
def test_nothing_is_cut_off(faults, name, width):
    assert faults[f"{name} {width}"] == []


def test_what_is_cut_off_would_be_seen(tmp_path):
    wide = '<div style="overflow:auto"><div style="width:1200px">wide</div></div>'
    faults = cut_off(tmp_path, {"wide": f"<!DOCTYPE html><body style='margin:0'>{wide}</body>"})
    assert faults["wide 1400"] == [] and faults["wide 1000"] and faults["wide 400"]


def test_a_print_has_no_half_empty_pages(pages, tmp_path):
    bodies = [re.search(r"<body.*?>(.*)</body>", page, re.DOTALL)[1] for page in pages.values()]
    styles = {re.search(r"<style>.*?</style>", page, re.DOTALL)[0] for page in pages.values()}
    (style,) = styles
    parts = "".join(f'<div style="break-before: page">{body}</div>' for body in bodies)
    page = f"<!DOCTYPE html><head>{style}</head><body>{parts}</body>"
    dense = page.replace("</style>", "div * { break-inside: auto !important; break-after: auto !important; }</style>")
    printed, least = num_pages(tmp_path, page, "page"), num_pages(tmp_path, dense, "dense")
    assert least <= printed <= least + len(pages)
