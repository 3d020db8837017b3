"""The inverted residual family: published counts and costs, an independent EfficientNet, every key of the table."""

import dataclasses
import random
import re
import tomllib
from pathlib import Path

import pytest
import torch

from kdnas.blocks.mbconv import MBConv
from kdnas.costs.count import cost, feature_shapes, layer_costs
from kdnas.network import Network, build
from kdnas.supernet import Supernet
from kdnas.tables import load_space, space_from_table

# Resolution, widths from first to last convolution, kernels, expansions, depths, published millions of MACs.
ALPHANET = {
    "A0": (192, "16 16 24 32 64 112 192 216 1792", "3333333", "1444466", "1333331", 203.4),
    "A1": (224, "16 16 24 32 64 112 192 216 1984", "3335353", "1444466", "1333331", 279.2),
    "A2": (224, "16 16 24 32 64 112 200 224 1984", "3333353", "1454466", "1333341", 316.7),
    "A3": (224, "16 16 24 32 64 112 208 224 1984", "3335333", "1444466", "2334351", 356.5),
    "A4": (256, "16 16 24 32 64 112 192 216 1984", "3335353", "1445466", "1334351", 443.5),
    "A5-small": (256, "16 16 24 32 64 112 208 216 1984", "3333353", "1445466", "1334451", 491.5),
    "A5-base": (288, "16 16 24 32 64 112 200 216 1984", "3355333", "1444566", "2343351", 594.8),
    "A6": (288, "16 16 24 32 64 112 216 224 1984", "3333353", "1465466", "1334461", 709.0),
}


def alphanet(space, resolution, widths, kernels, expansions, depths):
    first, *inner, last = map(int, widths.split())
    values = {"resolution": resolution, "stem.width": first, "head.width": last}
    for stage, row in enumerate(zip(inner, map(int, depths), map(int, kernels), map(int, expansions), strict=True)):
        kinds = ("width", "depth", "kernel", "expansion")
        values |= {f"stage{stage}.{kind}": option for kind, option in zip(kinds, row, strict=True)}
    known = {choice.name for choice in space.choices}
    return space.architecture({name: option for name, option in values.items() if name in known})


@pytest.mark.parametrize("name", ALPHANET)
def test_alphanets_published_networks_have_their_published_macs(name):
    *description, macs = ALPHANET[name]
    space = load_space("alphanet")
    assert round(cost(space.blueprint(alphanet(space, *description))).macs / 1e6, 1) == macs


def test_alphanets_largest_network_and_count_are_the_published_ones():
    space = load_space("alphanet")
    assert round(cost(space.blueprint(space.largest)).macs / 1e6, 1) == 1939.3
    assert f"{space.count():.1e}" == "4.4e+11"


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("ofa_mbv3", 25 * (9**2 + 9**3 + 9**4) ** 5),  # 2.18e19 per resolution
        ("bignas", 235_929_600),  # 2.4e8
        ("dna", 6 ** (2 + 4 + 4 + 4 + 4 + 1)),
        ("cream", 6**20),
    ],
)
def test_a_table_has_its_published_count(name, count):
    assert load_space(name).count() == count


def test_the_digits_table_is_small_and_rich():
    space = load_space("digits")
    assert space.count() > 1e5
    assert cost(space.blueprint(space.smallest)).macs < 50_000
    assert 500_000 < cost(space.blueprint(space.largest)).macs < 1_500_000


# Thousands of operations of a DNA layer per operation k3e6 k5e6 k7e6 k3e3 k5e3 k7e3, from the released search: block,
# layer, widths of the six blocks. Its widths are not quite the students': block 3 has 96 channels, and the first
# layers of blocks 1 and 4 were counted as if block 0 had 32 and block 4 had 160.
STUDENT = (24, 40, 80, 96, 192, 320)
DNA = [
    (0, 0, STUDENT, (32364, 37181, 44407, 16257, 18666, 22279)),
    (0, 1, STUDENT, (27699, 34924, 45762, 13925, 17537, 22956)),
    (1, 0, (32, *STUDENT[1:]), (28215, 30623, 34236, 14139, 15343, 17149)),
    (1, 1, STUDENT, (17567, 20577, 25093, 8815, 10320, 12578)),
    (2, 0, STUDENT, (12220, 12972, 14101, 6126, 6502, 7066)),
    (2, 1, STUDENT, (16327, 17832, 20090, 8179, 8932, 10061)),
    (3, 0, STUDENT, (17838, 19344, 21602, 8938, 9691, 10820)),
    (3, 1, STUDENT, (23210, 25016, 27725, 11624, 12527, 13882)),
    (4, 0, (*STUDENT[:4], 160, 320), (15934, 16386, 17063, 7975, 8201, 8539)),
    (4, 1, STUDENT, (22540, 23444, 24798, 11280, 11731, 12409)),
    (5, 0, STUDENT, (29778, 30682, 32036, 14905, 15356, 16034)),
]


def norms_and_biases(layer, shape):
    """What the authors count besides: two operations per element of a batch norm's output, one per bias."""
    with torch.device("meta"):
        module = build(layer).eval()
        elements = [p.numel() for n, p in module.squeeze.named_parameters() if n.endswith("bias")]
        for part in module.modules():
            if isinstance(part, torch.nn.BatchNorm2d):
                part.register_forward_hook(lambda _, __, output: elements.append(2 * output.numel()))
        with torch.no_grad():
            module(torch.empty(shape))
    return sum(elements)


@pytest.mark.parametrize(("block", "place", "widths", "published"), DNA)
def test_dnas_layers_cost_what_its_released_table_says(block, place, widths, published):
    space = load_space("dna")
    rows = zip(space.stages, (16, *widths), strict=True)
    space = dataclasses.replace(space, stages=tuple(dataclasses.replace(row, width=(w,)) for row, w in rows))
    place += block == 0  # the fixed first layer belongs to block 0
    name = f"stages.{block}.{place}"
    for operation, thousands in zip(("k3e6", "k5e6", "k7e6", "k3e3", "k5e3", "k7e3"), published, strict=True):
        blueprint = space.blueprint(space.decide(lambda choice, operation=operation: operation))
        costs, shapes = layer_costs(blueprint), feature_shapes(blueprint)
        before = shapes[list(shapes)[list(shapes).index(name) - 1]]
        counted = costs[name].macs + norms_and_biases(blueprint.stages[block][place], before)
        assert round(counted / 1000) == thousands, operation


def test_an_efficientnet_is_torchvisions(efficientnet):
    from torchvision.models import efficientnet_b0

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network, reference = Network(efficientnet).eval(), efficientnet_b0(num_classes=1000).eval()
        images = torch.randn(2, 3, 64, 64)
    assert cost(efficientnet).params == 5_288_548
    assert round(cost(dataclasses.replace(efficientnet, image=(3, 224, 224))).macs / 1e6) == 386
    ours, theirs = network.state_dict(), reference.state_dict()
    assert [v.shape for v in ours.values()] == [v.shape for v in theirs.values()]
    network.load_state_dict(dict(zip(ours, theirs.values(), strict=True)))
    with torch.no_grad():
        torch.testing.assert_close(network(images).logits, reference(images), rtol=1e-4, atol=1e-6)


@pytest.fixture
def efficientnet():
    rows = [
        {"width": [16], "expansion": [1], "joins_next": True},
        {"width": [24], "depth": [2], "stride": 2},
        {"width": [40], "depth": [2], "kernel": [5], "stride": 2},
        {"width": [80], "depth": [3], "stride": 2},
        {"width": [112], "depth": [3], "kernel": [5]},
        {"width": [192], "depth": [4], "kernel": [5], "stride": 2},
        {"width": [320]},
    ]
    space = space_from_table(
        {
            "family": "mbconv",
            "classes": 1000,
            "resolutions": [64],
            "activation": "swish",
            "se_kind": "efficientnet",
            "stem": {"width": [32]},
            "stages": [row | {"se": True} for row in rows],
            "head": {"kind": "mobilenet_v2", "width": [1280]},
        }
    )
    return space.blueprint(space.largest)


def test_ofas_head_and_rows_are_mobilenet_v3s():
    blueprint = load_space("ofa_mbv3").blueprint(load_space("ofa_mbv3").largest)
    text = str(blueprint.head)
    assert "ConvPoolConvLinear" in text and "hidden=960" in text and "width=1280" in text
    activations = [stage[-1].make["activation"] for stage in blueprint.stages]
    assert activations == ["relu", "relu", "hswish", "hswish", "hswish"]
    squeezed = [dict(stage[-1].make.arguments).get("squeezed", 0) for stage in blueprint.stages]
    assert squeezed == [0, 64, 0, 168, 240]  # a quarter of 6 x 40, 6 x 112, 6 x 160
    assert [len(stage) for stage in blueprint.stages] == [5, 4, 4, 4, 4]  # the fixed block joins the first


SMALL = {
    "family": "mbconv",
    "resolutions": [16],
    "stem": {"width": [8, 16], "stride": 1},
    "stages": [
        {"width": [8, 16], "depth": [1, 2], "kernel": [3, 5], "expansion": [2, 3]},
        {"width": [16, 24], "depth": [1, 2], "kernel": [3, 5], "expansion": [2, 3], "stride": 2, "se": True},
    ],
}


def small(**changes):
    return space_from_table(SMALL | changes)


def test_choices_are_per_stage_or_per_block():
    assert {c.name for c in small().choices if c.name.startswith("stage1")} == {
        "stage1.width",
        "stage1.depth",
        "stage1.kernel",
        "stage1.expansion",
    }
    assert small().count() == 2 * (2 * 2 * 2 * 2) ** 2
    per_block = small(per="block")
    assert per_block.count() == 2 * (2 * (4 + 16)) ** 2
    assert "stage1.block1.kernel" not in per_block.smallest
    assert per_block.largest["stage1.block1.kernel"] == 5


def test_operations_have_weights_of_their_own_and_all_are_covered():
    space = small(per="block", shared=False)
    assert space.count() == 2 * (2 * (4 + 16)) ** 2
    assert [c.options for c in space.choices if c.name == "stage0.block0.operation"] == [
        ("k3e2", "k3e3", "k5e2", "k5e3")
    ]
    supernet = Supernet(space)
    assert {key for key in supernet.bank if key.startswith("stages_0_0")} == {
        f"stages_0_0:k{kernel}e{expansion}" for kernel in (3, 5) for expansion in (2, 3)
    }
    architecture = space.sample(random.Random(0))
    supernet(torch.randn(2, 3, 16, 16), architecture).logits.sum().backward()
    used = {f"stages_0_0:{architecture['stage0.block0.operation']}"}
    assert {
        key
        for key, module in supernet.bank.items()
        if key.startswith("stages_0_0") and module.reduce[0].weight.grad is not None
    } == used


def test_a_shortcut_is_only_where_shapes_match_unless_it_is_always():
    def shortcuts(space):
        return [one.make["shortcut"] for stage in space.blueprint(space.largest).stages for one in stage]

    assert shortcuts(small()) == ["identity", "identity", "none", "identity"]
    assert shortcuts(small(shortcut="always")) == ["identity", "identity", "project", "identity"]


def test_projecting_shortcuts_that_the_largest_network_lacks_have_weights():
    space = small(shortcut="always")
    supernet = Supernet(space).eval()
    assert supernet.bank["stages_0_0:shared"].project.weight.shape == (16, 16, 1, 1)
    images = torch.randn(2, 3, 16, 16)
    for stem, width in ((8, 16), (16, 8)):
        architecture = space.architecture({**space.largest, "stem.width": stem, "stage0.width": width})
        student = supernet.extract(architecture)
        assert student.stages[0][0].project.weight.shape == (width, stem, 1, 1)
        assert torch.equal(student(images).logits, supernet(images, architecture).logits)


def test_a_shortcut_averages_over_the_stride_also_for_odd_sides():
    block = MBConv(2, 2, 4, stride=2, shortcut="identity", zero_gamma=True).eval()
    image = torch.arange(9.0).reshape(1, 1, 3, 3).expand(1, 2, 3, 3)
    expected = torch.tensor([[2.0, 3.5], [6.5, 8.0]])  # means of 0 1 3 4, of 2 5, of 6 7, of 8
    torch.testing.assert_close(block(image)[0, 0], expected)
    assert block.depthwise(block.expand(image)).shape == (1, 4, 2, 2)


def test_with_zero_gamma_only_blocks_with_a_shortcut_start_as_it():
    space = small(zero_gamma=True)
    network = Network(space.blueprint(space.largest))
    x = torch.randn(2, 16, 16, 16)
    assert torch.equal(network.stages[0][1].eval()(x), x)
    assert [b.reduce[1].weight.sum().item() for s in network.stages for b in s] == [0, 0, 24, 0]


def test_a_shallower_stage_is_a_prefix_of_the_deeper_one():
    space = small()
    supernet = Supernet(space).eval()
    images = torch.randn(2, 3, 16, 16)
    deep = supernet.extract(space.largest)
    shallow = supernet(images, space.architecture({**space.largest, "stage0.depth": 1}))
    with torch.no_grad():
        assert torch.equal(shallow.features[0], deep.stages[0][0](deep.stem(images)))


def test_the_squeezed_channels_follow_the_kind():
    def squeezed(kind):
        space = small(se_kind=kind)
        return space.blueprint(space.largest).stages[1][0].make["squeezed"]

    assert squeezed("mobilenet_v3") == 16  # a quarter of 3 x 16 is 12, rounded to a multiple of 8
    assert squeezed("efficientnet") == 4  # a quarter of 16


def test_drop_path_leaves_the_shortcut_alone():
    block = MBConv(2, 2, 4, shortcut="identity", drop_path=0.5)
    x = torch.randn(16, 2, 4, 4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        same = (block(x) == x).flatten(1).all(1)
    assert 0 < same.sum() < 16
    assert not (block.eval()(x) == x).flatten(1).all(1).any()


def test_drop_path_acts_only_where_the_shortcut_is_the_plain_identity():
    rows = [row | {"drop_path": 0.3} for row in SMALL["stages"]]
    space = small(stages=rows, shortcut="always")
    rates = [dict(one.make.arguments).get("drop_path", 0) for s in space.blueprint(space.largest).stages for one in s]
    assert rates == [0.3, 0.3, 0, 0.3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"per": "layer"}, "`per` must be one of stage, block, got 'layer'"),
        ({"shortcut": "allways"}, "Did you mean 'always'?"),
        ({"activation": "silu"}, "`activation` must be one of"),
        ({"stem": {"width": [16, 8]}}, "`stem.width` must be ascending, got [16, 8]"),
        ({"stem": {"width": []}}, "`stem.width` must not be empty"),
        ({"stem": {"wdth": [8]}}, "stem: unknown key 'wdth'. Did you mean 'width'?"),
        ({"stages": [{"width": [8], "kernel": [4]}]}, "`stages[0].kernel` must be odd, got [4]"),
        ({"stages": [{"width": [8], "depth": [0, 1]}]}, "`stages[0].depth` must be at least 1, got [0, 1]"),
        ({"stages": [{"width": [8], "stride": 0}]}, "`stages[0].stride` must be at least 1, got 0"),
        ({"stages": [{"width": [8], "drop_path": 1.0}]}, "`stages[0].drop_path` must be below 1"),
        ({"stages": [{"width": [8, 16], "joins_next": True}]}, "`joins_next` must have one option"),
        ({"stages": [{"width": [8], "joins_next": True}]}, "`stages` must end with a row without `joins_next`"),
        ({"stages": []}, "`stages` must end with a row"),
        ({"stages": [{"depth": [1]}]}, "stages[0].width is missing"),
        ({"head": {"kind": "mobilenet_v4"}}, "head `kind` must be one of"),
        ({"head": {"width": [8]}}, "head `width` must be empty for a head of kind pool"),
        ({"head": {"kind": "mobilenet_v2"}}, "head `width` must not be empty for a head of kind mobilenet_v2"),
    ],
)
def test_a_wrong_table_is_refused_with_rule_value_and_place(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        small(**change)


def test_a_mobilenet_v3_like_space_takes_at_most_30_lines_of_toml():
    page = (Path(__file__).parents[2] / "docs" / "spaces.md").read_text()
    table = next(text for text in re.findall(r"```toml\n(.*?)```", page, re.DOTALL) if "mbconv" in text)
    assert len(table.splitlines()) <= 30
    space = space_from_table(tomllib.loads(table))
    assert space.count() > 1e10
    blueprint = space.blueprint(space.largest)
    assert "ConvPoolConvLinear" in str(blueprint.head)
    assert 1e8 < cost(blueprint).macs < 1e9
