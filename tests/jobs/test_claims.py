"""What a chain and a search claim of themselves: sign and sentence, and when a search is no better than random."""

from types import SimpleNamespace

import numpy as np
import pytest

from kdnas.architecture import Architecture
from kdnas.jobs import chain
from kdnas.jobs.search import _random_control
from kdnas.runs.entry import Entry


def of_run(monkeypatch, hits):
    """A run's claims from who hits which images, by the names of the closing table."""
    rows = [{"name": "teacher"}, *({"name": name} for name in hits)]
    run = SimpleNamespace(results=lambda: {"rows": rows}, path=lambda *names: names[-1])
    monkeypatch.setattr(chain, "student_hits", lambda name, data: np.array(hits[name], float))
    return dict(chain._claims(SimpleNamespace(storage=run, data=None)))


def test_the_chain_subtracts_the_controls_from_the_student(monkeypatch):
    always, never = [1] * 40, [0] * 40
    half = [1, 0] * 20
    hits = {"student": always, "control": never, "random 1": never, "random 2": half, "contrast": half}
    claims = of_run(monkeypatch, hits)
    assert {name: claim["value"] for name, claim in claims.items()} == {
        "distillation": 1.0,
        "choice": 0.75,
        "contrasted": 0.5,
    }
    assert "2 random subnets within the budget" in claims["choice"]["sentence"]
    assert not any("Here" in claim["sentence"] for claim in claims.values())


def test_the_chain_says_where_teacher_choice_and_score_did_not_help(monkeypatch):
    always, never = [1] * 40, [0] * 40
    hits = {"student": never, "control": always, "random 1": always, "contrast": always}
    claims = of_run(monkeypatch, hits)
    assert {name: claim["value"] for name, claim in claims.items()} == dict.fromkeys(claims, -1.0)
    assert claims["distillation"]["sentence"].endswith("Here distillation did not help.")
    assert claims["choice"]["sentence"].endswith("Here the ranking chose no better than chance.")
    assert claims["contrasted"]["sentence"].endswith("Here the other score chose better.")
    assert "1 random subnet within" in claims["choice"]["sentence"]


def entries(*scores):
    return [Entry(Architecture({"a": i}), str(i), score, {}, 1, 1, 1, 0.0) for i, score in enumerate(scores)]


WORDS = "The search is not distinguishable from random search at this cost."


@pytest.mark.parametrize(("best", "unclear"), [(0.8, False), (0.7001, False), (0.7, True), (0.5, True), (-1.0, True)])
def test_a_search_is_told_from_random_search_by_its_best_score_alone(best, unclear):
    control = _random_control(entries(best - 1, best, best - 0.5), entries(0.1, 0.7, 0.3, 0.2))
    assert control["value"] == 0.7
    expected = f"The search's best score is {best:.4f}, that of 4 random subnets 0.7000."
    assert control["sentence"] == (f"{expected} {WORDS}" if unclear else expected)


def test_the_interval_of_the_best_random_score_by_hand():
    # The best of four draws from four is the k-th smallest or below with probability (k / 4)^4: 0.0039, 0.0625, 0.32.
    control = _random_control(entries(1.0), entries(0.1, 0.7, 0.3, 0.2))
    assert control["interval"] == [0.2, 0.7]
    assert _random_control(entries(1.0), entries(0.4))["interval"] == [0.4, 0.4]


def test_random_search_that_drew_nothing_is_no_comparison():
    control = _random_control(entries(1.0), [])
    assert set(control) == {"sentence"}
    assert "drew no network" in control["sentence"] and WORDS not in control["sentence"]
