"""The tables of the ranking's proof say what its rows say."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import proof_tables

    yield proof_tables
    sys.modules.pop("proof_tables")


def row(tables, seed, score, lost, tau, trainings=0):
    measures = {name: str(value) for name, value in zip(tables.MEASURES, [tau, *lost, 0.5], strict=True)}
    facts = {"space": "nas_bench_macro", "way": "labels", "seed": str(seed), "steps": "1", "batch_size": "2"}
    facts |= {"networks": "9", "train_seconds": "3", "covered": "0.9"}
    return {**facts, "score": score, "trainings": str(trainings), **measures}


def test_an_aim_is_met_by_the_mean_over_seeds_in_the_worst_budget(tables):
    def lines(second):
        rows = [row(tables, 0, tables.DEFAULT, (0.0, 0.1, 0, 0), 0.83), row(tables, 1, tables.DEFAULT, second, 0.80)]
        return list(tables.aims(rows))

    assert "at most 0.15 | 0.140" in lines((0.0, 0.18, 0, 0))[2] and lines((0.0, 0.18, 0, 0))[2].endswith("| met |")
    assert lines((0.0, 0.3, 0, 0))[2].endswith("| **missed** |")
    assert "0.815" in lines((0, 0, 0, 0))[3] and lines((0, 0, 0, 0))[3].endswith("| **missed** |")
    assert lines((0, 0, 0, 0))[4].endswith("| not measured |")


def test_an_interval_over_seeds_is_student_s(tables):
    assert tables.mean_with_interval([0.5]) == "0.50"
    # Two values: the mean +- 12.706 times their standard deviation over the square root of 2.
    assert tables.mean_with_interval([0.4, 0.6], 3) == "0.500 [-0.771, 1.771]"


def test_the_report_and_the_picture_show_every_score_of_the_rows(tables):
    rows = [row(tables, 0, name, (0.1, 0.2, 0.3, 2.0), 0.7) for name in tables.SHOWN]
    rows += [row(tables, 0, tables.BEST, (0, 0, 0, 0), 0.9, trainings=20)]
    text = "\n".join(tables.report(rows))
    assert all(f"| {words} | 0.70 | 0.10 | 0.20 | 0.30 | 2.00 | 0.50 |" in text for words in tables.SHOWN.values())
    assert f"| 20 trainings, {tables.BEST} | 0.90 |" in text and "0.90 |\n" in text
    drawing = tables.picture(rows)
    assert drawing.count("<circle") == 7 * 4 and "2.00 points" in drawing


def test_the_readme_s_table_and_picture_are_those_of_the_committed_rows(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import trainings

    rows = trainings.read_rows(ROOT / "benchmarks" / "trainings.csv")
    assert "\n".join(trainings.summary(rows)) in (ROOT / "README.md").read_text(encoding="utf-8")
    assert trainings.picture(rows) == (ROOT / "docs" / "trainings.svg").read_text(encoding="utf-8")
    rows[0]["tau"] = "40"
    assert "\n".join(trainings.summary(rows)) not in (ROOT / "README.md").read_text(encoding="utf-8")
    sys.modules.pop("trainings")
