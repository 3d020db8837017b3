"""What a chain says of itself: the sign and the sentence of every claim."""

from types import SimpleNamespace

import numpy as np

from kdnas.jobs import chain


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
