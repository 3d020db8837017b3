"""The tables of pruning in README and docs are those of the committed rows."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
PEERS = ("tp-local", "tp-global", "tp-group-norm", "uniform", "fastnas")


@pytest.fixture
def comparison(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import comparison

    yield comparison
    for name in ("comparison", "common"):
        sys.modules.pop(name)


def read_rows():
    with (ROOT / "benchmarks" / "same_work.csv").open(newline="") as handle:
        return list(csv.DictReader(handle))


@pytest.mark.parametrize("page", ["README.md", "docs/from_your_network.md"])
def test_the_table_is_that_of_the_rows(comparison, page):
    assert comparison.summary(read_rows(), PEERS, "macs", 700) in (ROOT / page).read_text(encoding="utf-8")


def test_a_row_that_changes_changes_the_table(comparison):
    rows = read_rows()
    before = comparison.summary(rows, PEERS, "macs", 700)
    row = next(row for row in rows if row["contestant"] == "kdnas-run")
    worse = np.zeros_like(comparison.hits_of(row)).astype(bool)
    row["test_hits"] = comparison.base64.b64encode(np.packbits(worse).tobytes()).decode()
    assert comparison.summary(rows, PEERS, "macs", 700) != before


def test_means_and_differences_of_a_table_are_those_of_its_rows(comparison):
    def row(name, hits):
        bits = comparison.base64.b64encode(np.packbits(np.array(hits, bool)).tobytes()).decode()
        cell = {"teacher": "resnet", "budget": "macs", "share": "0.5", "seed": "0", "steps": "700", "note": ""}
        return {**cell, "contestant": name, "test_hits": bits}

    rows = [row("kdnas-run", [1] * 8), row("kdnas-prune", [1] * 4 + [0] * 4), row("tp-local", [1] * 2 + [0] * 6)]
    lines = comparison.summary(rows, PEERS, "macs", 700).splitlines()
    assert lines[0] == "| retrained 700 steps | ResNet, 50 % | against the best peer |"
    assert [line.split("|")[2].strip() for line in lines[2:]] == ["100.0", "50.0", "25.0"]
    assert lines[2].split("|")[3].startswith(" +75.00 [") and lines[3].split("|")[3].startswith(" +25.00 [")


def test_what_run_hands_over_is_the_better_on_the_search_part_at_the_cost_of_both(comparison):
    row = next(row for row in read_rows() if row["contestant"] == "kdnas-run")
    pair = [row | {"search_accuracy": "0.70"}, row | {"search_accuracy": "0.71", "contestant": "kdnas-equal"}]
    pair[1]["test_hits"] = ""
    (better,) = comparison.returned([*pair, row | {"contestant": "kdnas-equal", "seed": "9"}])
    assert (better["contestant"], better["test_hits"], better["seed"]) == ("kdnas", "", row["seed"])
    assert better["retrain_cpu_seconds"] == pytest.approx(2 * float(row["retrain_cpu_seconds"]))
    assert comparison.returned(pair[:1]) == []


def test_what_all_rows_share_agrees_with_itself_grows_and_differs(comparison, tmp_path):
    agree = sys.modules["common"].agree
    place = tmp_path / "facts.json"
    for name in ("first", "second", "first"):
        agree({"recipe": {"steps": 3}, "teachers": {name: 1.5}}, place)
    agree({"recipe": {"steps": 3, "later": "kept"}, "teachers": {}}, place)
    facts = json.loads(place.read_text())
    assert facts["recipe"] == {"steps": 3, "later": "kept"} and facts["teachers"] == {"first": 1.5, "second": 1.5}
    with pytest.raises(SystemExit, match=r"has another recipe.steps: 3, now 4"):
        agree({"recipe": {"steps": 4}}, place)


def test_a_second_training_of_a_teacher_gives_more_seeds_of_its_cells(comparison):
    row = {"teacher": "resnet", "budget": "macs", "share": "0.5", "contestant": "tp-local", "seed": "0", "steps": "700"}
    first, second = (comparison.Task.of(row | {"teacher": name}) for name in ("resnet", "resnet-2"))
    assert first.cell == second.cell and first.name != second.name
    assert first.cell != comparison.Task.of(row | {"teacher": "mobilenet"}).cell
