import math

import pytest
import torch
from torch import nn

from kdnas.scorers.synflow import Synflow
from tests.scorers.scene import SPACE, evidence, network


@pytest.fixture(scope="module")
def held():
    return evidence(4)


class Chain(nn.Module):
    def __init__(self, first, second, bias=0.0):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.first, self.second = nn.Linear(192, 2), nn.Linear(2, 1)
        with torch.no_grad():
            for layer, value in ((self.first, first), (self.second, second)):
                layer.weight.fill_(value)
                layer.bias.fill_(bias)

    def forward(self, x):
        return self.second(torch.relu(self.norm(self.first(x.flatten(1)))))


def test_a_chain_by_hand(held):
    # Logit |a| |b| * 192 * 2, and each of the two layers gives back the whole of it.
    found = Synflow(weights="inherited").score(Chain(-0.5, 3.0), held)
    assert found.value == pytest.approx(math.log(2 * 0.5 * 3 * 192 * 2))


def test_biases_let_signal_in_but_are_not_counted(held):
    # Logit 2 b (192 a + c) + c: weights of the first layer give 2 b 192 a, of the second 2 b (192 a + c).
    a, b, c = 0.5, 3.0, 0.25
    found = Synflow(weights="inherited").score(Chain(a, b, -c), held)
    assert found.value == pytest.approx(math.log(2 * b * 192 * a + 2 * b * (192 * a + c)))


def test_normalisation_is_out_and_the_images_do_not_matter(held):
    plain, scaled = Chain(0.5, 3.0), Chain(0.5, 3.0)
    nn.init.constant_(scaled.norm.weight, 9.0)
    nn.init.constant_(scaled.norm.running_var, 4.0)
    scorer = Synflow(weights="inherited")
    assert scorer.score(scaled, held) == scorer.score(plain, held)
    assert scorer.score(plain, evidence(7)) == scorer.score(plain, held)
    assert isinstance(scaled.norm, nn.BatchNorm1d)


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30])
def test_no_flow_and_overwhelming_flow_are_finite(held, value):
    assert math.isfinite(Synflow(weights="inherited").score(Chain(value, value), held).value)


def test_a_larger_network_lets_more_through_and_no_graph_is_needed_around_it(held):
    with torch.no_grad():
        large, small = (Synflow().score(network(1, a), held).value for a in (SPACE.largest, SPACE.smallest))
    assert large > small
    assert Synflow().score(network(2), held) == Synflow().score(network(1), held)
