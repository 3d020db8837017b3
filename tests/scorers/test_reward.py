"""The reward of AKD: the score at the target, continuous in the cost."""

import itertools

import pytest

from kdnas.costs.count import cost as costs
from kdnas.scorers.accuracy import Accuracy
from kdnas.scorers.base import Score
from kdnas.scorers.latency import Latency
from kdnas.scorers.reward import Reward
from kdnas.specs import spec
from tests.scorers.scene import SPACE, evidence, network, supernet


def reward(spent, target=100.0, exponent=-0.07, worth=0.8):
    made = Reward(scorer="accuracy", target=target, exponent=exponent)
    return made.combine([Score(worth, {}), Score(spent, {"macs": spent})], evidence()).value


def test_at_the_target_it_is_the_score_and_it_falls_with_the_cost():
    assert reward(100.0) == 0.8
    assert reward(200.0) == pytest.approx(0.8 * 2**-0.07)
    grid = [reward(float(c)) for c in range(50, 200)]
    assert all(a > b for a, b in itertools.pairwise(grid))
    assert max(a - b for a, b in itertools.pairwise(grid)) < 0.002
    assert reward(200.0, exponent=0.0) == 0.8


def test_it_weighs_another_scorer_by_the_networks_own_cost():
    held = evidence()
    for cost in ("macs", "params"):
        student = supernet().extract(SPACE.smallest)
        alone = Accuracy().score(student, held).value
        made = Reward(scorer=spec(Accuracy), cost=cost, target=1.0)
        found = made.score(student, held)
        spent = getattr(costs(SPACE.blueprint(SPACE.smallest)), cost)
        assert found.value == pytest.approx(alone * spent**-0.07)
        assert found.parts["score"] == alone


def test_negative_scores_and_senseless_targets_are_refused():
    with pytest.raises(ValueError, match="must be non-negative"):
        reward(100.0, worth=-0.1)
    with pytest.raises(ValueError, match="`target` must be positive"):
        Reward(target=0.0)
    with pytest.raises(ValueError, match="`cost` must be one of macs, params, latency"):
        Reward(cost="joule")


def test_a_short_training_needs_no_supernet_and_accuracy_does():
    assert not Reward().reads_weights
    assert Reward(scorer="accuracy").reads_weights


def test_latency_is_measured_and_leaves_the_network_as_it_was():
    student = network()
    found = Latency(repeats=3).score(student, evidence())
    assert found.value == -found.parts["latency"] < 0
    assert not student.training
    assert not Latency.reads_weights
