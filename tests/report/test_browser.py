"""The report in a headless Chromium: nothing is cut off on any screen, and a print has no half-empty pages."""

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
    report[width] = faults;
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


def cut_off(folder: Path, page: str) -> dict[str, list]:
    """Per width of the screen, what is cut off."""
    frames = "".join(
        f'<iframe width="{width}" height="900" style="border:0" srcdoc="{html.escape(page)}"></iframe>'
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


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / ("a-run-with-a-long-name-" * 4)
    make_run(folder)
    make_long(folder)
    return write_report(folder).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def faults(page, tmp_path_factory):
    return cut_off(tmp_path_factory.mktemp("screens"), page)


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_cut_off(faults, width):
    assert faults[str(width)] == []


def test_what_is_cut_off_would_be_seen(tmp_path):
    wide = '<div style="overflow:auto"><div style="width:1200px">wide</div></div>'
    faults = cut_off(tmp_path, f"<!DOCTYPE html><body style='margin:0'>{wide}</body>")
    assert faults["1400"] == [] and faults["1000"] and faults["400"]


def test_a_print_has_no_half_empty_pages(page, tmp_path):
    dense = page.replace("</style>", "* { break-inside: auto !important; break-after: auto !important; }</style>")
    pages, least = num_pages(tmp_path, page, "page"), num_pages(tmp_path, dense, "dense")
    assert least <= pages <= least + 1
