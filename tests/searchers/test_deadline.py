"""The time limit of a search holds while candidates are proposed, for every searcher."""

import random
import time

import pytest
import torch

from kdnas.costs.budget import Budget
from kdnas.costs.check import BudgetCheck
from kdnas.costs.count import cost
from kdnas.ranking.loop import SearchLimits, run_search
from kdnas.scorers.base import Evidence, Score, Scorer
from kdnas.searchers.base import Searcher
from kdnas.specs import algorithms, spec
from kdnas.supernet import Supernet
from kdnas.tables import load_space

NOTHING = Evidence(*(torch.zeros(0),) * 3, None)
SPACE = load_space("digits")


class Arbitrary(Scorer):
    reads_weights = False

    def score(self, student, evidence):
        return Score(random.random(), {})


class Clock:
    """A second passes at every question whether an architecture is admitted."""

    def __init__(self, monkeypatch, admits):
        self.now, self.asked, self._admits = 0.0, 0, admits
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def admits(self, architecture):
        self.now += 1.0
        self.asked += 1
        assert self.asked < 1000, "it proposes long after its time"
        return self._admits(architecture)


def searched(path, clock, space=SPACE):
    with torch.device("meta"):
        supernet = Supernet(space)
    searcher = spec(path).build(Searcher, space=space, admits=clock.admits, rng=random.Random(0))
    *entries, stopped = run_search(supernet, Arbitrary(), searcher, NOTHING, SearchLimits(50, 30.0))
    return entries, stopped


@pytest.mark.parametrize("name", sorted(algorithms("kdnas.searchers")))
def test_a_search_without_admitted_networks_ends_with_its_time(name, monkeypatch):
    clock = Clock(monkeypatch, lambda architecture: False)
    entries, stopped = searched(algorithms("kdnas.searchers")[name], clock)
    assert entries == [] and clock.asked <= 31
    assert stopped == "the time of 30 s is over after 0 unique architectures"


@pytest.mark.parametrize("name", ["evolution", "exhaustive", "nsga2", "random_search"])
def test_what_was_proposed_before_the_end_is_scored(name, monkeypatch):
    smallest = cost(SPACE.blueprint(SPACE.smallest)).macs
    check = BudgetCheck(SPACE, Budget(macs=4 * smallest))
    clock = Clock(monkeypatch, check.admits)
    entries, stopped = searched(algorithms("kdnas.searchers")[name], clock)
    assert entries and all(check.admits(entry.architecture) for entry in entries)
    assert "the time of 30 s is over" in stopped


def test_an_exhaustive_search_ends_among_assignments_that_are_other_networks_spellings(monkeypatch):
    space = load_space("kdas_digits")
    only = space.smallest
    clock = Clock(monkeypatch, lambda architecture: False)
    spelled = iter(range(10**6))

    def canonical(self, architecture):
        clock.now += 0.1
        assert next(spelled) < 1000, "it enumerates long after its time"
        return only

    monkeypatch.setattr(type(space), "canonical", canonical)
    entries, stopped = searched("kdnas.searchers.exhaustive:Exhaustive", clock, space)
    assert entries == [] and "the time of 30 s is over" in stopped
