"""Systems compared on the toy data: planned by time, listed or left out with the reason, resumed."""

import json

import pytest

from kdnas.cli.commands import main
from kdnas.costs.budget import Budget
from kdnas.jobs._arguments import load_settings
from kdnas.jobs.compare import compare, comparison_table
from kdnas.report import write_report
from kdnas.settings import Compare, systems
from kdnas.specs import spec
from kdnas.tables import load_space
from tests.toy import files_with


def settings(**changes):
    held = {"data": spec("tests.toy:data"), "space": load_space("toy"), "budget": Budget(macs=70_000), "max_time": 8.0}
    return Compare(**held | {"systems": ("spos", "random_search", "adanas", "dna")} | changes)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "compared"
    return folder, compare(settings(), folder)


def test_every_system_is_an_experiment_that_says_what_it_does():
    found = systems()
    assert {"spos", "ofa", "dna", "cream", "tgsa", "random_search"} <= set(found)
    assert all(found.values())


@pytest.mark.parametrize("name", sorted(systems()))
def test_every_system_has_a_small_size(name):
    load_settings(f"{name}:small", object)


def test_students_are_within_budget_and_retrained_for_equally_many_steps(compared):
    folder, found = compared
    done = {name: r for name, r in found["results"].items() if "reason" not in r}
    assert {"spos", "random_search", "adanas"} == set(done)
    for name, r in done.items():
        assert r["macs"] <= 70_000
        assert r["interval"][0] <= r["accuracy"] <= r["interval"][1]
        assert (folder / name / "report.html").exists()
    jobs = [json.loads((folder / name / "run.json").read_text())["job"] for name in ("spos", "random_search")]
    assert {job["retrain"]["recipe"]["steps"] for job in jobs} == {found["retrain_steps"]}
    assert jobs[0]["train"]["teacher"] == jobs[1]["train"]["teacher"]
    assert all(Budget(**job["search"]["budget"]) == Budget(macs=70_000) for job in jobs)
    assert jobs[0]["train"]["recipe"]["steps"] == found["plans"]["spos"]["steps"]
    assert not files_with(folder, folder.parent)


def test_a_system_that_does_not_fit_is_listed_with_the_reason(compared):
    _, found = compared
    # The toy space's second stage takes its input from a width that the first decides.
    assert "reason" in found["results"]["dna"]
    assert "dna is left out: " in comparison_table(found)


def test_the_table_has_the_best_first_and_the_teacher_beside(compared):
    lines = comparison_table(compared[1]).splitlines()
    shown = [line.split()[0] for line in lines[1:5]]
    assert set(shown) == {"spos", "random_search", "adanas", "teacher"}
    assert shown[3] == "teacher"
    accuracies = [compared[1]["results"][name]["accuracy"] for name in shown[:3]]
    assert accuracies == sorted(accuracies, reverse=True)


def test_the_report_links_the_runs(compared):
    folder, _ = compared
    page = (folder / "report.html").read_text()
    assert 'href="./spos/report.html"' in page and "dna" in page
    assert write_report(folder).read_text() == page


def test_an_interrupted_comparison_goes_on_with_its_plans(compared):
    folder, found = compared
    path = folder / "compare.json"
    held = json.loads(path.read_text())
    cut = held["results"].pop("random_search")
    path.write_text(json.dumps(held))
    again = compare(settings(), folder)
    assert again["plans"] == found["plans"]
    assert {**again["results"]["random_search"], "seconds": 0} == {**cut, "seconds": 0}


def test_other_settings_and_foreign_folders_are_refused(compared, tmp_path, capsys):
    with pytest.raises(ValueError, match="another seed"):
        compare(settings(seed=1), compared[0])
    (tmp_path / "note").write_text("mine")
    with pytest.raises(ValueError, match="something else"):
        compare(settings(), tmp_path)
    with pytest.raises(SystemExit):
        main(["compare", "--systems", "spoz", "--out", str(tmp_path / "new")])
    assert "Did you mean 'spos'" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="infeasible"):
        compare(settings(budget=Budget(macs=10)), tmp_path / "new")
