"""When a search is no better than random search."""

import pytest

from kdnas.architecture import Architecture
from kdnas.ranking import controls
from kdnas.runs.entry import Entry


def entries(*scores):
    return [Entry(Architecture({"a": i}), str(i), score, {}, 1, 1, 1, 0.0) for i, score in enumerate(scores)]


WORDS = "The search is not distinguishable from random search at this cost."


@pytest.mark.parametrize(("best", "unclear"), [(0.8, False), (0.7001, False), (0.7, True), (0.5, True), (-1.0, True)])
def test_a_search_is_told_from_random_search_by_its_best_score_alone(best, unclear):
    control = controls.random_search(entries(best - 1, best, best - 0.5), entries(0.1, 0.7, 0.3, 0.2))
    assert control["value"] == 0.7
    expected = f"The search's best score is {best:.4f}, that of 4 random subnets 0.7000."
    assert control["sentence"] == (f"{expected} {WORDS}" if unclear else expected)


def test_the_interval_of_the_best_random_score_by_hand():
    # The best of four draws from four is the k-th smallest or below with probability (k / 4)^4: 0.0039, 0.0625, 0.32.
    control = controls.random_search(entries(1.0), entries(0.1, 0.7, 0.3, 0.2))
    assert control["interval"] == [0.2, 0.7]
    assert controls.random_search(entries(1.0), entries(0.4))["interval"] == [0.4, 0.4]


def test_random_search_that_drew_nothing_is_no_comparison():
    control = controls.random_search(entries(1.0), [])
    assert set(control) == {"sentence"}
    assert "drew no network" in control["sentence"] and WORDS not in control["sentence"]
