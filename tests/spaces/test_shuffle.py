"""The single-path one-shot space: count, published cost, units."""

import dataclasses
import random

import pytest
import torch

from kdnas.blocks.shuffle import ShuffleUnit
from kdnas.costs.count import cost
from kdnas.spaces.shuffle import Shuffle, ShuffleStage
from kdnas.supernet import Supernet
from kdnas.tables import load_space

SPACE = load_space("spos")
SMALL = dataclasses.replace(
    SPACE,
    stem_width=4,
    stem_stride=1,
    stages=(ShuffleStage(width=8, depth=2), ShuffleStage(width=12, depth=2)),
    head_width=16,
    resolutions=(8,),
)


def test_the_space_has_4_to_the_20_networks():
    assert SPACE.count() == 4**20


def test_the_released_architecture_has_its_published_cost():
    code = "21012020202300003233"
    architecture = SPACE.parse(code)
    measured = cost(SPACE.blueprint(architecture))
    assert SPACE.code(architecture) == code
    assert round(measured.macs / 1e6) == 323
    # Published as 3.5 M, cut off.
    assert int(measured.params / 1e5) == 35


def test_the_smallest_kernel_everywhere_has_the_parameters_counted_by_hand():
    def unit(before, width, outputs, kernel):  # a branch: 1x1, depthwise, 1x1
        hidden, after = outputs // 2, outputs - before
        weights = before * hidden + hidden * kernel**2 + hidden * after
        norms = 2 * (hidden + hidden + after)
        carried = 0 if width == outputs else before * kernel**2 + before * before + 4 * before
        return weights + norms + carried

    total = 3 * 16 * 9 + 2 * 16 + 640 * 1024 + 2 * 1024 + 1024 * 1000
    width = 16
    for outputs, depth in ((64, 4), (160, 4), (320, 8), (640, 4)):
        total += unit(width, width, outputs, 3) + (depth - 1) * unit(outputs // 2, outputs, outputs, 3)
        width = outputs
    assert cost(SPACE.blueprint(SPACE.parse("0" * 20))).params == total


def test_a_unit_carries_every_second_channel_on():
    unit, x = ShuffleUnit(4, 4).eval(), torch.randn(2, 4, 6, 6)
    y = unit(x)
    assert torch.equal(y[:, :2], x[:, 0::2])
    assert torch.equal(y[:, 2:], unit.branch(x[:, 1::2]))


@pytest.mark.parametrize("depthwise", [1, 3])
def test_a_unit_with_stride_halves_the_map(depthwise):
    assert ShuffleUnit(4, 10, 5, 2, depthwise)(torch.randn(2, 4, 7, 7)).shape == (2, 10, 4, 4)


def test_a_subnet_is_its_student_and_each_unit_has_weights_of_its_own():
    supernet, rng, images = Supernet(SMALL).eval(), random.Random(0), torch.randn(2, 3, 8, 8)
    for architecture in (SMALL.smallest, SMALL.largest, *(SMALL.sample(rng) for _ in range(4))):
        inside, outside = supernet(images, architecture), supernet.extract(architecture)(images)
        assert torch.equal(inside.logits, outside.logits)
        assert all(map(torch.equal, inside.features, outside.features))
    uniform = [cost(SMALL.blueprint(architecture)).params for architecture in SMALL.covering()]
    assert len(uniform) == 4
    ends = sum(p.numel() for end in ("stem:shared", "head:shared") for p in supernet.bank[end].parameters())
    assert sum(p.numel() for p in supernet.parameters()) == sum(uniform) - 3 * ends


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (ShuffleStage(width=4, depth=1), "width` must be even and above 4"),
        (ShuffleStage(width=9, depth=1), "width` must be even and above 4"),
        (ShuffleStage(width=8, depth=0), "depth` must be at least 1"),
    ],
)
def test_a_wrong_stage_is_refused(stage, message):
    with pytest.raises(ValueError, match=rf"`stages\[0\].{message}"):
        Shuffle(stem_width=4, stages=(stage,))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs": 4, "outputs": 8}, "equal, even widths"),
        ({"inputs": 3, "outputs": 3}, "equal, even widths"),
        ({"inputs": 8, "outputs": 8, "stride": 2}, "more channels out"),
        ({"inputs": 4, "outputs": 4, "depthwise": 2}, "must be 1 or 3"),
    ],
)
def test_a_wrong_unit_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ShuffleUnit(**arguments)
