import pytest
import torch
from torch import nn

from kdnas.costs.count import cost
from kdnas.scorers.depth import Depth
from kdnas.scorers.macs import Macs
from kdnas.scorers.params import Params
from tests.scorers.scene import SPACE, Plain, evidence, network


@pytest.fixture(scope="module")
def held():
    return evidence(4)


def test_sizes_of_a_network_are_those_of_its_ranking(held):
    for architecture in (SPACE.smallest, SPACE.largest):
        student, expected = network(0, architecture), cost(SPACE.blueprint(architecture))
        assert Params().score(student, held).value == expected.params
        assert Macs().score(student, held).value == expected.macs
        layers = 1 + sum(map(len, SPACE.blueprint(architecture).stages))  # and the stem
        assert Depth().score(student, held).value == layers


def test_sizes_of_someone_elses_module_by_hand(held):
    convolutions = 64 * 3 * 6 * 9 + 16 * 6 * 8 * 9
    assert Macs().score(Plain(), held).value == convolutions + 8 * 3
    assert Params().score(Plain(), held).value == (3 * 6 * 9 + 6 + 2 * 6) + (6 * 8 * 9 + 8 + 2 * 8) + 8 * 3 + 3
    assert Depth().score(Plain(), held).value == 2


def test_counting_changes_nothing(held):
    student = Plain()
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    Macs().score(student, held)
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    assert isinstance(student, nn.Module) and student.training
