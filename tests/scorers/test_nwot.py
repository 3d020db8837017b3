import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from kdnas.network import batch_statistics
from kdnas.scorers.nwot import Nwot
from tests.scorers.scene import SPACE, evidence, network


class Two(nn.Module):
    """Two activation layers over given weights."""

    def __init__(self, first, second, activation=nn.ReLU):
        super().__init__()
        self.first, self.second = nn.Linear(2, 3, bias=False), nn.Linear(3, 2, bias=False)
        self.a, self.b = activation(inplace=True) if activation is nn.ReLU else activation(), activation()
        with torch.no_grad():
            self.first.weight.copy_(torch.tensor(first))
            self.second.weight.copy_(torch.tensor(second))

    def forward(self, x):
        return self.b(self.second(self.a(self.first(x.flatten(1)))))


def with_images(images):
    return dataclasses.replace(evidence(4), images=torch.tensor(images).reshape(-1, 1, 1, 2))


FIRST, SECOND = [[1.0, 0], [0, 1], [1, 1]], [[1.0, -1, 0], [0, 0, -1]]


def test_two_images_by_hand():
    # Image (1, 2): codes 111 and 00 (1 - 2 < 0, -3 < 0). Image (1, -2): 100 and 10. Equal in 2 of 5 places.
    held = with_images([[1.0, 2.0], [1.0, -2.0]])
    found = Nwot(weights="inherited").score(Two(FIRST, SECOND), held)
    assert found.value == pytest.approx(np.log(5**2 - 2**2))
    assert found.parts["units"] == 5


def test_smooth_activations_have_the_code_of_their_inputs_sign():
    held = with_images([[1.0, 2.0], [1.0, -2.0]])
    # Image (1, -2) enters the second layer as (0.73, -0.24, -0.27): codes 100 and 11. Equal in 1 of 5 places.
    found = Nwot(weights="inherited").score(Two(FIRST, SECOND, nn.SiLU), held)
    assert found.value == pytest.approx(np.log(5**2 - 1**2))


def test_it_agrees_with_hamming_distances_of_the_codes_of_a_network():
    held, student, codes = evidence(), network(3), []
    for module in student.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda _, __, y: codes.append((y > 0).flatten(1).double().numpy()))
    with torch.no_grad(), batch_statistics(student):
        student(held.images[:6])
    bits = np.concatenate(codes, 1)
    kernel = np.array([[bits.shape[1] - np.abs(a - b).sum() for b in bits] for a in bits])
    expected = np.linalg.slogdet(kernel)[1]
    assert Nwot(num_images=6, weights="inherited").score(network(3), held).value == pytest.approx(expected)


def test_images_of_one_code_have_a_finite_and_low_score():
    scorer = Nwot(weights="inherited")
    alike = scorer.score(Two(FIRST, SECOND), with_images([[1.0, 2.0], [1.0, 2.0]])).value
    assert -np.inf < alike < np.log(21)


def test_a_deeper_network_scores_higher_and_fresh_weights_ignore_the_inherited():
    held = evidence()
    deep, shallow = (Nwot().score(network(1, a), held).value for a in (SPACE.largest, SPACE.smallest))
    assert deep > shallow
    assert Nwot().score(network(2), held) == Nwot().score(network(1), held)
    inherited = [Nwot(weights="inherited").score(network(seed), held).value for seed in (1, 2)]
    assert inherited[0] != inherited[1]


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="num_images must be at least 2"):
        Nwot(num_images=1)
    with pytest.raises(ValueError, match="`weights` must be one of fresh, inherited"):
        Nwot(weights="")
