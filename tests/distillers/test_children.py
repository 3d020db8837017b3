"""Which subnets a sandwich really runs, as the model sees them."""

import random

import torch

from kdnas.distillers.base import Step
from kdnas.distillers.sandwich import Sandwich
from tests.distillers.spaces import ELASTIC, batch, supernet, watched


def children(seed, index, number=6):
    """The architectures behind the largest and the smallest, in order."""
    model = supernet(ELASTIC)
    runs = watched(model)
    for _, loss in Sandwich(terms=(), num_random=number).losses(model, batch(count=3), Step(index, 10, seed)):
        assert torch.isfinite(loss)
    largest, smallest, *rest = (architecture for architecture, _, _ in runs)
    assert largest == ELASTIC.largest and smallest == ELASTIC.smallest
    assert len(rest) == number
    return rest


def test_one_seed_and_step_always_have_the_same_children():
    first = children(3, 2)
    random.seed(9)
    torch.manual_seed(9)
    assert children(3, 2) == first


def test_another_step_and_another_seed_have_others():
    first = children(3, 2)
    assert children(3, 4) != first
    assert children(4, 2) != first


def test_the_children_of_a_step_differ_and_over_the_steps_every_option_is_drawn():
    first = children(0, 0)
    assert len(set(first)) > 3
    options = {item for step in range(10) for child in children(0, step) for item in child.items()}
    assert options == {(choice.name, option) for choice in ELASTIC.choices for option in choice.options}
