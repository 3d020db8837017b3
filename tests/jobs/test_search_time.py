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


def limits(run, monkeypatch, spent, **settings):
    """The seconds and the evaluations that every search of a job is allowed, where each takes as long as `spent`."""
    now, allowed = [100.0], {}
    original = job.run_search

    def timed(supernet, scorer, searcher, evidence, limits, *, labels, **options):
        name = labels[1] if labels[1] in (RANDOM, CONTRAST) else "search"
        allowed[name] = limits.seconds, limits.evaluations
        free = dataclasses.replace(limits, seconds=float("inf"))
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


def test_the_controls_have_as_long_as_the_search_took(run, monkeypatch):
    allowed, controls = limits(run, monkeypatch, {"search": 20, RANDOM: 20, CONTRAST: 20}, max_time=90.0, **CONTRASTED)
    assert allowed == {"search": (30.0, 6), RANDOM: (20.0, 6), CONTRAST: (20.0, 6)}
    assert "value" in controls["random search"] and "value" in controls["contrast"]


def test_the_controls_of_a_fast_search_have_a_second(run, monkeypatch):
    allowed, _ = limits(run, monkeypatch, {"search": 0.25, RANDOM: 0.25, CONTRAST: 0}, max_time=90.0, **CONTRASTED)
    assert allowed[RANDOM] == allowed[CONTRAST] == (1.0, 6)


def test_a_search_that_overran_leaves_its_controls_what_is_left(run, monkeypatch):
    allowed, controls = limits(run, monkeypatch, {"search": 80, RANDOM: 10, CONTRAST: 0}, max_time=90.0, **CONTRASTED)
    assert allowed == {"search": (30.0, 6), RANDOM: (10.0, 6)}
    assert controls["contrast"] == {"sentence": "The contrast is left out: the time is over."}


def test_without_time_left_the_random_search_is_left_out(run, monkeypatch):
    allowed, controls = limits(run, monkeypatch, {"search": 95}, max_time=90.0)
    assert allowed == {"search": (45.0, 6)}
    assert controls["random search"] == {"sentence": "Random search at equal cost is left out: the time is over."}
