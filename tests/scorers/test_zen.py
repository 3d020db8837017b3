import dataclasses
import math

import numpy as np
import pytest
import torch

from kdnas.blocks.basic import ConvNormAct
from kdnas.network import BATCH_NORMS, Network
from kdnas.randomness import initialised, torch_rng
from kdnas.scorers.zen import Zen, _draw, _without_shortcuts
from kdnas.space import Blueprint, layer
from kdnas.spaces.vit import ViT
from tests.scorers.scene import SPACE, evidence, network


@pytest.fixture(scope="module")
def held():
    return evidence(4)


@torch.no_grad()
def test_it_is_the_papers_formula_on_gaussian_weights(held):
    student, batch = network(1), 8
    rng = torch_rng("zen", 0, 0)
    _draw(student, rng)
    x, noise = (torch.randn(batch, 3, 8, 8, generator=rng).double() for _ in range(2))
    logarithms, maps = 0.0, []
    for images in (x, x + 0.01 * noise):
        y = images
        for block in (student.stem, *(one for stage in student.stages for one in stage)):
            assert isinstance(block, ConvNormAct)
            y = torch.nn.functional.conv2d(
                y, block[0].weight.double(), stride=block[0].stride, padding=block[0].padding
            )
            variance = y.var((0, 2, 3), correction=0)
            if not maps:
                logarithms += 0.5 * math.log(variance.mean())
            y = ((y - y.mean((0, 2, 3), keepdim=True)) / (variance[:, None, None] + 1e-5).sqrt()).relu()
        maps.append(y.detach().numpy())
    expected = math.log(np.abs(maps[0] - maps[1]).sum((1, 2, 3)).mean()) + logarithms
    assert Zen().score(network(2), held).value == pytest.approx(expected, abs=1e-3)


def test_weights_are_unit_gaussian_and_norms_at_their_start():
    student = network(1)
    for norm in student.modules():
        if isinstance(norm, BATCH_NORMS):
            torch.nn.init.constant_(norm.weight, 5.0)
            torch.nn.init.constant_(norm.bias, 5.0)
    _draw(student, torch_rng("any"))
    weights = torch.cat([p.detach().flatten() for p in student.parameters() if p.dim() > 1])
    assert abs(float(weights.mean())) < 0.1
    assert abs(float(weights.std()) - 1) < 0.1
    norms = [m for m in student.modules() if isinstance(m, BATCH_NORMS)]
    assert norms
    assert all((m.weight == 1).all() and (m.bias == 0).all() for m in norms)


@pytest.mark.parametrize(
    "made",
    [
        layer("kdnas.blocks.resnet:BasicBlock", inputs=4, outputs=4),
        layer("kdnas.blocks.macro:InvertedResidual", inputs=4, outputs=4, hidden=8),
        layer("kdnas.blocks.mbconv:MBConv", inputs=4, outputs=4, expanded=8, shortcut="identity"),
    ],
)
def test_shortcuts_are_left_out(made):
    stem = layer(ConvNormAct, inputs=3, outputs=4)
    head = layer("kdnas.blocks.basic:PoolLinear", inputs=4, classes=3)
    student = initialised(lambda: Network(Blueprint(stem, ((made,),), head, (3, 8, 8))), 0).eval()
    bare, x = _without_shortcuts(student), torch.randn(2, 3, 8, 8)
    bare.load_state_dict(student.state_dict())
    for one in (student, bare):
        for name, parameter in one.stages[0].named_parameters():
            if name.endswith("weight"):
                torch.nn.init.zeros_(parameter)
    assert student(x).features[0].abs().sum() > 0
    assert bare(x).features[0].abs().sum() == 0


def test_more_draws_differ_less(held):
    def spread(**arguments):
        return np.std([Zen(**arguments).score(network(), dataclasses.replace(held, seed=s)).value for s in range(8)])

    assert spread(repeats=6, batch_size=8) < 0.7 * spread(repeats=1, batch_size=2)


def test_only_the_architecture_matters_and_more_of_it_scores_higher(held):
    first = Zen().score(network(1), held)
    assert Zen().score(network(2), held) == first
    assert Zen().score(network(1, SPACE.smallest), held).value < first.value


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="`repeats` must be at least 1"):
        Zen(repeats=0)
    with pytest.raises(ValueError, match="`batch_size` at least 2"):
        Zen(batch_size=1)


def test_images_have_the_networks_own_size(held):
    """Not the data's, which a transformer's positions do not fit."""
    space = ViT(patch=4, widths=(8,), depths=(2,), heads=(2,), ratios=(2.0,), head_width=4, cuts=(), resolutions=(8,))
    student = Network(space.blueprint(space.largest))
    evidences = [dataclasses.replace(held, images=torch.rand(4, 3, side, side)) for side in (8, 20)]
    first, second = (Zen().score(student, evidence).value for evidence in evidences)
    assert math.isfinite(first)
    assert first == second
