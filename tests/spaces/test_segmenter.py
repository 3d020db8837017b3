"""Elastic segmenters: subnets are their exported students at any size, and what is refused."""

import json
import random
from dataclasses import replace
from functools import cache, partial
from typing import final

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kdnas.architecture import Architecture
from kdnas.blocks.basic import enlarge
from kdnas.blocks.dense import LrAspp
from kdnas.costs.count import cost, counted_macs, feature_shapes, peak_memory
from kdnas.costs.elsewhere import adopt
from kdnas.costs.latency import LatencyTable
from kdnas.costs.target import Target
from kdnas.data.base import Data, TensorImages
from kdnas.jobs.latency import write_measuring_script
from kdnas.network import Network, batch_statistics
from kdnas.randomness import initialised, torch_rng
from kdnas.scorers.base import Evidence, OutputScorer, Score, score_all, score_by_all
from kdnas.scorers.rdm import Rdm
from kdnas.spaces.resnet import ResNetStage
from kdnas.spaces.segmenter import Segmenter
from kdnas.supernet import Supernet
from kdnas.tables import load_space
from kdnas.tasks.segmentation import Segmentation
from kdnas.teachers.base import Frozen

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


def small(block="basic"):
    return Segmenter(block=block, stages=BLOCKS[block], stem_widths=(4, 6), head_widths=(4, 6), classes=3)


def head_of(kind, space=None):
    space = space or small()
    return space.architecture({**space.largest, "head.kind": kind})


@cache
def supernet_of(block="basic"):
    return initialised(lambda: Supernet(small(block)), 0).eval()


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(sorted(BLOCKS)), st.integers(0, 10**6), st.integers(5, 40), st.integers(5, 40))
def test_a_subnet_is_its_extracted_student_to_the_bit_at_any_size(block, seed, height, width):
    supernet = supernet_of(block)
    architecture = supernet.space.sample(random.Random(seed))
    images = torch.randn(2, 3, height, width, generator=torch_rng(seed))
    with torch.no_grad():
        inside, outside = supernet(images, architecture), supernet.extract(architecture)(images)
    assert inside.logits.shape == (2, 3, height, width)
    assert torch.equal(inside.logits, outside.logits)
    assert inside.classified is not None
    assert all(torch.equal(a, b) for a, b in zip(inside.maps, outside.maps, strict=True))


@pytest.mark.parametrize("kind", ["lraspp", "aspp"])
def test_the_map_that_is_classified_is_the_one_from_which_the_classifier_makes_the_logits(kind):
    space = replace(small(), low_level=False)
    network = initialised(lambda: Network(space.blueprint(head_of(kind, space))), 0).eval()
    images = torch.randn(2, 3, 17, 33, generator=torch_rng(kind))
    outputs = network(images)
    assert torch.equal(enlarge(network.head.decoder.classifier(outputs.classified), images), outputs.logits)


@pytest.mark.parametrize("size", [(12, 20), (17, 33), (31, 9)])
def test_costs_are_exact_at_the_images_own_size(size):
    space = load_space("elastic_segmenter").fitted(classes=4, image_channels=3, size=size)
    for architecture in (space.smallest, space.largest):
        blueprint = space.blueprint(architecture)
        assert blueprint.image == (3, *size)
        with torch.device("meta"), counted_macs() as macs, torch.no_grad():
            Network(blueprint).eval()(torch.empty(1, 3, *size))
        assert cost(blueprint).macs == macs()


def test_the_head_reads_the_last_map_of_twice_the_resolution():
    space, images = load_space("elastic_segmenter"), torch.randn(1, 3, 21, 34)
    blueprint = space.blueprint(head_of("lraspp", space))
    network = initialised(lambda: Network(blueprint), 0).eval()
    low, high = network(images).features[1:]
    assert blueprint.head.reads == (1,) and low.shape[2:] == (6, 9) and high.shape[2:] == (3, 5)
    assert network.head(low, high).shape == (1, 10, 6, 9)
    assert space.blueprint(head_of("aspp", space)).head.reads == ()
    alike = Segmenter(stages=(ResNetStage(widths=(4,), depths=(1,), stride=2), ResNetStage(widths=(6,), depths=(1,))))
    for other in (alike, replace(space, low_level=False)):
        assert "low" not in dict(other.blueprint(head_of("lraspp", other)).head.make.arguments)


def test_the_deep_map_is_weighted_by_its_mean_and_the_fine_one_is_added():
    head = initialised(lambda: LrAspp(inputs=5, width=4, classes=3, depth=0, low=2), 0).eval()
    low, high = torch.randn(2, 2, 7, 9), torch.randn(2, 5, 4, 5)
    weights = torch.sigmoid(head.scale(F.adaptive_avg_pool2d(high, 1)))
    deep = F.interpolate(head.project(high) * weights, (7, 9), mode="bilinear", align_corners=False)
    expected = head.decoder.classifier(deep) + F.conv2d(low, head.low.weight)
    torch.testing.assert_close(head(low, high), expected)


def test_a_map_that_the_head_reads_stays_in_memory_until_then():
    stages = tuple(ResNetStage(widths=(8,), depths=(2,), stride=s) for s in (1, 1, 2))
    space = Segmenter(size=(16, 20), stem_widths=(8,), stages=stages, heads=("lraspp",), head_widths=(512,))
    without = replace(space, low_level=False)
    both, alone = (s.blueprint(s.largest) for s in (space, without))
    shapes = feature_shapes(both)
    assert shapes["stages.1.1"] == (1, 8, 8, 10) and shapes["head"] == (1, 10, 8, 10)
    # In the head: the fine map beside the deep one.
    assert peak_memory(both) - peak_memory(alone) == 4 * 8 * 8 * 10
    wide = replace(space, head_widths=(1,), stages=(*stages[:2], replace(stages[2], widths=(64,), ratios=(8.0,))))
    both, alone = (s.blueprint(s.largest) for s in (wide, replace(wide, low_level=False)))
    # In the second block of the last stage, whose input is another map.
    assert peak_memory(both) - peak_memory(alone) == 4 * 8 * 8 * 10


@final
class Sums(OutputScorer):
    """The sum of the logits."""

    def judge(self, logits, digests, evidence):
        return Score(float(logits.double().sum()), {})


def segmentation(count=6):
    """Random images and masks."""
    rng = torch_rng("heads")
    images = torch.rand(count, 3, 13, 18, generator=rng)
    part = TensorImages(images, torch.randint(3, (count, 13, 18), generator=rng), Segmentation())
    return Data(part, part, part, ("a", "b", "c"), task=Segmentation())


def test_scores_over_common_prefixes_are_those_of_each_network_alone():
    data, supernet = segmentation(), supernet_of()
    space = supernet.space
    teacher = Frozen(supernet.extract(space.largest), preprocessing=data.preprocessing)
    pixels = data.search.take(torch.arange(6))
    held = Evidence(pixels, data.normalise(pixels), data.search.labels, teacher(pixels), teacher, data)
    rng = random.Random(0)
    several = [space.sample(rng) for _ in range(6)]
    several += [Architecture({**a, "head.kind": kind}) for a in several[:3] for kind in space.heads]
    (together,) = score_by_all(supernet, several, [Rdm()], held)
    assert together == [score_all(supernet, [a], Rdm(), held)[0] for a in several]
    assert len({score.value for score in together}) > 3
    with torch.no_grad():
        logits = [supernet(held.images, a, batch_statistics=True).logits for a in several]
    (judged,) = score_by_all(supernet, several, [Sums()], held)
    assert [score.value for score in judged] == [float(x.double().sum()) for x in logits]


def test_latency_is_measured_of_heads_of_two_maps_too():
    rows, space = [], replace(small(), size=(13, 18))
    blueprint = space.blueprint(head_of("lraspp", space))
    table = LatencyTable(torch.device("cpu"), write=rows.append, repeats=1)
    table.calibrate([blueprint, space.blueprint(head_of("aspp", space))])
    assert table.seconds(blueprint) > 0 and table.whole(blueprint) > 0
    (head,) = (json.loads(row["layer"]) for row in rows if "LrAspp" in row.get("layer", ""))
    assert head[1:] == [[1, 6, 7, 9], [1, 8, 4, 5]]


def test_a_script_measures_heads_of_two_maps_elsewhere(tmp_path, capsys):
    stage = ResNetStage(widths=(8,), depths=(1,), stride=2)
    space = Segmenter(size=(13, 18), stages=(stage, stage), stem_widths=(4,), head_widths=(4,), head_depths=(0,))
    write_measuring_script(space, tmp_path / "script.py", Target("eager", batch=2), 2)
    names = {"__name__": "measuring"}
    exec((tmp_path / "script.py").read_text(), names)
    names |= {"LEAST_CALLS": 1, "ROUNDS": 1, "SECONDS": 0.0}
    names["main"](json.loads(names["PAYLOAD"]), [str(tmp_path / "table.json")], names["MODULES"])
    table = LatencyTable(torch.device("cpu"), target=adopt(tmp_path / "table.json"))
    assert all(table.seconds(space.blueprint(a)) > 0 for a in space.all())
    assert sum('"low"' in key for key in table.layers) == 1


def test_the_remaining_layers_take_the_student_s_own_earlier_maps():
    supernet = supernet_of()
    architecture, images = head_of("lraspp"), torch.randn(2, 3, 21, 34)
    network = supernet.extract(architecture)
    with torch.no_grad():
        low, high = network(images).features
        assert torch.equal(network.remaining_layers(0, low), network.head(low, high))
    with torch.no_grad(), batch_statistics(network):
        for remaining in (network.remaining_layers, partial(supernet.remaining_layers, architecture=architecture)):
            torch.testing.assert_close(remaining(1, 2 * high, outputs=(low, high)), network.head(low, 2 * high))
            with pytest.raises(
                ValueError, match="those of the 1 stages before stage 1, as the head reads stage 0, got 0"
            ):
                remaining(1, high)


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
