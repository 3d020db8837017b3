"""Several runs in one page."""

import json
import math

import pytest

from kdnas.cli.commands import main
from kdnas.report import write_report
from kdnas.report.side_by_side import flat, write_side_by_side
from kdnas.runs.folder import RunFolder
from kdnas.statistics import wilson
from tests.report.test_browser import make_compared
from tests.report.test_page import make_run, write


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of other seeds and budgets, tested on the same images."""
    root = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate(("first", "second")):
        make_run(root / name, num_architectures=40, steps=40, seed=seed)
        path = root / name / "run.json"
        content = json.loads(path.read_text()) | {"data": {"test": "1000 abc"}}
        content["job"]["budget"]["macs"] = 45e6 + seed
        write(path, content)
    results = root / "second" / "results.json"
    content = json.loads(results.read_text())
    content["rows"][1]["accuracy"] = 0.9813
    write(results, content)
    return [root / "first", root / "second"]


def test_the_page_has_students_rankings_times_and_settings_that_differ(runs, tmp_path):
    page = write_side_by_side(runs, tmp_path / "runs.html").read_text()
    assert page.index("98.13 %") < page.index("97.13 %")  # the better one first
    assert "97.1 % to 98.8 %" in page  # 981.3 of 1000 by Wilson
    assert "budget.macs" in page and "45000001.0" in page and "optimizer.momentum" not in page
    assert page.count("<h2>") == 6 and "cannot be compared" not in page
    for name in ("first", "second"):
        assert f">{name}</td>" in page
    assert "evolution" in page and "similarity" in page


def test_scores_of_networks_in_both_rankings_are_correlated(runs, tmp_path):
    lines = [json.loads(line) for line in (runs[0] / "ranking.jsonl").read_text().splitlines()]
    reversed_run = tmp_path / "reversed"
    make_run(reversed_run, num_architectures=40, steps=40, seed=0)
    for line in lines:
        line["score"] = 1 - line["score"]
    (reversed_run / "ranking.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    page = write_side_by_side([runs[0], reversed_run], tmp_path / "runs.html").read_text()
    assert "-1.0000" in page or "−1.0000" in page


def test_other_test_images_are_said(runs, tmp_path):
    make_run(tmp_path / "other", num_architectures=5, steps=10)
    page = write_side_by_side([runs[0], tmp_path / "other"], tmp_path / "runs.html").read_text()
    assert "tested on different images, so that their students cannot be compared" in page


def test_titles_and_intervals_are_those_of_the_measure(runs, tmp_path):
    for name in ("one", "two"):
        make_run(tmp_path / name, num_architectures=5, steps=10)
        manifest, results = tmp_path / name / "run.json", tmp_path / name / "results.json"
        write(manifest, json.loads(manifest.read_text()) | {"data": {"test": "1000 abc"}, "measure": "mIoU"})
        content = json.loads(results.read_text())
        content["rows"][1] |= {"interval": [0.9234, 0.9876]}
        write(results, content)
    page = write_side_by_side([tmp_path / "one", tmp_path / "two"], tmp_path / "runs.html").read_text()
    assert "mIoU against cost" in page and "Test mIoU" in page and "mIoU on the search part" in page
    assert "92.3 % to 98.8 %" in page and "(bootstrap)" in page and "Wilson" not in page
    page = write_side_by_side([runs[0], tmp_path / "one"], tmp_path / "runs.html").read_text()
    assert "The runs were measured by accuracy or mIoU, so that their students cannot be compared" in page


def test_a_comparison_has_the_titles_of_its_measure(tmp_path):
    make_compared(tmp_path)
    path = tmp_path / "compare.json"
    assert "Accuracy against cost" in write_report(tmp_path).read_text()
    write(path, json.loads(path.read_text()) | {"measure": "mIoU"})
    page = write_report(tmp_path).read_text()
    assert "mIoU against cost" in page and "Test mIoU" in page and "ccuracy against" not in page


def test_an_unfinished_run_is_compared_as_far_as_it_is(runs, tmp_path):
    RunFolder.create(tmp_path / "begun", {"steps": 3}, 0)
    page = write_side_by_side([tmp_path / "begun", runs[0]], tmp_path / "runs.html").read_text()
    assert ">begun</td>" in page and "97.13 %" in page


def test_runs_of_one_name_are_told_apart_and_one_run_twice_is_refused(runs, tmp_path):
    make_run(tmp_path / "deeper" / "first", num_architectures=5, steps=10)
    page = write_side_by_side([runs[0], tmp_path / "deeper" / "first"], tmp_path / "runs.html").read_text()
    assert ">deeper/first</td>" in page
    with pytest.raises(ValueError, match=r"must differ, got .*first twice"):
        write_side_by_side([runs[0], runs[0]], tmp_path / "runs.html")
    with pytest.raises(ValueError, match=r"is a folder\. Give --out a file"):
        write_side_by_side(runs, tmp_path)


def test_the_interval_of_a_share_is_wilsons():
    # The bounds solve (p - share)^2 = z^2 p (1 - p) / n.
    for hits, count in ((0, 10), (7, 10), (500, 1000), (10, 10)):
        for bound in wilson(hits, count):
            assert (bound - hits / count) ** 2 == pytest.approx(1.959964**2 * bound * (1 - bound) / count, abs=1e-12)
    assert not math.isnan(sum(wilson(0, 1)))


def test_settings_are_taken_apart_to_what_differs():
    job = {"a": {"make": "x:Y", "arguments": {"n": 2}}, "b": [1], "c": {}, "d": None}
    assert dict(flat(job)) == {"a.make": "x:Y", "a.arguments.n": "2", "b": "[1]", "c": "{}", "d": "null"}


def test_the_command_takes_one_run_or_several(runs, tmp_path, capsys):
    main(["report", *map(str, runs), "--out", str(tmp_path / "both.html")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "both.html") and (tmp_path / "both.html").exists()
    main(["report", str(runs[0])])
    assert (runs[0] / "report.html").exists()
