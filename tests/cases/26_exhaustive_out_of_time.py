"""Exhaustive search under a budget that hardly any network meets: the time limit holds while it looks for one."""

import random
import time
from unittest import mock

import torch

from kdnas.costs.budget import Budget
from kdnas.costs.check import BudgetCheck
from kdnas.costs.count import cost
from kdnas.ranking.loop import SearchLimits, run_search
from kdnas.scorers.base import Evidence, Score, Scorer
from kdnas.searchers.exhaustive import Exhaustive
from kdnas.supernet import Supernet
from kdnas.tables import load_space

SECONDS, GRACE = 0.2, 1.0


class Late(Exception):
    """The search still tests candidates long after its time."""


class Arbitrary(Scorer):
    reads_weights = False

    def score(self, student, evidence):
        return Score(random.random(), {})


def check(folder):
    space = load_space("digits")
    with torch.device("meta"):
        supernet = Supernet(space)
    smallest = cost(space.blueprint(space.smallest)).macs
    budget = BudgetCheck(space, Budget(macs=1.01 * smallest))
    now = 0.0

    def admits(architecture):
        nonlocal now
        now += 0.01  # of a clock that no load of the machine moves
        if now > SECONDS + GRACE:
            raise Late
        return budget.admits(architecture)

    searcher = Exhaustive(space=space, admits=admits, rng=random.Random(0))
    empty = torch.zeros(0)
    try:
        with mock.patch.object(time, "perf_counter", lambda: now):
            evidence = Evidence(empty, empty, empty, None)
            for _ in run_search(supernet, Arbitrary(), searcher, evidence, SearchLimits(50, SECONDS)):
                pass
    except Late:
        raise AssertionError(f"still searching {GRACE:g} s after the limit of {SECONDS:g} s") from None
