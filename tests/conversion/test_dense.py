"""Networks for every pixel: what is cut out of them at any size, and what cannot be converted."""

import copy
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdnas.blocks.basic import enlarge
from kdnas.conversion.convert import convert
from kdnas.conversion.importance import channel_importance, sort_by_importance
from kdnas.conversion.reconstruction import Reconstruction
from kdnas.conversion.removal import Removal, ResidualBlock, units
from kdnas.costs.count import cost, counted_macs
from kdnas.jobs.convert import Plain
from kdnas.network import Network
from kdnas.randomness import initialised, torch_rng
from kdnas.spaces.resnet import ResNetStage
from kdnas.spaces.segmenter import Segmenter
from tests.conversion.test_reconstruction import masks_without, parts

SIZES = [(33, 46), (21, 64), (40, 40)]


def norm_conv(inputs, outputs, kernel=3, stride=1, dilation=1):
    conv = nn.Conv2d(inputs, outputs, kernel, stride, dilation * (kernel // 2), dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.branch = nn.Sequential(norm_conv(width, 6), nn.Conv2d(6, width, 3, 1, 1), nn.BatchNorm2d(width))

    def forward(self, x):
        return torch.relu(x + self.branch(x))


class Segmenting(nn.Module):
    """An encoder, concatenated branches, and a decoder that reads a finer map, as DeepLab's third and plus versions."""

    def __init__(self):
        super().__init__()
        self.stem, self.fine = norm_conv(3, 8, 3, 2), nn.Sequential(norm_conv(8, 10, 3, 2), Residual(10))
        self.deep = nn.Sequential(norm_conv(10, 12, 3, 2), Residual(12), Residual(12))
        self.branches = nn.ModuleList((norm_conv(12, 5, 1), norm_conv(12, 7, 3, 1, 2)))
        self.pooled, self.project = norm_conv(12, 4, 1), norm_conv(16, 9, 1)
        self.low, self.last, self.classifier = norm_conv(10, 6, 1), norm_conv(15, 8), nn.Conv2d(8, 3, 1)

    def forward(self, images):
        fine = self.fine(self.stem(images))
        deep = self.deep(fine)
        mean = F.interpolate(self.pooled(F.adaptive_avg_pool2d(deep, 1)), deep.shape[-2:], mode="bilinear")
        deep = self.project(torch.cat([*(branch(deep) for branch in self.branches), mean], 1))
        x = torch.cat([F.interpolate(deep, fine.shape[-2:], mode="bilinear"), self.low(fine)], 1)
        return F.interpolate(self.classifier(self.last(x)), images.shape[-2:], mode="bilinear", align_corners=False)


def lived(module):
    """The module with norms as after a training."""
    rng = torch_rng("lived")
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(generator=rng)
            norm.running_var.uniform_(0.5, 2, generator=rng)
            norm.weight.data.uniform_(0.5, 1.5, generator=rng)
            norm.bias.data.normal_(generator=rng)
    return module.eval()


@cache
def source():
    return lived(initialised(Segmenting, 0))


@cache
def conversion():
    return convert(source(), image=(3, 33, 46))


def whole():
    return conversion().supernet.extract(conversion().space.largest).eval()


def removal():
    return Removal(conversion().space, units(conversion().space))


def images(size, count=2):
    return torch.randn(count, 3, *size, generator=torch_rng("images", *size))


def test_the_whole_network_is_the_source_at_any_size_and_its_costs_are_exact():
    for size in SIZES:
        space = conversion().space.fitted(classes=3, image_channels=3, size=size)
        blueprint = space.blueprint(space.largest)
        with torch.no_grad(), counted_macs() as macs:
            expected = source()(images(size))
            assert torch.allclose(whole()(images(size)).logits, expected, atol=1e-5)
        with torch.device("meta"), counted_macs() as macs, torch.no_grad():
            Network(blueprint).eval()(torch.empty(1, 3, *size))
        assert blueprint.image == (3, *size) and blueprint.dense and cost(blueprint).macs == macs()


def test_the_head_begins_with_what_reads_a_finer_map():
    space = conversion().space
    assert len(space.reads) == 1 and [node.op for node in space.head.nodes][:1] == ["resize"]
    features = whole()(images((33, 46))).features
    assert features[space.reads[0]].shape[1:] == (10, 9, 12) and features[-1].shape[1:] == (9, 5, 6)
    assert sum(isinstance(unit, ResidualBlock) for unit in removal().units) == 3


def masks_of(seed):
    """Some channels of each group, and some blocks."""
    rng = torch_rng("masks", seed)
    masks = {unit.key: torch.rand(unit.size, generator=rng) < 0.6 for unit in removal().units}
    for unit in removal().units:
        masks[unit.key][0] |= not isinstance(unit, ResidualBlock)
    return masks


def silenced(network, masks):
    """The whole network, in which no layer reads what is removed, and blocks that are removed add nothing."""
    with torch.no_grad():
        for unit in removal().units:
            if isinstance(unit, ResidualBlock):
                end = network.get_submodule(f"{unit.position}.parts.{unit.end}")
                for tensor in end.parameters() if not masks[unit.key].all() else ():
                    tensor.zero_()
                continue
            for (position, index), where in unit.read():
                weight = network.get_submodule(f"{position}.parts.{index}").weight
                weight[:, where.start : where.stop][:, ~masks[unit.key]] = 0
    return network


@pytest.mark.parametrize("seed", range(4))
def test_what_is_left_computes_what_the_source_does_without_the_channels_that_went(seed):
    masks = masks_of(seed)
    assert {unit.size for unit in removal().units if getattr(unit, "concatenated", False)} == {4, 5, 6, 7, 9}
    left, expected = removal().network(dict(whole().state_dict()), masks).eval(), silenced(whole(), masks)
    with torch.no_grad():
        for size in SIZES:
            torch.testing.assert_close(left(images(size)).logits, expected(images(size)).logits, rtol=1e-4, atol=1e-5)
    assert cost(left.blueprint).macs < cost(whole().blueprint).macs


@pytest.mark.parametrize("method", ["activation", "reconstruction", "gradient"])
def test_channels_in_another_order_are_the_same_network(method):
    made = copy.deepcopy(conversion())
    pictures = images((33, 46))
    labels = torch.zeros(2, 33, 46, dtype=torch.long)
    order = partial(channel_importance, method=method, images=pictures, labels=labels)
    orders = sort_by_importance(made.supernet, order)
    assert any(not torch.equal(new, new.sort().values) for new in orders.values())
    with torch.no_grad():
        found = made.supernet(pictures, made.space.largest).logits
    torch.testing.assert_close(found, source()(pictures), rtol=1e-4, atol=1e-5)


def test_what_a_concatenated_channel_says_twice_is_not_lost():
    module = lived(initialised(Segmenting, 1))
    with torch.no_grad():  # channel 4 of the first branch is channel 0
        for tensor in module.branches[0].state_dict().values():
            if tensor.dim():
                tensor[4] = tensor[0]
    pictures = images((33, 46), 4)
    network, cut = parts(module, pictures)
    (branch,) = (unit for unit in cut.units if unit.size == 5)
    masks = masks_without(cut, branch.key, [4])
    with torch.no_grad():
        plain = cut.network(dict(network.state_dict()), masks).eval()
        fitted = Reconstruction(cut, network, pictures).network(masks).eval()
        apart = [float((net(pictures).logits - network(pictures).logits).norm()) for net in (plain, fitted)]
    assert branch.concatenated and apart[1] < 0.05 * apart[0]


STAGES = (ResNetStage(widths=(8,), depths=(1,), stride=2), ResNetStage(widths=(12,), depths=(2,), stride=2))


@pytest.mark.parametrize(("heads", "reads"), [(("lraspp",), (0,)), (("aspp",), ())])
def test_own_segmenters_are_cut(heads, reads):
    space = Segmenter(stages=STAGES, stem_widths=(8,), head_widths=(8,), heads=heads, classes=3, size=(33, 46))
    network = lived(initialised(lambda: Network(space.blueprint(space.largest)), 0))
    made = convert(Plain(network), image=(3, 33, 46))
    assert made.space.reads == reads
    for size in SIZES:
        with torch.no_grad():
            found = made.supernet(images(size), made.space.largest).logits
            torch.testing.assert_close(found, network(images(size)).logits, rtol=1e-4, atol=1e-5)


class Changed(Segmenting):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, images):
        return self.change(
            self.classifier(self.last.get_submodule("0")(torch.cat([self.fine(self.stem(images))] * 2, 1)[:, :15])),
            images,
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda x, images: F.interpolate(x, (50, 50)),
            "a resize to 50 x 50 for images of 128 x 128 cannot be converted",
        ),
        (
            lambda x, images: F.interpolate(x, images.shape[-2:], mode="bilinear", align_corners=True),
            r"Only the last one may be to the size of the images \(bilinear, corners not aligned\)",
        ),
        (
            lambda x, images: F.pad(x, (0, images.shape[3] % 2, 0, images.shape[2] % 2)),
            "the same operations for images of every size",
        ),
    ],
)
def test_what_depends_on_the_size_otherwise_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        convert(Changed(change), image=(3, 33, 46))


def test_logits_at_a_stride_are_enlarged():
    network = Changed(lambda x, images: x)
    made = convert(lived(network), image=(3, 33, 46))
    pictures = images((21, 64))
    with torch.no_grad():
        expected = enlarge(network(pictures), pictures)
        torch.testing.assert_close(made.supernet(pictures, made.space.largest).logits, expected, rtol=1e-4, atol=1e-5)
