"""What the finals say of a student: the sign and the sentence of every claim, and first what it loses."""

import numpy as np
import pytest

from kdnas.jobs.finals import CLAIMS, LOST, _claims
from kdnas.tasks.classification import Classification

ALWAYS, NEVER, HALF = [1.0] * 40, [0.0] * 40, [1.0, 0.0] * 20


def of(hits):
    """The claims from who hits which images, by the names of the closing table; every network is another one."""
    return _claims(
        Classification(), {name: np.array(own) for name, own in hits.items()}, {name: [name] for name in hits}
    )


def test_the_controls_are_subtracted_from_the_student_and_the_best_of_those_with_a_teacher_is_what_it_loses_to():
    claims = of({"student": ALWAYS, "control": NEVER, "random networks": HALF, "largest": NEVER, "contrast": HALF})
    assert {name: claim["value"] for name, claim in claims.items()} == {
        LOST: -0.5,
        "distillation": 1.0,
        "choice": 0.5,
        "size": 1.0,
        "contrasted": 0.5,
    }
    assert [name for name in CLAIMS if name in claims] == list(claims)
    assert not any("Here" in claim["sentence"] for claim in claims.values())
    low, high = claims[LOST]["interval"]
    assert (-high, -low) == tuple(claims["choice"]["interval"])
    assert claims[LOST]["sentence"].startswith("Points lost to the best control, the best of as many random networks")
    assert ": -50.00 [" in claims[LOST]["sentence"]


def test_teacher_choice_size_cost_and_score_that_did_not_help_are_named():
    others = ("control", "random networks", "largest", "longer", "contrast")
    claims = of({"student": NEVER} | dict.fromkeys(others, ALWAYS))
    assert claims.pop(LOST)["value"] == 1.0
    ends = [claim["sentence"].rpartition(" Here ")[2] for claim in claims.values()]
    assert ends == [
        "distillation did not help.",
        "the ranking chose no better than chance.",
        "the ranking chose no better than size does.",
        "a longer training of place 1 was worth more than the finalists.",
        "the other score chose better.",
    ]
    assert {claim["value"] for claim in claims.values()} == {-1.0}


def test_a_student_that_is_its_own_control_and_one_without_others():
    hits = {"student": np.array(HALF), "control": np.array(NEVER)}
    claims = _claims(
        Classification(), hits, {"student": ["finalist-1"], "largest": ["finalist-1"], "control": ["control-1"]}
    )
    assert claims["size"] == {"sentence": "The student is also the largest network within the budget, trained alike."}
    assert set(claims) == {"size", "distillation"}


def test_several_seeds_are_in_the_interval():
    seeds = np.stack([ALWAYS, NEVER, HALF])
    claims = of({"student": seeds, "control": seeds, "largest": HALF})
    assert claims["distillation"]["value"] == 0.0 and "3 seeds" in claims["distillation"]["sentence"]
    assert claims[LOST]["sentence"].endswith("They are not distinguishable from none.")
    low, high = claims["size"]["interval"]
    assert low < -0.3 and high > 0.3 and claims["size"]["value"] == pytest.approx(0.0)
