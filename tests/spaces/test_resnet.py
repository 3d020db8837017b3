"""Residual networks: DisWOT's space, the elastic table, and the blocks."""

import dataclasses
import random

import pytest
import torch
from torch import nn

from kdnas.blocks.resnet import BasicBlock, Bottleneck
from kdnas.costs.count import cost
from kdnas.network import Network
from kdnas.spaces.resnet import ResNet, ResNetStage
from kdnas.supernet import Supernet
from kdnas.tables import load_space, space_from_table, table_of

S1 = load_space("diswot_s1")
ELASTIC = load_space("elastic_resnet")


def small(block):
    return ResNet(
        block=block,
        stem_widths=(4, 6),
        stages=(
            ResNetStage(widths=(4, 8), depths=(1, 2), ratios=(0.25, 0.5)),
            ResNetStage(widths=(8, 12), depths=(2,), ratios=(0.25, 0.5), stride=2),
        ),
        resolutions=(8, 12),
    )


# ResNet-20, -32 and -44 with projecting shortcuts: millions of parameters and MACs of the public CIFAR-100 models.
@pytest.mark.parametrize(("code", "params", "macs"), [("333", 0.28, 40.82), ("555", 0.47, 69.13), ("777", 0.67, 97.44)])
def test_diswot_s1_holds_the_classic_resnets_at_their_published_cost(code, params, macs):
    measured = cost(S1.blueprint(S1.parse(code)))
    assert (round(measured.params / 1e6, 2), round(measured.macs / 1e6, 2)) == (params, macs)
    assert S1.code(S1.parse(code)) == code


def test_diswot_s1_has_64_networks_named_by_their_depths():
    assert S1.count() == 64
    assert {S1.code(a) for a in S1.all()} == {f"{a}{b}{c}" for a in "1357" for b in "1357" for c in "1357"}
    assert dict(S1.parse("135")) == {"stage0.depth": 1, "stage1.depth": 3, "stage2.depth": 5}


def test_resnet_20_has_the_parameters_counted_by_hand():
    # Stem 3-16; three stages of six 3x3 convolutions with 16, 32 and 64 channels; two projections; a classifier.
    convolutions = 9 * (3 * 16 + 6 * 16**2 + 16 * 32 + 5 * 32**2 + 32 * 64 + 5 * 64**2)
    projections = 16 * 32 + 32 * 64
    norms = 2 * (7 * 16 + 7 * 32 + 7 * 64)
    assert cost(S1.blueprint(S1.parse("333"))).params == convolutions + projections + norms + 64 * 100 + 100


def test_the_elastic_table_has_its_count_and_its_extremes():
    per_stage = 3 * sum(2**depth for depth in (1, 2, 3))
    assert ELASTIC.count() == 3 * 3 * per_stage**3 == 666792
    largest, smallest = (cost(ELASTIC.blueprint(a)) for a in (ELASTIC.largest, ELASTIC.smallest))
    assert largest == (1236522, 187536384)
    assert smallest == (75130, 6333952)
    rng = random.Random(0)
    for _ in range(3):
        sampled = cost(ELASTIC.blueprint(ELASTIC.sample(rng)))
        assert smallest.macs <= sampled.macs <= largest.macs
        assert smallest.params <= sampled.params <= largest.params


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_a_subnet_is_its_student_and_the_bank_is_the_largest_network(block):
    space = small(block)
    supernet, rng, images = Supernet(space).eval(), random.Random(0), torch.randn(2, 3, 8, 8)
    assert sum(p.numel() for p in supernet.parameters()) == cost(space.blueprint(space.largest)).params
    for architecture in (space.smallest, space.largest, *(space.sample(rng) for _ in range(4))):
        inside, outside = supernet(images, architecture), supernet.extract(architecture)(images)
        assert torch.equal(inside.logits, outside.logits)
        assert all(map(torch.equal, inside.features, outside.features))
        assert space.parse(space.code(architecture)) == architecture
    assert space_from_table(table_of(space)) == space


def test_a_shortcut_depends_on_the_position_never_on_the_widths():
    space = small("basic")
    for width in (4, 8):
        values = dict(space.largest) | {"stem.width": 4, "stage0.width": width, "stage1.width": 8}
        _, stages, _ = space.layers(space.architecture(values))
        assert [[one.make["shortcut"] for one in stage] for stage in stages] == [["projection", "identity"]] * 2
    _, stages, _ = S1.layers(S1.parse("333"))
    assert stages[0][0].make["shortcut"] == "identity"


def test_a_basic_block_adds_its_shortcut_before_the_last_activation():
    block = BasicBlock(2, 2, zero_last=True).eval()
    x = torch.tensor([[1.0, -2.0]]).reshape(1, 2, 1, 1).expand(1, 2, 4, 4)
    assert torch.equal(block(x), x.relu())
    assert torch.equal(Bottleneck(2, 2, 1, zero_last=True).eval()(x), x.relu())


def test_the_shapes_of_the_blocks_follow_stride_and_shortcut():
    x = torch.randn(2, 4, 6, 6)
    assert BasicBlock(4, 8, 2)(x).shape == Bottleneck(4, 8, 2, 2)(x).shape == (2, 8, 3, 3)
    assert BasicBlock(4, 8, 2, shortcut="none")(x).shape == (2, 8, 3, 3)
    assert isinstance(BasicBlock(4, 4).shortcut, nn.Identity)
    assert not isinstance(BasicBlock(4, 4, shortcut="projection").shortcut, nn.Identity)
    with pytest.raises(ValueError, match="requires stride 1"):
        BasicBlock(4, 8, shortcut="identity")
    with pytest.raises(ValueError, match="`shortcut` must be"):
        BasicBlock(4, 8, shortcut="pool")


def test_a_block_without_shortcut_is_its_branch():
    block, x = BasicBlock(4, 4, shortcut="none").eval(), torch.randn(2, 4, 6, 6)
    assert torch.equal(block(x), block.branch(x).relu())


def test_zero_last_reaches_every_block_of_the_largest_network():
    space = dataclasses.replace(small("bottleneck"), zero_last=True)
    network = Network(space.blueprint(space.largest))
    assert all(block.branch[-1][1].weight.eq(0).all() for stage in network.stages for block in stage)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block": "dense"}, "`block` must be one of"),
        ({"stages": ()}, "`stages` must not be empty"),
        ({"stem_widths": (32, 16)}, "`stem_widths` must be"),
        ({"stages": (ResNetStage(widths=(8,), depths=()),)}, r"`stages\[0\].depths` must not be empty"),
        ({"stages": (ResNetStage(widths=(8,), depths=(0, 1)),)}, r"`stages\[0\].depths` must be"),
    ],
)
def test_a_wrong_table_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ResNet(**fields)


@pytest.mark.parametrize("code", ["33", "3333", "334", "3a3"])
def test_a_wrong_code_is_refused(code):
    with pytest.raises(ValueError, match=r"digits|must be one of"):
        S1.parse(code)
