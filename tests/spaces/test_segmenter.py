"""Elastic segmenters: subnets are their exported students at any size, and what is refused."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdnas.costs.count import cost, counted_macs
from kdnas.network import Network
from kdnas.randomness import initialised, torch_rng
from kdnas.spaces.resnet import ResNetStage
from kdnas.spaces.segmenter import Segmenter
from kdnas.supernet import Supernet
from kdnas.tables import load_space

BLOCKS = {
    "basic": (
        ResNetStage(widths=(4, 6), depths=(1, 2), ratios=(0.5, 1.0)),
        ResNetStage(widths=(8,), depths=(1,), stride=2),
    ),
    "mbconv": (
        ResNetStage(widths=(4, 6), depths=(1, 2), ratios=(2.0, 3.0)),
        ResNetStage(widths=(8,), depths=(1,), ratios=(2.0,), stride=2),
    ),
}


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(sorted(BLOCKS)), st.integers(0, 10**6), st.integers(5, 40), st.integers(5, 40))
def test_a_subnet_is_its_extracted_student_to_the_bit_at_any_size(block, seed, height, width):
    space = Segmenter(block=block, stages=BLOCKS[block], stem_widths=(4, 6), head_widths=(4, 6), classes=3)
    supernet = initialised(lambda: Supernet(space), 0).eval()
    architecture = space.sample(random.Random(seed))
    images = torch.randn(2, 3, height, width, generator=torch_rng(seed))
    with torch.no_grad():
        inside, outside = supernet(images, architecture), supernet.extract(architecture)(images)
    assert inside.logits.shape == (2, 3, height, width)
    assert torch.equal(inside.logits, outside.logits)
    assert all(torch.equal(a, b) for a, b in zip(inside.features, outside.features, strict=True))


@pytest.mark.parametrize("size", [(12, 20), (17, 33), (31, 9)])
def test_costs_are_exact_at_the_images_own_size(size):
    space = load_space("elastic_segmenter").fitted(classes=4, image_channels=3, size=size)
    for architecture in (space.smallest, space.largest):
        blueprint = space.blueprint(architecture)
        assert blueprint.image == (3, *size)
        with torch.device("meta"), counted_macs() as macs, torch.no_grad():
            Network(blueprint).eval()(torch.empty(1, 3, *size))
        assert cost(blueprint).macs == macs()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stages": ()}, "`stages` must not be empty"),
        ({"heads": ("aspp", "aspp")}, "each once"),
        ({"heads": ("unet",)}, "must be one of lraspp, aspp"),
        ({"head_depths": (1, 0)}, "ascending"),
        ({"block": "mbconv"}, "must be above 1"),
        ({"size": (5, 5, 5)}, "`size` must be height and width"),
        ({"resolutions": (64,)}, "must be left out"),
        ({"block": "dense"}, "basic"),
    ],
)
def test_settings_that_make_no_network_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Segmenter(**arguments)
