"""What a predictor knows of networks."""

import random

import numpy as np
import pytest

from kdnas.costs.count import cost
from kdnas.scorers._features import Features, choices, similarities, sizes
from kdnas.scorers.base import score_all
from kdnas.scorers.in_place import InPlace
from kdnas.tables import load_space
from tests.scorers.scene import SPACE, evidence, supernet

TOY = load_space("toy")
NETWORKS = [TOY.sample(random.Random(seed)) for seed in range(6)]


def test_choices_are_one_hot_and_missing_ones_all_zero():
    rows = choices(TOY, NETWORKS)
    assert rows.shape == (6, sum(len(choice.options) for choice in TOY.choices))
    ends = np.cumsum([0, *(len(choice.options) for choice in TOY.choices)])
    for row, architecture in zip(rows, NETWORKS, strict=True):
        for place, choice in enumerate(TOY.choices):
            expected = [float(architecture.get(choice.name) == option) for option in choice.options]
            assert row[ends[place] : ends[place + 1]].tolist() == expected
            assert sum(expected) == (choice.name in architecture)


def test_sizes_are_logarithms_and_the_smallest_network_has_no_choice_above_its_first_option():
    small, large = sizes(TOY, [TOY.smallest, TOY.largest])
    counted = cost(TOY.blueprint(TOY.largest))
    assert large[:2] == pytest.approx([np.log(counted.macs), np.log(counted.params)])
    assert small[2] == 0 and large[2] == len(TOY.choices)


def test_similarities_end_with_kl_and_are_largest_for_the_largest_subnet():
    networks, held = [SPACE.largest, *list(SPACE.all())[:5]], evidence()
    rows = similarities(supernet(), networks, held)
    kl = [score.value for score in score_all(supernet(), networks, InPlace(scorer="loss"), held)]
    assert rows[:, -1].tolist() == kl
    assert rows.shape[1] % 2 == 1 and rows[0, :-1] == pytest.approx(1, abs=1e-4)
    assert (rows[1:].max(0) <= rows[0] + 1e-5).all()


def test_groups_partition_the_columns_and_empty_ones_are_left_out():
    features = Features.of(np.zeros((2, 3)), np.zeros((2, 0)), np.ones((2, 2)))
    assert features.groups == ((0, 1, 2), (3, 4)) and features.values.shape == (2, 5)
