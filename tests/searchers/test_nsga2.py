import random

import numpy as np
import pytest

from kdnas.runs.entry import Entry
from kdnas.searchers.nsga2 import Nsga2, crowding, sorted_fronts
from tests.searchers.table import MACRO, beats, entries_of, searched


def test_fronts_of_six_points_by_hand():
    points = np.array([[1, 5], [2, 2], [5, 1], [2, 5], [3, 3], [4, 4]], float)
    assert sorted_fronts(points) == [[0, 1, 2], [3, 4], [5]]
    assert sorted_fronts(np.array([[1, 1], [1, 1]], float)) == [[0, 1]]


def test_crowding_by_hand():
    points = np.array([[0, 10], [1, 6], [4, 5], [10, 0]], float)
    # Second: (4 - 0) / 10 + (10 - 5) / 10; third: (10 - 1) / 10 + (6 - 0) / 10.
    assert crowding(points).tolist() == pytest.approx([np.inf, 0.9, 1.5, np.inf])
    assert crowding(np.zeros((3, 2))).tolist() == [np.inf, 0.0, np.inf]


def test_fronts_peel_as_the_definition_says():
    values = np.random.default_rng(0).integers(0, 6, (80, 3)).astype(float)
    left = set(range(len(values)))
    for front in sorted_fronts(values):
        plain = {
            i for i in left if not any((values[j] <= values[i]).all() and (values[j] < values[i]).any() for j in left)
        }
        assert set(front) == plain
        left -= plain
    assert not left


def test_the_front_is_what_no_scored_network_beats():
    told = []
    searcher = Nsga2(space=MACRO, admits=lambda a: True, rng=random.Random(0), population=20, batch=10)
    for _ in range(15):
        scored = entries_of(searcher.ask(10))
        told += scored
        searcher.tell(scored)
    assert {e.code for e in searcher.front} == {e.code for e in told if not any(beats(o, e) for o in told)}
    assert [e.score for e in searcher.front] == sorted((e.score for e in searcher.front), reverse=True)


def covered(front: list[Entry]) -> float:
    """Area under the staircase of best score against MACs: larger is a better front."""
    steps = sorted((e.macs, e.score) for e in front)
    edges = [*(m for m, _ in steps), 120e6]
    best = np.maximum.accumulate([s for _, s in steps])
    return float(sum(b * (right - left) for b, left, right in zip(best, edges, edges[1:], strict=False)))


def test_its_front_is_better_than_that_of_random_search():
    wins = 0
    for seed in range(5):
        found = {name: searched(name, seed, 150)[0] for name in ("nsga2", "random_search")}
        wins += covered(found["nsga2"]) > covered(found["random_search"])
    assert wins >= 4


@pytest.mark.parametrize("arguments", [{"costs": ("latency",)}, {"population": 1}, {"batch": 1}])
def test_wrong_settings_are_refused(arguments):
    with pytest.raises(ValueError, match="at least 2"):
        Nsga2(space=MACRO, admits=lambda a: True, rng=random.Random(0), **arguments)
