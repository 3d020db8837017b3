"""The space of KDAS: counts, canonical spellings, the graph's arithmetic, the fixed network inside."""

import dataclasses
import itertools
import random

import numpy as np
import pytest
import torch

from kdnas.architecture import Architecture
from kdnas.blocks.enlarged import AddedLayers
from kdnas.costs.count import cost
from kdnas.network import Network
from kdnas.spaces.enlarged import Enlarged
from kdnas.spaces.resnet import ResNet, ResNetStage
from kdnas.supernet import Supernet
from kdnas.tables import load_space

SPACE = load_space("kdas_digits")
ONE = Enlarged(stem_width=4, widths=(4,), depths=(1,), added=(3,), operations=("identity", "max_pool_3x3"))


@pytest.mark.parametrize(
    ("added", "count"), [((1, 0), 28), ((2, 2), 2**8 * 7**4), ((0, 3), 2**6 * 7**3), ((2, 2, 2), 2**12 * 7**6)]
)
def test_there_are_4_to_the_l_times_7_to_the_l_spellings(added, count):
    widths = tuple(8 * 2**i for i in range(len(added)))
    assert Enlarged(widths=widths, depths=(1,) * len(added), added=added).count() == count


def test_the_smallest_network_is_the_fixed_one():
    space = load_space("kdas_resnet32")
    stages = tuple(ResNetStage(widths=(w,), depths=(5,), stride=1 + (w > 16)) for w in (16, 32, 64))
    fixed = ResNet(stages=stages)
    plain, own = fixed.blueprint(fixed.smallest), space.blueprint(space.smallest)
    assert cost(own) == cost(plain) == (466906, 69124736)
    assert [len(stage) for stage in own.stages] == [5, 5, 5]


def outputs(space, architecture):
    """The graph of a one-stage space computed from its spelling, every operation some function of one number."""
    held = {0: 1.0}
    taken = set()
    for place in range(1, space.added[0] + 1):
        name = f"stage0.added{place - 1}"
        sources = {max(0, place - 1)} if architecture[f"{name}.previous"] else set()
        sources |= {max(0, place - 2)} if architecture[f"{name}.earlier"] else set()
        sources &= set(held)
        if not sources:
            continue
        taken |= sources
        given = sum(held[s] for s in sources)
        held[place] = given if architecture[f"{name}.operation"] == "identity" else np.sin(3 * given) + 2
    return sum(value for place, value in held.items() if place == 0 or place not in taken)


def test_a_canonical_network_computes_what_every_spelling_of_it_computes():
    bits = [range(len(choice.options)) for choice in ONE.choices]
    found = {}
    for digits in itertools.product(*bits):
        spelled = Architecture({c.name: c.options[d] for c, d in zip(ONE.choices, digits, strict=True)})
        canonical = ONE.canonical(spelled)
        assert ONE.canonical(canonical) == canonical
        assert outputs(ONE, canonical) == pytest.approx(outputs(ONE, spelled), rel=1e-12), spelled
        found.setdefault(canonical, []).append(spelled)
    assert sum(map(len, found.values())) == ONE.count() == 8**3
    assert sorted(found, key=ONE.code) == sorted(ONE.all(), key=ONE.code)
    assert len({ONE.blueprint(canonical) for canonical in found}) == len(found)
    assert len(found) < ONE.count() / 4


def spelled(*layers):
    """Canonical architecture of layers given as previous, earlier, operation."""
    ends = ("previous", "earlier", "operation")
    return ONE.architecture(
        {f"stage0.added{k}.{end}": value for k, one in enumerate(layers) for end, value in zip(ends, one, strict=True)}
    )


def test_what_changes_nothing_is_taken_out():
    pool, same, none = "max_pool_3x3", "identity", (0, 0, "max_pool_3x3")
    first = spelled((1, 0, pool), none, none)
    # The first layer's connections lead to one node; a layer without a source moves to the end.
    assert spelled((0, 1, pool), none, none) == spelled((1, 1, pool), none, none) == first
    assert spelled(none, (0, 1, pool), none) == spelled(none, (1, 1, pool), none) == first
    # Fed by nothing but a layer that is left out: left out.
    assert spelled(none, (1, 0, pool), none) == spelled(none, none, none) == ONE.smallest
    # An identity in a chain is its source; one that adds the stage's output once more is not nothing.
    assert spelled((1, 0, pool), (1, 0, same), none) == first
    assert spelled((1, 0, same), (1, 0, pool), none) == first
    assert spelled((1, 0, same), none, none) not in (ONE.smallest, first)
    blueprint = ONE.blueprint(spelled(none, (0, 1, pool), (1, 1, same)))
    assert dict(blueprint.stages[0][-1].make.arguments)["nodes"] == ((pool, 0),)


def test_a_graph_by_hand():
    x = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    # Node 1 is the maximum, node 2 the sum of 0 and 1 averaged; only 2 is loose, and 0 always goes out.
    graph = AddedLayers(1, (("max_pool_3x3", 0), ("average_pool_3x3", 0, 1)))
    torch.testing.assert_close(graph(x), x + 2.5 + 4)
    side_by_side = AddedLayers(1, (("identity", 0), ("max_pool_3x3", 0)))
    torch.testing.assert_close(side_by_side(x), x + x + 4)


def test_every_operation_keeps_the_shape_and_has_the_weights_of_its_name():
    weights = {}
    for operation in SPACE.operations:
        graph = AddedLayers(6, ((operation, 0),))
        assert graph(torch.rand(2, 6, 5, 4)).shape == (2, 6, 5, 4)
        weights[operation] = sum(p.numel() for p in graph.parameters() if p.dim() > 1)
    assert weights == {
        "identity": 0,
        "max_pool_3x3": 0,
        "average_pool_3x3": 0,
        "separable_3x3": 6 * 9 + 36,
        "separable_5x5": 6 * 25 + 36,
        "conv_3x3": 36 * 9,
        "conv_5x5": 36 * 25,
    }


def test_subnets_share_the_fixed_network_and_each_operations_weights():
    supernet = Supernet(SPACE).eval()
    rng = random.Random(0)
    images = torch.rand(2, 1, 8, 8)
    for architecture in (SPACE.smallest, *(SPACE.sample(rng) for _ in range(20))):
        student = supernet.extract(architecture)
        assert isinstance(student, Network)
        with torch.no_grad():
            assert torch.equal(student(images).logits, supernet(images, architecture).logits)
    kernels = [n for n, p in supernet.named_parameters() if "added" in n and p.dim() == 4 and p.shape[-1] == 3]
    assert len(kernels) == 4 * 2  # a plain and a depthwise 3x3 kernel per added layer


def test_a_parameter_cap_is_a_budget():
    cap = 8000
    costs = [cost(SPACE.blueprint(SPACE.sample(random.Random(seed)))).params for seed in range(40)]
    assert min(costs) < cap < max(costs)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="one entry per stage"):
        Enlarged(widths=(8,), depths=(1, 1), added=(1,))
    with pytest.raises(ValueError, match="a layer in some stage"):
        dataclasses.replace(SPACE, added=(0, 0))
    with pytest.raises(ValueError, match="in this order"):
        dataclasses.replace(SPACE, operations=("conv_3x3", "identity"))
    with pytest.raises(ValueError, match="sources of node 1 must be from 0 to 0"):
        AddedLayers(4, (("identity", 1),))
    with pytest.raises(ValueError, match="an operation must be one of"):
        AddedLayers(4, (("conv_7x7", 0),))
