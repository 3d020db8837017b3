"""A search and its controls share the time, by a clock of the test's own."""

import dataclasses
from types import SimpleNamespace

import pytest

from kdnas.jobs import search as job
from kdnas.jobs._run import Run
from kdnas.runs.entry import CONTRAST, RANDOM
from kdnas.runs.folder import RunFolder
from kdnas.scorers.macs import Macs
from kdnas.scorers.params import Params
from kdnas.settings import Search
from kdnas.specs import spec
from kdnas.teachers.load import load_teacher
from tests.toy import experiment


@pytest.fixture
def run(tmp_path):
    """A run without a supernet, so that nothing is trained."""
    train = dataclasses.replace(experiment().train, teacher=load_teacher("tests.toy:cnn"), distiller=None)
    job = dataclasses.replace(experiment(), train=train)
    return Run(RunFolder.create(tmp_path / "run", job.to_json(), 0).folder)


def limits(run, monkeypatch, spent, evaluations=None, **settings):
    """The seconds and the evaluations that every search of a job is allowed, where each takes as long as `spent`."""
    now, allowed = [100.0], {}
    original = job.run_search

    def timed(supernet, scorer, searcher, evidence, limits, *, labels, **options):
        name = labels[1] if labels[1] in (RANDOM, CONTRAST) else "search"
        allowed[name] = limits.seconds, limits.evaluations
        count = min(evaluations or limits.evaluations, limits.evaluations)
        free = dataclasses.replace(limits, seconds=float("inf"), evaluations=count)
        yield from original(supernet, scorer, searcher, evidence, free, labels=labels, **options)
        now[0] += spent[name]

    monkeypatch.setattr(job, "run_search", timed)
    monkeypatch.setattr(job, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    job.search(run, Search(scorer=spec(Params), num_evaluations=6, num_images=6, **settings))
    return allowed, run.storage.results()["controls"]


CONTRASTED = {"contrast": spec(Macs)}


@pytest.mark.parametrize(
    ("settings", "parts"), [({"control": False}, 1), ({}, 2), (CONTRASTED, 3), ({"control": False} | CONTRASTED, 2)]
)
def test_the_search_has_an_equal_share_of_the_time_beside_its_controls(run, monkeypatch, settings, parts):
    allowed, _ = limits(run, monkeypatch, {"search": 5, RANDOM: 5, CONTRAST: 5}, max_time=90.0, **settings)
    assert len(allowed) == parts
    assert allowed["search"] == (90.0 / parts, 6)


def test_the_time_that_the_search_leaves_is_divided_among_its_controls(run, monkeypatch):
    allowed, controls = limits(run, monkeypatch, {"search": 20, RANDOM: 20, CONTRAST: 20}, max_time=90.0, **CONTRASTED)
    assert allowed == {"search": (30.0, 6), RANDOM: (35.0, 6), CONTRAST: (50.0, 6)}
    assert "value" in controls["random search"] and "value" in controls["contrast"]


def test_without_a_limit_the_controls_have_none_however_long_the_search_took(run, monkeypatch):
    allowed, _ = limits(run, monkeypatch, {"search": 0.25, RANDOM: 0.25, CONTRAST: 0}, **CONTRASTED)
    assert allowed[RANDOM][1] == allowed[CONTRAST][1] == 6
    assert allowed[RANDOM][0] > 1e8 and allowed[CONTRAST][0] > 1e8


def test_controls_have_as_many_evaluations_as_the_search_did(run, monkeypatch):
    allowed, controls = limits(run, monkeypatch, {"search": 1, RANDOM: 1}, evaluations=4, max_time=90.0)
    assert allowed[RANDOM][1] == 4
    assert "that of 4 random subnets" in controls["random search"]["sentence"]


def test_a_search_that_overran_leaves_its_controls_what_is_left(run, monkeypatch):
    allowed, controls = limits(run, monkeypatch, {"search": 80, RANDOM: 10, CONTRAST: 0}, max_time=90.0, **CONTRASTED)
    assert allowed == {"search": (30.0, 6), RANDOM: (5.0, 6)}
    assert controls["contrast"] == {"sentence": "The contrast is left out: the time is over."}


def test_without_time_left_the_random_search_is_left_out(run, monkeypatch):
    allowed, controls = limits(run, monkeypatch, {"search": 95}, max_time=90.0)
    assert allowed == {"search": (45.0, 6)}
    assert controls["random search"] == {"sentence": "Random search at equal cost is left out: the time is over."}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"control": False}, "90 s for the search"),
        ({}, "90 s in 2 equal parts: the search, random search"),
        (CONTRASTED, "90 s in 3 equal parts: the search, random search, the contrast"),
    ],
)
def test_what_the_time_is_divided_into_is_logged_and_recorded(run, monkeypatch, caplog, settings, words):
    caplog.set_level("INFO", "kdnas")
    limits(run, monkeypatch, {"search": 1, RANDOM: 1, CONTRAST: 1}, max_time=90.0, **settings)
    assert f"time: {words}" in caplog.messages
    assert run.storage.phase("search")["stopped"] == f"6 unique architectures were evaluated ({words})"


def test_the_test_of_feasibility_takes_its_time_from_the_search(run, monkeypatch):
    def slow(check, rng, seconds):
        assert seconds == 90.0
        monkeypatch.setattr(job, "time", SimpleNamespace(perf_counter=lambda: 130.0))

    monkeypatch.setattr(job, "check_feasible", slow)
    allowed, _ = limits(run, monkeypatch, {"search": 0}, control=False, max_time=90.0)
    assert allowed["search"] == (60.0, 6)
