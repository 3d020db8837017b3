"""Elastic ENet: its blocks by hand, the two outputs that its decoder reads, and students of any size."""

import random
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kdnas.blocks.basic import enlarge
from kdnas.blocks.enet import EnetBlock, EnetDecoder, EnetDown, EnetStem, EnetUp
from kdnas.costs.count import cost, counted_macs
from kdnas.losses.feature.self_attention import SelfAttention
from kdnas.network import Network
from kdnas.preprocessing import Preprocessing
from kdnas.randomness import initialised, torch_rng
from kdnas.runtimes import onnx_bytes, onnx_function
from kdnas.spaces.enet import ENet
from kdnas.students.source import student_source
from kdnas.supernet import Supernet
from kdnas.tables import load_space

SMALL = ENet(
    stem_widths=(4, 6),
    first_widths=(8,),
    first_depths=(1, 2),
    widths=(8, 12),
    depths=(1, 3),
    decoder_widths=(8,),
    last_widths=(4, 6),
    classes=3,
)


@cache
def supernet():
    return initialised(lambda: Supernet(SMALL), 0).eval()


def noise(*shape):
    return torch.randn(*shape, generator=torch_rng("enet", *shape))


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 40))
def test_a_subnet_is_its_extracted_student_to_the_bit_at_any_size(seed, height, width):
    architecture, images = SMALL.sample(random.Random(seed)), noise(2, 3, height, width)
    with torch.no_grad():
        inside, outside = supernet()(images, architecture), supernet().extract(architecture)(images)
    assert inside.logits.shape == (2, 3, height, width)
    assert torch.equal(inside.logits, outside.logits)
    assert all(torch.equal(a, b) for a, b in zip(inside.maps, outside.maps, strict=True))
    logits = supernet().extract(architecture).head.classifier(outside.classified)
    assert torch.equal(enlarge(logits, outside.logits), outside.logits)
    sides = [(-(-height // s), -(-width // s)) for s in (4, 8, 8, 8)]
    assert [tuple(x.shape[2:]) for x in inside.features] == sides


@pytest.mark.parametrize("size", [(16, 24), (17, 33)])
def test_costs_are_exact_at_the_images_own_size(size):
    space = SMALL.fitted(classes=4, image_channels=3, size=size)
    blueprint = space.blueprint(space.largest)
    with torch.device("meta"), counted_macs() as macs, torch.no_grad():
        network = Network(blueprint).eval()
        network(torch.empty(1, 3, *size))
    assert cost(blueprint) == (sum(p.numel() for p in network.parameters()), macs())


def test_the_paper_s_network_has_its_layers():
    space = load_space("elastic_enet")
    blueprint = space.blueprint(space.largest)
    assert blueprint.head.reads == (2,) and [len(stage) for stage in blueprint.stages] == [5, 9, 8, 8]
    widths = [dict(stage[-1].make.arguments)["width"] for stage in blueprint.stages]
    assert widths == [64, 128, 128, 128]
    inner = 128 * 32 + 32 * 32 * 9 + 32 * 128 + 2 * (32 + 32 + 128) + (32 + 32 + 128)  # norms and PReLU
    regular = blueprint.stages[2][0]
    assert sum(p.numel() for p in EnetBlock(**dict(regular.make.arguments)).parameters()) == inner
    middles = [dict(entry.make.arguments) for entry in blueprint.stages[3]]
    assert [m.get("dilation", 1) for m in middles] == [1, 2, 1, 4, 1, 8, 1, 16]
    assert [m.get("asymmetric", False) for m in middles] == [False, False, True, False, False, False, True, False]


def test_the_decoder_reads_third_and_fourth_as_if_concatenated():
    up = initialised(lambda: EnetUp(4, 6, 3, maps=2), 0).eval()
    third, fourth = noise(2, 2, 4, 3, 5)
    joined = torch.cat([third, fourth], 1)
    main = up.norm(F.conv2d(joined, torch.cat([layer.weight for layer in up.project], 1)))
    branch = up.branch(F.conv2d(joined, torch.cat([layer.weight for layer in up.reduce], 1)))
    expected = torch.relu(main.repeat_interleave(2, 2).repeat_interleave(2, 3) + branch)
    torch.testing.assert_close(up(third, fourth), expected)
    decoder = initialised(lambda: EnetDecoder(4, 8, 4, 3), 0).eval()
    assert decoder(third, fourth).shape == (2, 3, 24, 40)
    assert not torch.equal(decoder(third, fourth), decoder(third, third))


def test_what_is_pooled_stands_beside_what_is_convolved():
    images = noise(2, 3, 5, 7)
    stem = initialised(lambda: EnetStem(3, 8), 0).eval()
    pooled = F.max_pool2d(F.pad(images, (0, 1, 0, 1), value=-torch.inf), 2)
    joined = torch.cat([pooled, stem.conv(images)], 1)
    torch.testing.assert_close(stem(images), F.prelu(stem.norm(joined), stem.activation.weight))
    down, x = initialised(lambda: EnetDown(4, 6, 2), 0).eval(), noise(2, 4, 5, 7)
    pooled = F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=-torch.inf), 2)
    expected = F.prelu(torch.cat([pooled, torch.zeros(2, 2, 3, 4)], 1) + down.branch(x), down.activation.weight)
    torch.testing.assert_close(down(x), expected)


def test_stages_distil_each_other():
    network = supernet().extract(SMALL.smallest)
    outputs = network(noise(2, 3, 16, 24))
    loss = SelfAttention(start=0)
    loss.build(outputs, outputs, elastic=False)
    loss(outputs, outputs, torch.zeros(2, 16, 24, dtype=torch.long)).backward()
    assert network.stem.conv.weight.grad.abs().sum() > 0
    third, fourth = outputs.features[2:]
    assert torch.equal(network.remaining_layers(3, 2 * fourth, outputs.features), network.head(third, 2 * fourth))


def student_of(network):
    """The module of its exported source, with its weights."""
    preprocessing = Preprocessing(height=13, width=18, mean=(0.0,) * 3, std=(1.0,) * 3)
    names = {"__name__": "student"}
    exec(student_source(network.blueprint, preprocessing, "abc"), names)
    student = names["Student"]().eval()
    student.load_state_dict(network.state_dict())
    return student


def test_its_source_is_the_network_to_the_bit_at_any_size():
    network = supernet().extract(SMALL.largest)
    student = student_of(network)
    for size in ((13, 18), (1, 1), (40, 33)):
        with torch.no_grad():
            assert torch.equal(student(noise(2, 3, *size)), network(noise(2, 3, *size)).logits)


@pytest.mark.real  # exporting it takes most of a minute
def test_its_graph_takes_images_of_any_size():
    student = student_of(supernet().extract(SMALL.smallest))
    graph = onnx_function(onnx_bytes(student, torch.rand(2, 3, 13, 18), any_size=True), 1)
    for size in ((13, 18), (1, 1), (40, 33)):
        with torch.no_grad():
            torch.testing.assert_close(graph(noise(3, 3, *size)), student(noise(3, 3, *size)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stem_widths": (3, 8)}, r"`stem_widths` must be above the 3 channels of an image, got \[3, 8\]"),
        ({"first_widths": (8,)}, "`first_widths` must be at least 16, the largest of `stem_widths`, got 8"),
        ({"widths": (32, 96)}, "`widths` must be at least 64, the largest of `first_widths`, got 32"),
        ({"size": (5,)}, "`size` must be height and width"),
        ({"resolutions": (64,)}, "must be left out"),
    ],
)
def test_settings_that_make_no_network_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ENet(**arguments)
