"""Systems compared on the toy data: planned by time, listed or left out with the reason, resumed."""

import json
import os
import random
import shutil
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from kdnas.cli.commands import main
from kdnas.costs.budget import Budget
from kdnas.jobs import _contestants as contestants
from kdnas.jobs import compare as job
from kdnas.jobs._arguments import load_settings
from kdnas.jobs.compare import compare, comparison_table, shared_compare
from kdnas.network import Network
from kdnas.randomness import initialised
from kdnas.report import write_report
from kdnas.report.comparison import read_comparison
from kdnas.runs.lock import command
from kdnas.settings import Compare, systems
from kdnas.specs import spec
from kdnas.tables import load_space
from kdnas.teachers.base import Frozen
from kdnas.training.loop import Training
from tests import faults
from tests.killing import no_graph  # noqa: F401
from tests.tasks import test_segmentation as segmentation
from tests.toy import data, files_with


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


def test_a_student_s_interval_is_that_of_its_measure():
    row = {"accuracy": 0.5, "params": 1, "macs": 2, "seconds": 3.0}
    low, high = contestants._student(row, data())["interval"]
    assert low < 0.5 < high
    assert contestants._student(row | {"interval": [0.4, 0.6]}, data())["interval"] == [0.4, 0.6]


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


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("adanas", "a grown ensemble answers for the whole image, the task segmentation has answers for every pixel"),
        ("cream", "the distiller prioritized needs one answer for the whole image"),
    ],
)
def test_a_system_for_whole_images_is_left_out_of_a_comparison_of_segmenters(name, reason):
    images, space = segmentation.shapes(), segmentation.space()
    blueprint = images.fitted(space).blueprint(images.fitted(space).smallest)
    teacher = Frozen(initialised(lambda: Network(blueprint), 0), preprocessing=images.preprocessing)
    made = spec("tests.tasks.test_segmentation:shapes")
    contest = contestants.Contest(
        data_spec=made, data=images, space=space, teacher_spec=made, teacher=teacher, budget=Budget(), seed=0
    )
    with pytest.raises(ValueError, match=reason):
        contestants.contestant(name, contest).step_seconds()


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
    path.write_text(json.dumps(held | {"format": 1}))
    again = compare(settings(), folder)
    assert again["plans"] == found["plans"]
    assert {**again["results"]["random_search"], "seconds": 0} == {**cut, "seconds": 0}


def test_two_processes_run_every_system_once_with_its_part_of_the_time(compared, tmp_path, monkeypatch):
    folder = shutil.copytree(compared[0], tmp_path / "shared")
    held = json.loads((folder / "compare.json").read_text())
    (folder / "compare.json").write_text(json.dumps(held | {"format": 1, "plans": {}, "results": {}, "seconds": 0.0}))
    ran, both = [], threading.Event()

    def system(name, contest):
        def run(place, plan):
            assert place.parent == folder and contest.teacher_spec["path"] == str(folder / "teacher" / "teacher")
            ran.append((name, plan))
            both.set() if threading.current_thread().name == "second" else both.wait(30)
            if name == "adanas":
                raise ValueError(f"{place}/run.json does not fit.")
            return held["results"]["spos"]

        return SimpleNamespace(plan=lambda seconds, each, steps: {"seconds": seconds, "steps": steps}, run=run)

    monkeypatch.setattr(job, "contestant", system)
    outcomes = {}

    def take_part():
        outcome = shared_compare(settings(), folder, f"sqlite:///{tmp_path}/compare.db")
        outcomes[threading.current_thread().name] = outcome

    with command():
        threads = [threading.Thread(target=take_part, name=name) for name in ("first", "second")]
        threads[0].start()
        while not (folder / ".lock").exists():
            assert threads[0].is_alive()
        threads[1].start()
        for thread in threads:
            thread.join(120)
    names = ["spos", "random_search", "adanas", "dna"]
    assert sorted(name for name, _ in ran) == sorted(set(names) & set(held["step_seconds"]))
    results = outcomes["first"]["results"]
    assert results == outcomes["second"]["results"] == read_comparison(folder)["results"]
    assert results["adanas"] == {"reason": f"adanas{os.sep}run.json does not fit."}
    assert dict(ran) == outcomes["first"]["plans"]


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


COMMAND = ["compare", "--data", "tests.toy:data", "--space", "toy", "--budget", "macs=70k", "--max-time", "9000"]
COMMAND += ["--systems", "spos", "--out", "compared"]


def steady(log):
    """What makes every plan the same on any machine, and notes each training step in a file."""

    def prepare():
        job._Comparison.seconds_left = property(lambda _: 9000.0)
        job.timed_step = contestants.timed_step = lambda *_: 1e6
        step = Training.step

        def counted(self, **options):
            with Path(log).open("a") as file:
                file.write("step\n")
            return step(self, **options)

        Training.step = counted

    return prepare


@pytest.mark.slow
def test_killed_anywhere_it_ends_alike_and_trains_nothing_twice(tmp_path):
    log = tmp_path / "steps"
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    for place in (whole, folder):
        place.mkdir()
    places = faults.command(COMMAND, whole, before=steady(log)).places
    assert (whole / "compared" / "report.html").exists()
    steps = len(log.read_text())
    log.unlink()
    at = random.Random(0).randrange(1, len(places))
    assert faults.command(COMMAND, folder, faults.kill(at), before=steady(log)).code == -signal.SIGKILL
    assert faults.command(COMMAND, folder, before=steady(log)).code == 0
    assert faults.differences(folder, whole) == []
    assert steps <= len(log.read_text()) <= steps + len("step\n")


def test_other_data_and_files_than_it_began_with_are_refused(tmp_path, monkeypatch):
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"1")
    teacher = spec("kdnas.teachers.zoo:torchvision_teacher", name="resnet18", weights=str(weights))
    folder = tmp_path / "compared"
    chosen = settings(teacher=teacher)
    job._read_state(chosen, data(), folder)
    assert str(tmp_path) not in (folder / "compare.json").read_text()
    assert job._read_state(chosen, data(), folder).data == data().fingerprint
    other = data()
    other.train.labels[0] += 1
    before = (folder / "compare.json").read_bytes()
    with pytest.raises(ValueError, match=r"another data: train has other images or labels\. Use another --out"):
        job._read_state(chosen, other, folder)
    weights.write_bytes(b"2")
    with pytest.raises(ValueError, match=r"another content of .*weights\.safetensors\. Use another --out"):
        job._read_state(chosen, data(), folder)
    assert (folder / "compare.json").read_bytes() == before
