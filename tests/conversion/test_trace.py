import dataclasses
import random
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models

from kdnas.cli.commands import main
from kdnas.conversion.base import TOLERANCE
from kdnas.conversion.convert import convert
from kdnas.costs.count import cost
from kdnas.jobs.convert import SPACE, WEIGHTS, convert_source, load_source
from kdnas.network import Network
from kdnas.preprocessing import Preprocessing
from kdnas.space import SearchSpace
from kdnas.students.card import Card
from kdnas.students.folder import read_student, write_student
from kdnas.supernet import Supernet
from kdnas.tables import load_space, table_of

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def lived(module):
    """The module with statistics and scales that are not those of a new one."""
    torch.manual_seed(0)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, 0, 0.1)
    return module.eval()


def conv(inputs, outputs, kernel=3, stride=1, groups=1):
    made = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(made, nn.BatchNorm2d(outputs), nn.ReLU())


class Residual(nn.Module):
    def __init__(self, channels, hidden, groups=1):
        super().__init__()
        self.one, self.two = conv(channels, hidden), conv(hidden, hidden, groups=groups)
        self.three = nn.Conv2d(hidden, channels, 1)

    def forward(self, x):
        return F.relu(x + self.three(self.two(self.one(x))))


class Squeeze(nn.Module):
    def __init__(self, channels, hidden):
        super().__init__()
        self.one, self.two = conv(channels, hidden), nn.Conv2d(hidden, channels, 1)
        self.down, self.up = nn.Conv2d(hidden, 4, 1), nn.Conv2d(4, hidden, 1)

    def forward(self, x):
        y = self.one(x)
        return x + self.two(y * torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(y, 1))))))


class Small(nn.Module):
    def __init__(self, *blocks, head=None):
        super().__init__()
        self.stem, self.blocks = conv(3, 16), nn.Sequential(*blocks)
        self.head = head or nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)))


def small():
    torch.manual_seed(0)
    return lived(Small(Residual(16, 32), Residual(16, 32, groups=32), Squeeze(16, 32)))


def rows(found):
    return {row.module: (row.elastic, row.reason) for row in found.report}


def check(module, images, **expected):
    found = convert(module, image=tuple(images.shape[1:]))
    space, supernet = found.space, found.supernet
    with torch.no_grad():
        source = module(images)
        largest = supernet(images, space.largest).logits
        assert (largest - source).abs().max() <= TOLERANCE * max(1.0, source.abs().max())
        for architecture in (space.smallest, space.sample(random.Random(0)), space.largest):
            student = supernet.extract(architecture)
            assert torch.equal(student(images).logits, supernet(images, architecture).logits)
        assert not torch.allclose(supernet(images, space.smallest).logits, source)
    assert cost(space.blueprint(space.smallest)).macs < 0.8 * cost(space.blueprint(space.largest)).macs
    parameters = sum(p.numel() for p in module.parameters())
    assert cost(space.blueprint(space.largest)).params == parameters
    return found


def test_a_residual_network_becomes_elastic_in_depth_and_width():
    found = check(small(), IMAGES)
    names = {choice.name: choice.options for choice in found.space.choices}
    assert names == {
        "stream0.width": (8, 12, 16),
        "stage0.depth": (1, 2, 3),
        "stage0.block0.branch": (0, 1),
        "stage0.block0.width0": (8, 12, 16, 20, 24, 28, 32),
        "stage0.block0.width1": (8, 12, 16, 20, 24, 28, 32),
        "stage0.block1.width0": (8, 12, 16, 20, 24, 28, 32),
        "stage0.block2.width0": (8, 12, 16, 20, 24, 28, 32),
    }
    told = rows(found)
    assert set(told) == {n for n, m in small().named_modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d | nn.Linear)}
    assert told["stem.0"] == (True, "channels out 8, 12, 16 (stream0.width)")
    assert told["head.2"] == (True, "channels in 8, 12, 16 (stream0.width)")
    assert told["blocks.0.one.0"] == (
        True,
        "may be left out (stage0.block0.branch); channels in 8, 12, 16 (stream0.width); "
        "channels out 8, 12, 16, 20, 24, 28, 32 (stage0.block0.width0)",
    )
    # The depthwise convolution is narrowed with what feeds it.
    assert told["blocks.1.two.0"][1].count("stage0.block1.width0") == 2
    assert told["blocks.2.down"][0] and "may be left out (stage0.depth)" in told["blocks.2.down"][1]
    assert all(why for _, why in told.values())


def test_a_shallower_subnet_is_the_source_without_its_last_blocks():
    module = small()
    found = convert(module, image=(3, 16, 16))
    kept = {n: v for n, v in found.space.largest.items() if not n.startswith("stage0.block2")}
    shallow = found.space.architecture({**kept, "stage0.depth": 2})
    with torch.no_grad():
        expected = module.head(module.blocks[1](module.blocks[0](module.stem(IMAGES))))
        torch.testing.assert_close(found.supernet(IMAGES, shallow).logits, expected)


def test_whole_groups_of_a_grouped_convolution_are_kept():
    found = check(lived(Small(Residual(16, 64, groups=4))), IMAGES)
    assert [c.options for c in found.space.choices] == [(8, 12, 16), (0, 1), (16, 32, 48, 64)]
    found = check(lived(Small(Residual(16, 96, groups=2))), IMAGES)
    assert [c.options for c in found.space.choices] == [(8, 12, 16), (0, 1), (48, 96)]


def test_a_plain_network_is_elastic_between_its_poolings():
    features = nn.Sequential(conv(16, 32), conv(32, 32), nn.MaxPool2d(2), conv(32, 64), conv(64, 64), nn.MaxPool2d(2))
    head = nn.Sequential(nn.Flatten(), nn.Linear(64 * 16, 48), nn.ReLU(), nn.Dropout(), nn.Linear(48, 5))
    found = check(lived(Small(features, head=head)), IMAGES)
    told = rows(found)
    assert [told[f"blocks.0.{i}.0"][0] for i in (0, 1, 3, 4)] == [True, True, True, True]
    assert told["stem.0"][0]
    assert told["blocks.0.1.0"][1].startswith("channels in 8, 12, 16, 20, 24, 28, 32 (stem.width1)")
    assert told["head.1"] == (True, "channels out 8, 12, 16, 24, 32, 36, 40, 48 (head.width0)")


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0"])
def test_torchvision_s_networks_are_reproduced_and_shrink_to_a_small_share(name):
    torch.manual_seed(1)
    found = check(lived(models.get_model(name, weights=None, num_classes=7)), torch.randn(2, 3, 64, 64))
    # Against the zoo's own layers and classes, on its own images, counted without storage.
    space = dataclasses.replace(found.space, resolutions=(224,), classes=1000)
    with torch.device("meta"):
        module, images = models.get_model(name, weights=None).eval(), torch.empty(1, 3, 224, 224)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(images)
    whole, smallest = cost(space.blueprint(space.largest)), cost(space.blueprint(space.smallest))
    assert whole == (sum(p.numel() for p in module.parameters()), counter.get_total_flops() // 2)
    assert smallest.macs <= 0.15 * whole.macs and smallest.params <= 0.15 * whole.params
    assert found.smallest_shares()["macs"] <= 0.15


def test_a_block_without_a_shortcut_adds_nothing():
    space = load_space("channel_bench_macro_resnet")
    smallest = lived(Network(space.blueprint(space.smallest)))

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.stages, self.head = smallest.stem, smallest.stages, smallest.head

        def forward(self, x):
            x = self.stem(x)
            for stage in self.stages:
                x = stage(x)
            return self.head(x)

    found = check(Logits(), torch.randn(2, 3, 32, 32))
    assert found.error <= TOLERANCE


class Concatenated(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.fc = conv(3, 16), conv(16, 16), nn.Linear(32, 5)

    def forward(self, x):
        x = self.one(x)
        return self.fc(torch.cat([x, self.two(x)], 1).mean((2, 3)))


class Odd(Small):
    def forward(self, x):
        return self.head(torch.fft.fft(self.stem(x)).abs())


class Branching(Small):
    def forward(self, x):
        return self.head(self.stem(x) if x.sum() > 0 else self.stem(-x))


class Repeated(Small):
    def forward(self, x):
        return self.head(self.blocks(self.blocks(self.stem(x))))


class Several(Small):
    def forward(self, x):
        return self.head(self.stem(x)), x


class Attention(nn.Module):
    def forward(self, x):
        y = x.flatten(2)
        return ((y @ y.transpose(1, 2)).softmax(-1) @ y).view_as(x)


class Called(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def tied():
    module = Small(nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1))
    module.blocks[1].weight = module.blocks[0].weight
    return module


def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still in stored networks
        return torch.jit.trace(small(), IMAGES)


def halved():
    return Small(nn.Conv2d(16, 16, 1).half())


class Weighted(nn.Module):
    """Uses a weight of its own twice, by a function of both."""

    def __init__(self, function, *shape):
        super().__init__()
        self.w = nn.Parameter(torch.rand(shape) / 8)
        self.function = function

    def forward(self, x):
        return self.function(x, self.w)


def letter():
    """A layer of one letter, called twice."""
    module = Small()
    module.blocks = nn.Identity()
    module.c = nn.Conv2d(16, 16, 3, padding=1)
    module.forward = lambda x: module.head(module.c(module.c(module.stem(x)).relu()))
    return module


def scripted_part():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Small(torch.jit.script(nn.Conv2d(16, 16, 1)))


def quantised_part():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(small(), {nn.Linear}, dtype=torch.qint8)


def untracked():
    return Small(nn.BatchNorm2d(16, track_running_stats=False))


def test_a_full_disk_is_not_the_network_s_fault(monkeypatch):
    def full(*_, **__):
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(torch.export, "export", full)
    with pytest.raises(FileNotFoundError, match="temporary directory"):
        convert(small(), image=(3, 16, 16))


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Concatenated(), r"nothing in the network can be made elastic.*one\.0.*: its channels are concatenated"),
        (Odd(), r"forward \(Odd\): the operation fft_fft cannot be converted\. Supported"),
        (Branching(), "cannot be traced: its forward depends on the values of a tensor"),
        (
            nn.Sequential(conv(4, 16)),
            r"does not take images of 3 x 16 x 16.*: 0\.0 \(Conv2d\): .*4 channels, but got 3",
        ),
        (Small(nn.Conv2d(16, 16, (1, 3))), r"blocks\.0 \(Conv2d\): a convolution of kernel \[1, 3\]"),
        (Small(nn.AvgPool2d(2, divisor_override=3)), r"blocks\.0 \(AvgPool2d\): an average of windows that are not"),
        (
            Small(nn.MaxPool2d(3, 1, 1, dilation=2)),
            r"blocks\.0 \(MaxPool2d\): a maximum of windows that are not square",
        ),
        (Small(nn.ConvTranspose2d(16, 16, 2)), r"blocks\.0 \(ConvTranspose2d\): the operation conv_transpose2d cannot"),
        (
            Small(nn.Upsample(scale_factor=1.5)),
            r"blocks\.0 \(Upsample\): a resize from \d+ x \d+ to \d+ x \d+, by no whole",
        ),
        (
            Small(nn.Upsample(scale_factor=2, mode="bicubic")),
            r"blocks\.0 \(Upsample\): the operation upsample_bicubic2d",
        ),
        (Small(nn.Linear(16, 16)), r"blocks\.0 \(Linear\): a linear layer on another axis than the channels"),
        (Small(Attention()), r"blocks\.0 \(Attention\): a product of two tensors that depend on the images, as in att"),
        (
            Small(Called(lambda x: x + torch.rand(1))),
            r"blocks\.0 \(Called\): it draws random numbers in evaluation mode",
        ),
        (
            Small(Called(lambda x: F.dropout(x, 0.5, True))),
            r"blocks\.0 \(Called\): dropout that is active in evaluation",
        ),
        (
            Small(Called(lambda x: x - x.mean(1, keepdim=True))),
            r"blocks\.0 \(Called\): a mean over other axes than height",
        ),
        (Small(Called(lambda x: x[:, :, ::2, ::2])), r"blocks\.0 \(Called\): a part of a tensor along another axis"),
        (
            Small(Called(lambda x: x + torch.ones(16, 16, 16))),
            r"blocks\.0 \(Called\): a product or sum with a tensor of",
        ),
        (Small(Called(lambda x: x.reshape(2, 16, 8, 2, 16).sum(3))), r"blocks\.0 \(Called\): the operation sum cannot"),
        (untracked(), r"blocks\.0 \(BatchNorm2d\): a norm by the statistics of the batch, in evaluation mode too"),
        (Small(nn.BatchNorm2d(16, momentum=None)), r"blocks\.0 \(BatchNorm2d\): .*momentum=None"),
        (Repeated(Residual(16, 16)), r"blocks\.0\.one\.0 is called more than once, so its places share weights"),
        (tied(), r"blocks\.1 has the weights of blocks\.0, so its places share weights"),
        (letter(), "c is called more than once, so its places share weights"),
        (
            Small(Weighted(lambda x, w: F.conv2d(F.conv2d(x, w).relu(), w), 16, 16, 1, 1)),
            r"blocks\.0 uses a weight more than once, so its places share weights",
        ),
        (
            Small(Weighted(lambda x, w: (x * w[:, None, None]).relu() * w[:, None, None], 16)),
            r"blocks\.0 uses a weight",
        ),
        (Small(nn.Sequential(*[nn.PReLU()] * 2)), r"blocks\.0\.1 has the weights of blocks\.0\.0"),
        (scripted_part(), r"blocks\.0 is a TorchScript module, which cannot be converted"),
        (quantised_part(), r"is a quantised layer, which cannot be converted\. Convert the network of floats"),
        (Small(nn.GRU(16, 16)), r"blocks\.0 is a recurrent layer, which cannot be converted"),
        (Small(nn.LazyConv2d(16, 1)), r"blocks\.0\.weight has no values yet"),
        (Small(Weighted(lambda x, w: x + w.data.mul_(1.0).sum(), 1)), "its forward changes its own weights"),
        (halved(), r"blocks\.0\.weight must be float32 on the CPU for a conversion, it is torch\.float16"),
        (nn.Sequential(conv(3, 16), nn.Flatten(2)), r"logits \[batch, classes\], it returns a tensor \[2, 16, 256\]"),
        (Several(), r"one tensor of logits \[batch, classes\], it returns a tuple"),
        (scripted(), "a TorchScript module cannot be converted"),
        (nn.Sequential(nn.Flatten(), nn.Linear(768, 5), nn.Softmax(1)), r"2 \(Softmax\): the operation softmax cannot"),
    ],
)
def test_what_cannot_be_converted_is_refused_by_name(module, message, capsys):
    with pytest.raises(ValueError, match=message):
        convert(module.eval(), image=(3, 16, 16))
    assert capsys.readouterr() == ("", "")


class WrittenNorm(nn.Module):
    """A batch norm in four operations."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(16)), nn.Parameter(torch.rand(16))
        self.register_buffer("mean", torch.rand(16))

    def forward(self, x):
        factor = self.weight / 2
        return x * factor[:, None, None] + (self.bias - self.mean * factor)[:, None, None]


def test_a_norm_written_out_may_use_its_weight_for_factor_and_summand():
    assert convert(Small(WrittenNorm()), image=(3, 16, 16)).error <= TOLERANCE


def test_images_that_are_not_square_are_refused():
    with pytest.raises(ValueError, match="square, got 16 x 12"):
        convert(small(), image=(3, 16, 12))


def test_without_choices_it_is_converted_where_none_are_needed():
    found = convert(Concatenated(), image=(3, 16, 16), needs_choices=False)
    assert found.space.count() == 1 and found.error <= TOLERANCE


class Attentive(nn.Module):
    """One channel of attention to positions, spread over all channels."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = conv(3, 16), conv(16, 32), conv(32, 16)
        self.attention, self.fc = nn.Conv2d(32, 1, 1), nn.Linear(16, 5)

    def forward(self, x):
        x = self.one(x)
        y = self.two(x)
        x = x + self.three(y * torch.sigmoid(self.attention(y)))
        return self.fc(x.mean((2, 3)))


def test_one_channel_that_is_spread_over_others_stays_one():
    found = check(Attentive(), torch.randn(2, 3, 16, 16))
    told = rows(found)
    assert "channels in 8, 12, 16, 20, 24, 28, 32 (stage0.block0.width0)" in told["attention"][1]
    assert "channels out" not in told["attention"][1]
    names = [choice.name for choice in found.space.choices]
    assert names == ["stream0.width", "stage0.block0.branch", "stage0.block0.width0"]
    for options in found.space.all():
        found.supernet.extract(options)(torch.randn(2, 3, 16, 16))


def source():
    return small()


def test_the_command_writes_a_space_and_weights_to_start_from(tmp_path, capsys, monkeypatch):
    out = tmp_path / "converted"
    main(["convert", "tests.conversion.test_trace:source", "--out", str(out), "--size", "16"])
    said = capsys.readouterr()
    assert "blocks.0.one.0  elastic" in said.out
    assert "subnets; the largest reproduces the source within" in said.out
    assert re.search(r"the smallest has \d+\.\d% of the MACs and \d+\.\d% of the params", said.out)
    assert f"--space {out / SPACE} --weights {out / WEIGHTS}" in said.err
    supernet = Supernet(load_space(out / SPACE)).eval()
    supernet.load_state_dict(load_file(out / WEIGHTS))
    with torch.no_grad():
        torch.testing.assert_close(supernet(IMAGES, supernet.space.largest).logits, source()(IMAGES))
    with pytest.raises(ValueError, match="must be empty"):
        convert_source("tests.conversion.test_trace:source", out, size=16)


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        (["macs=0.5%"], r"params and [\d,]+ macs"),
        (["macs=50%", "params=10"], r"params and [\d,]+ macs"),
        (["size=100B"], r"params, [\d,]+ macs and size [\d,]+ bytes"),
        (["latency=1us"], r"takes [\d.]+ ms, more than twice the bound of 0.001 ms"),
    ],
)
def test_a_budget_that_no_subnet_meets_is_refused_with_the_smallest_costs(tmp_path, capsys, bounds, words):
    command = ["convert", "tests.conversion.test_trace:source", "--out", str(tmp_path / "converted"), "--size", "16"]
    with pytest.raises(SystemExit):
        main([*command, *(text for bound in bounds for text in ("--budget", bound))])
    assert re.search(rf"infeasible: .*{words}.*\. Raise the budget", capsys.readouterr().err)
    assert not (tmp_path / "converted").exists()
    main([*command, "--budget", "macs=90%"])
    assert (tmp_path / "converted" / SPACE).exists()


def test_a_zoo_s_network_is_filled_from_a_file(tmp_path):
    torch.manual_seed(3)
    module = models.get_model("squeezenet1_1", weights=None, num_classes=4)
    save_file(module.state_dict(), tmp_path / "w.safetensors")
    loaded, own = load_source(f"torchvision:squeezenet1_1@{tmp_path / 'w.safetensors'}", classes=4)
    assert torch.equal(loaded.state_dict()["features.0.weight"], module.state_dict()["features.0.weight"])
    assert own is not None and (own.height, own.width) == (224, 224)
    with pytest.raises(ValueError, match="torchvision:NAME"):
        load_source("resnet18")


def test_a_run_starts_from_the_weights_and_its_students_stand_alone(tmp_path):
    from kdnas.jobs.export import card_of, export, inherited
    from kdnas.jobs.search import search
    from kdnas.jobs.train import train
    from kdnas.settings import Experiment, FitTeacher, Recipe, Search, Train
    from kdnas.specs import spec

    convert_source("tests.conversion.test_trace:three", tmp_path / "c", size=8)
    recipe = Recipe(steps=1, batch_size=16, learning_rate=1e-9)
    experiment = Experiment(
        train=Train(
            space=load_space(tmp_path / "c" / SPACE),
            data=spec("tests.toy:data"),
            recipe=recipe,
            teacher=FitTeacher(recipe=recipe),
            weights=str(tmp_path / "c" / WEIGHTS),
        )
    )
    assert Experiment.from_json(experiment.to_json()) == experiment
    run = train(experiment, tmp_path / "run")
    name = "bank.stages_0_0:shared.parts.0.weight"
    weights = load_file(tmp_path / "c" / WEIGHTS)[name]
    torch.testing.assert_close(run.supernet.state_dict()[name].cpu(), weights, rtol=0, atol=1e-6)
    search(run, Search(num_evaluations=3, num_images=30, control=False))
    export(run, 1, tmp_path / "student")
    network, card = read_student(tmp_path / "student")
    assert card.cost == cost(network.blueprint)
    smallest = inherited(run, run.space.smallest)  # without the branch of its block; every form is compared
    write_student(tmp_path / "smallest", smallest, card_of(run, smallest, run.space.smallest, {}))
    assert read_student(tmp_path / "smallest")[1].cost == cost(run.space.blueprint(run.space.smallest))


def test_a_student_is_converted_at_its_own_size_and_a_network_without_one_at_the_default(tmp_path, capsys):
    space = convert(three(), image=(3, 8, 8)).space
    network = Supernet(space).eval().extract(space.largest)
    card = Card(
        architecture=space.largest,
        space=table_of(space),
        blueprint=network.blueprint,
        cost=cost(network.blueprint),
        preprocessing=Preprocessing(height=8, width=8, mean=(0.5,) * 3, std=(0.5,) * 3),
        class_names=("a", "b", "c"),
    )
    write_student(tmp_path / "student", network, card, deploy=False)
    main(["convert", f"checkpoint:{tmp_path / 'student'}", "--out", str(tmp_path / "again")])
    said = capsys.readouterr()
    assert "images of 3 x 8 x 8 (the network's own size). Another: --size" in said.out + said.err
    again = load_space(tmp_path / "again" / SPACE)
    assert (again.name, again.classes, again.resolutions) == ("student", 3, (8,))
    supernet = Supernet(again).eval()
    supernet.load_state_dict(load_file(tmp_path / "again" / WEIGHTS))
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(supernet(images, again.largest).logits, network(images).logits)
    with pytest.raises(SystemExit, match="2"):
        main(["convert", str(tmp_path / "student"), "--out", str(tmp_path / "other")])
    assert f"Did you mean 'checkpoint:{tmp_path / 'student'}'?" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["convert", f"checkpoint:{tmp_path / 'student'}", "--out", str(tmp_path / "other"), "--size", "0"])
    assert "`--size` must be at least 1, got 0." in capsys.readouterr().err
    main(["convert", "tests.conversion.test_trace:three", "--out", str(tmp_path / "large")])
    said = capsys.readouterr()
    assert "images of 3 x 224 x 224 (the default: the network names no size). Another: --size" in said.out + said.err
    assert "on images of 3 x 224 x 224" in said.out


def three():
    torch.manual_seed(0)
    return lived(Small(Residual(16, 32), head=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))))


OLD = """
family = "converted"
name = "old"
source = "kdnas convert"
classes = 3
image_channels = 3
resolutions = [8]
stem = { nodes = [{ op = "conv", inputs = [0], values = ["channels", 16, 3, 1, 1, 1, 0, 0] }, { op = "relu", inputs = [1], values = [] }], widths = [] }
head = { nodes = [{ op = "pool", inputs = [0], values = [1] }, { op = "flatten", inputs = [1], values = [] }, { op = "linear", inputs = [2], values = [16, "classes", 1] }], widths = [] }
[[stages]]
depths = [1, 2]
[[stages.parts]]
widths = [[16, 24, 32]]
nodes = [{ op = "conv", inputs = [0], values = [16, "w0", 3, 1, 1, 1, 0, 0] }, { op = "conv", inputs = [1], values = ["w0", 16, 1, 1, 0, 1, 0, 1] }, { op = "add", inputs = [0, 2], values = [] }]
[[stages.parts]]
widths = [[16, 24, 32]]
nodes = [{ op = "conv", inputs = [0], values = [16, "w0", 3, 1, 1, 1, 0, 0] }, { op = "conv", inputs = [1], values = ["w0", 16, 1, 1, 0, 1, 0, 1] }, { op = "add", inputs = [0, 2], values = [] }]
"""  # noqa: E501


def test_a_table_written_before_streams_were_elastic_is_read_as_it_was(tmp_path):
    (tmp_path / "old.toml").write_text(OLD)
    space = load_space(tmp_path / "old.toml")
    assert {c.name: (c.options, c.needs) for c in space.choices} == {
        "stage0.depth": ((1, 2), None),
        "stage0.block0.width0": ((16, 24, 32), None),
        "stage0.block1.width0": ((16, 24, 32), "stage0.depth"),
    }
    assert space.code(space.largest) == "122" and space.code(space.smallest) == "00."
    supernet = Supernet(space).eval()
    assert supernet(torch.rand(2, 3, 8, 8), space.smallest).logits.shape == (2, 3)
    largest, smallest = (cost(space.blueprint(a)) for a in (space.largest, space.smallest))
    assert largest.macs == 64 * (27 * 16 + 2 * (9 * 16 * 32 + 32 * 16)) + 48
    assert smallest.macs == 64 * (27 * 16 + 9 * 16 * 16 + 16 * 16) + 48


def test_widths_of_a_table_that_descend_are_refused_with_their_place(tmp_path):
    (tmp_path / "old.toml").write_text(OLD.replace("widths = [[16, 24, 32]]", "widths = [[16, 32, 24]]", 1))
    with pytest.raises(
        ValueError, match=r"`stages\[0\]\.parts\[0\]\.widths\[0\]` must be ascending, got \[16, 32, 24\]"
    ):
        load_space(tmp_path / "old.toml")


def test_the_extremes_are_those_that_a_search_by_cost_finds():
    space = convert(small(), image=(3, 16, 16)).space
    by_cost = [SearchSpace._extreme(space, end) for end in (0, -1)]
    assert by_cost == [space.smallest, space.largest]
