"""Every operation that a conversion knows, written as people write it: exact at two sizes, and in smaller subnets."""

import copy
import random
import warnings

import pytest
import timm.layers
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.utils import parametrizations, prune

from kdnas.conversion.channels import operations
from kdnas.conversion.convert import convert
from kdnas.costs.count import cost
from kdnas.network import Network
from kdnas.preprocessing import Preprocessing
from kdnas.students.card import Card
from kdnas.students.folder import read_student, write_student

C = 16


class Lambda(nn.Module):
    """A function of the map, and modules or parameters under names."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.function(self, x)


def conv(inputs=C, outputs=C, kernel=3, **options):
    return nn.Conv2d(inputs, outputs, kernel, padding=options.pop("padding", kernel // 2), **options)


def parameter(*shape):
    return nn.Parameter(torch.rand(*shape) + 0.5)


def buffers(**tensors):
    module = nn.Module()
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor)
    return module


def of(function):
    return lambda: Lambda(lambda self, x: function(x))


def gate(pool, unpool=lambda y: y, layer=lambda: conv(kernel=1)):
    return lambda: Lambda(lambda self, x: x * torch.sigmoid(unpool(self.fc(pool(x)))), fc=layer())


def old_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(conv())


def masked():
    layer = conv()
    return Lambda(
        lambda self, x: F.conv2d(x, self.layer.weight * self.own.mask, self.layer.bias, padding=1),
        layer=layer,
        own=buffers(mask=(torch.rand(layer.weight.shape) > 0.5).float()),
    )


def pruned():
    layer = conv()
    prune.l1_unstructured(layer, "weight", amount=0.5)
    return layer


def in_place():
    def forward(self, x):
        y = self.one(x)
        y.mul_(0.5).add_(1)
        y += x
        F.relu_(y)
        return nn.functional.silu(self.two(y), inplace=True)

    return Lambda(forward, one=conv(), two=conv())


def in_place_through_a_view():
    def forward(self, x):
        y = self.one(x)
        y.flatten(1).relu_()
        return y * 2

    return Lambda(forward, one=conv())


def shuffle_unit():
    def forward(self, x):
        kept, x = x.chunk(2, dim=1)
        return torch.cat([kept, self.two(F.relu(self.one(x)))], 1)

    half = C // 2
    return nn.Sequential(Lambda(forward, one=conv(half, 24, 1), two=conv(24, half)), nn.ChannelShuffle(2))


def shuffled_by_views():
    def forward(self, x):
        batch, channels, height, width = x.size()
        x = x.view(batch, 4, channels // 4, height, width).transpose(1, 2).contiguous()
        return self.one(x.view(batch, -1, height, width))

    return Lambda(forward, one=conv(groups=2))


def ghost():
    def forward(self, x):
        y = self.one(x)
        return torch.cat([y, self.cheap(y)], dim=1)[:, : C - 1] - 1

    return nn.Sequential(Lambda(forward, one=conv(outputs=C // 2), cheap=conv(C // 2, C // 2)), conv(inputs=C - 1))


def split():
    def forward(self, x):
        a, b, c = torch.split(x, [4, 4, 8], dim=1)
        return torch.cat([self.one(a), b, c.neg()], 1)

    return Lambda(forward, one=conv(4, 4))


def convnext():
    def forward(self, x):
        y = self.depthwise(x).permute(0, 2, 3, 1)
        y = self.down(F.gelu(self.up(self.norm(y)))) * self.gamma
        return x + y.permute(0, 3, 1, 2)

    layers = {"norm": nn.LayerNorm(C, eps=1e-6), "up": nn.Linear(C, 64), "down": nn.Linear(64, C)}
    return Lambda(forward, depthwise=conv(kernel=7, groups=C), **layers, gamma=parameter(C))


def tokens():
    def forward(self, x):
        height = x.shape[2]
        y = self.down(F.relu(self.up(self.norm(x.flatten(2).transpose(1, 2)))))
        return x + y.transpose(1, 2).unflatten(2, (height, -1))

    return Lambda(forward, norm=nn.LayerNorm(C), up=nn.Linear(C, 32), down=nn.Linear(32, C, bias=False))


def affine():
    def forward(self, x):
        y = (x - self.own.mean[None, :, None, None]) / self.own.std.view(1, -1, 1, 1)
        return y * self.gain + self.shift.reshape(-1, 1, 1)

    own = buffers(mean=torch.rand(C), std=torch.rand(C) + 0.5)
    return Lambda(forward, own=own, gain=parameter(1), shift=parameter(C))


def arithmetic(x):
    y = torch.sub(1, x, alpha=2) / 6 + torch.square(x) - x**2 * 0.5
    return torch.add(y, x, alpha=-0.5).mul(2.0) - 3


def squeezed(x):
    return F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1)


def resized(x):
    options = ({}, {"mode": "bilinear"}, {"mode": "bilinear", "align_corners": True})
    nearest, bilinear, aligned = (F.interpolate(x, scale_factor=2, **option) for option in options)
    return F.avg_pool2d(nearest - bilinear * aligned, 2)


BLOCKS = {
    "activations": of(lambda x: F.mish(F.hardswish(torch.tanh(x))) + F.leaky_relu(x, 0.2) * F.elu(x, 0.7)),
    "more activations": of(lambda x: F.gelu(x, approximate="tanh") + F.softplus(x) + F.hardsigmoid(x) * x.clamp(-1, 2)),
    "still more activations": of(lambda x: torch.clamp(x, min=0) + F.relu6(x) + F.hardtanh(x) + F.silu(-x)),
    "prelu": lambda: nn.Sequential(nn.PReLU(C), conv(), nn.PReLU()),
    "arithmetic": of(arithmetic),
    "affine": affine,
    "max pool": lambda: nn.Sequential(
        nn.MaxPool2d(3, 2, 1, ceil_mode=True), Lambda(lambda s, x: F.max_pool2d(x, 3, 1, 1))
    ),
    "avg pool": lambda: nn.Sequential(
        nn.AvgPool2d(3, 1, 1, count_include_pad=False), nn.AvgPool2d(2, 2, ceil_mode=True)
    ),
    "gate by mean": gate(lambda x: x.mean((2, 3), keepdim=True)),
    "gate by vector": gate(lambda x: x.mean([-1, -2]), lambda y: y.view(*y.shape, 1, 1), lambda: nn.Linear(C, C)),
    "gate by squeeze": gate(squeezed, lambda y: y[:, :, None, None], lambda: nn.Linear(C, C)),
    "gate by whole window": gate(lambda x: F.avg_pool2d(x, x.shape[2:]) + F.max_pool2d(x, x.size()[2:])),
    "gate by maximum": gate(lambda x: x.amax((2, 3), keepdim=True) + F.adaptive_max_pool2d(x, 1)),
    "gate expanded": gate(lambda x: x.mean((2, 3), keepdim=True), lambda y: y.expand(-1, -1, 1, 1)),
    "gate of positions": gate(lambda x: x, layer=lambda: conv(outputs=1)),
    "group norm": lambda: nn.Sequential(nn.GroupNorm(4, C), conv()),
    "instance norm": lambda: nn.Sequential(nn.InstanceNorm2d(C, affine=True), conv()),
    "layer norm": lambda: nn.Sequential(timm.layers.LayerNorm2d(C), conv()),
    "one group": lambda: nn.Sequential(timm.layers.GroupNorm1(C), conv()),
    "batch norm without factors": lambda: nn.Sequential(nn.BatchNorm2d(C, affine=False), conv()),
    "batch norm with activation": lambda: nn.Sequential(conv(), timm.layers.BatchNormAct2d(C)),
    "frozen batch norm": lambda: nn.Sequential(conv(), torchvision.ops.FrozenBatchNorm2d(C)),
    "convnext": convnext,
    "tokens": tokens,
    "shuffle unit": shuffle_unit,
    "shuffle by views": shuffled_by_views,
    "ghost": ghost,
    "split": split,
    "1 x 7": lambda: nn.Sequential(
        nn.Conv2d(C, C, (1, 7), padding=(0, 3)), nn.Conv2d(C, C, (7, 1), padding="same", groups=C)
    ),
    "dilated across": lambda: nn.Conv2d(C, C, 3, padding=(1, 2), dilation=(1, 2), bias=False),
    "resize": of(resized),
    "constants": of(lambda x: (x - torch.tensor([0.5])) / torch.tensor(2.0)),
    "padding": lambda: nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), conv(kernel=2, padding=0), conv(padding="same")),
    "in place": in_place,
    "in place through a view": in_place_through_a_view,
    "older weight norm": old_weight_norm,
    "weight norm": lambda: parametrizations.weight_norm(conv()),
    "spectral norm": lambda: parametrizations.spectral_norm(conv()),
    "mask": masked,
    "pruned": pruned,
    "standardised": lambda: timm.layers.StdConv2d(C, C, 3, padding=1),
    "dropout": lambda: nn.Sequential(nn.Dropout(0.3), nn.Dropout2d(0.2), torchvision.ops.StochasticDepth(0.1, "row")),
    "drop path": lambda: Lambda(lambda self, x: x + self.drop(self.one(x)), one=conv(), drop=timm.layers.DropPath(0.1)),
}
COMPUTED = {"affine", "older weight norm", "weight norm", "spectral norm", "standardised"}  # or given factors
FACTORS = {"batch norm without factors": 2 * C}


def network(*names, head=None):
    torch.manual_seed(0)
    blocks = [BLOCKS[name]() for name in names]
    head = head or [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(C, 5)]
    module = nn.Sequential(nn.Conv2d(3, C, 3, padding=1), *blocks, conv(outputs=24), nn.ReLU(), conv(24), *head)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d | nn.BatchNorm1d | torchvision.ops.FrozenBatchNorm2d):
            part.running_mean.normal_(0, 0.1)
            part.running_var.uniform_(0.5, 1.5)
    return module.eval()


def check(module, sizes=(12, 17)):
    """The largest subnet is the source in 64-bit numbers, at two sizes; smaller ones are their students."""
    conversion = convert(module, image=(3, sizes[0], sizes[0]))
    space, supernet = conversion.space, conversion.supernet
    student, source = supernet.extract(space.largest).double(), copy.deepcopy(module).double()
    with torch.no_grad():
        for size in sizes:
            images = torch.randn(2, 3, size, size, dtype=torch.float64)
            x = student.stem(images)
            for stage in student.stages:
                x = stage(x)
            expected = source(images)
            assert (student.head(x) - expected).abs().max() <= 2e-6 * max(1, expected.abs().max()), size
        images = torch.randn(2, 3, sizes[0], sizes[0])
        for seed in range(3):
            architecture = space.sample(random.Random(seed)) if seed else space.smallest
            smaller = supernet.extract(architecture)
            assert torch.equal(smaller(images).logits, supernet(images, architecture).logits)
    return conversion


@pytest.mark.parametrize("name", BLOCKS)
def test_an_operation_is_converted_exactly(name):
    module = network(name)
    conversion = check(module)
    if name not in COMPUTED:
        params = sum(p.numel() for p in module.parameters()) + FACTORS.get(name, 0)
        assert cost(conversion.space.blueprint(conversion.space.largest)).params == params


def test_regularisers_that_do_nothing_in_evaluation_mode_are_recorded():
    space = convert(network("dropout", "drop path"), image=(3, 12, 12)).space
    nodes = [node for layer in operations(space).values() for node in layer]
    rates = [(node.op, *node.values) for node in nodes if "drop" in node.op]
    assert rates == [("dropout", 0.3), ("channel_dropout", 0.2), ("drop_path", 0.1), ("drop_path", 0.1)]


@pytest.mark.parametrize("seed", range(5))
def test_operations_are_converted_exactly_one_after_another(seed):
    check(network(*random.Random(seed).sample(sorted(BLOCKS), 4)), sizes=(24, 33))


@pytest.mark.slow
def test_every_operation_is_in_the_student_s_code_and_onnx_graph(tmp_path):
    """`write_student` compares the network with student.py and student.onnx in ONNX Runtime."""
    left_out = {"one group"}  # its many small numbers after the others say nothing
    conversion = convert(network(*(name for name in BLOCKS if name not in left_out)), image=(3, 32, 32))
    space = conversion.space
    narrower = conversion.supernet.extract(space.sample(random.Random(4)))
    preprocessing = Preprocessing(height=32, width=32, mean=(0.5,) * 3, std=(0.25,) * 3)
    card = Card(
        architecture=None,
        space=None,
        blueprint=narrower.blueprint,
        cost=cost(narrower.blueprint),
        preprocessing=preprocessing,
        class_names=tuple("abcde"),
    )
    write_student(tmp_path / "student", narrower, card)
    assert read_student(tmp_path / "student")[1].cost == card.cost


HEADS = {
    "convolution": lambda: [conv(outputs=5, kernel=1), nn.AdaptiveAvgPool2d(1), nn.Flatten()],
    "convolution on one position": lambda: [nn.AdaptiveAvgPool2d(1), conv(outputs=5, kernel=1), nn.Flatten()],
    "norm of logits": lambda: [of(squeezed)(), nn.Linear(C, 5), nn.BatchNorm1d(5), of(lambda x: x * 2)()],
    "norm of features": lambda: [of(lambda x: x.mean((2, 3)))(), nn.BatchNorm1d(C), nn.LayerNorm(C), nn.Linear(C, 5)],
    "hidden layer": lambda: [of(lambda x: x.amax((-2, -1)))(), nn.Linear(C, 20), nn.BatchNorm1d(20), nn.Linear(20, 5)],
    "two poolings": lambda: [
        of(lambda x: torch.cat([x.mean((2, 3)), F.adaptive_max_pool2d(x, 1).flatten(1)], 1))(),
        nn.Linear(2 * C, 5),
    ],
    "sum of two": lambda: [of(squeezed)(), Lambda(lambda s, x: s.a(x) + s.b(x), a=nn.Linear(C, 5), b=nn.Linear(C, 5))],
}


@pytest.mark.parametrize("name", HEADS)
def test_a_classifier_follows_the_classes_and_the_first_layer_the_channels(name):
    conversion = check(network(head=HEADS[name]()))
    space = conversion.space.fitted(classes=8, image_channels=1)
    for architecture in (space.largest, space.smallest):
        assert Network(space.blueprint(architecture))(torch.rand(2, 1, 12, 12)).logits.shape == (2, 8)


def test_classes_that_cannot_follow_are_refused_when_the_data_have_others():
    layers = {"a": nn.Linear(C, 2), "b": nn.Linear(C, 3)}
    head = [of(squeezed)(), Lambda(lambda s, x: torch.cat([s.a(x), s.b(x)], 1), **layers)]
    space = check(network(head=head)).space
    assert space.fitted(classes=5, image_channels=1).image_channels == 1
    with pytest.raises(ValueError, match=r"has 5 classes, the data 8, and its layers cannot follow. Use data with 5"):
        space.fitted(classes=8, image_channels=3)


def test_channels_that_cannot_follow_are_refused_when_the_data_have_others():
    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.rest = conv(3, C - 3), nn.Sequential(conv(), conv(), *list(network())[-3:])

        def forward(self, x):
            return self.rest(torch.cat([x, self.first(x)], 1))

    space = check(Beside().eval()).space
    assert space.fitted(classes=8, image_channels=3).classes == 8
    with pytest.raises(
        ValueError, match=r"has 3 image channels, the data 1, and its layers cannot follow\. Use data wi"
    ):
        space.fitted(classes=5, image_channels=1)


def test_computed_weights_and_modules_without_effect_are_reported():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.main, self.auxiliary = network("weight norm"), nn.Linear(C, 2)

        def forward(self, x):
            return self.main(x)

    report = {row.module: row for row in convert(Auxiliary().eval(), image=(3, 12, 12)).report}
    assert report["main.1"].reason.endswith("its weight, computed in the source, becomes a plain tensor")
    assert report["auxiliary"] == ("auxiliary", False, "no logit depends on it, so it is left out")
