"""Stages of other people's networks, and logits among what they return."""

from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer

from kdnas.outputs import Outputs
from kdnas.preprocessing import Preprocessing
from kdnas.teachers.base import Frozen, every_layer
from kdnas.teachers.stages import as_feature, find_stages, logits_of, recorded


def timm_network(name, **options):
    timm = pytest.importorskip("timm")
    return timm.create_model(name, pretrained=False, num_classes=7, **options)


def swin():
    return SwinTransformer([2, 2], 12, [1, 1, 1], [2, 2, 4], [4, 4], num_classes=7)


def vit():
    return VisionTransformer(image_size=32, patch_size=8, num_layers=8, num_heads=2, hidden_dim=16, mlp_dim=32)


def convnext():
    widths = (6, 10, 14, 18)
    return ConvNeXt([CNBlockConfig(a, b, 2) for a, b in zip(widths, (*widths[1:], None), strict=True)], num_classes=7)


@pytest.mark.parametrize(
    ("make", "size", "stages", "shapes"),
    [
        (
            partial(models.resnet50, num_classes=7),
            64,
            ("relu", "layer1", "layer2", "layer3", "layer4"),
            [(64, 32), (256, 16), (512, 8), (1024, 4), (2048, 2)],
        ),
        (
            convnext,
            64,
            ("features.1", "features.3", "features.5", "features"),
            [(6, 16), (10, 8), (14, 4), (18, 2)],
        ),
        (swin, 64, ("features.1", "features.3", "permute"), [(12, 32), (24, 16), (48, 8)]),
        (
            partial(models.squeezenet1_1, num_classes=7),
            64,
            ("features.1", "features.4", "features.7", "features"),
            [(64, 31), (128, 15), (256, 7), (512, 3)],
        ),
        (
            partial(models.densenet121, num_classes=7),
            64,
            ("features.relu0", "features.denseblock1", "features.denseblock2", "features.denseblock3", "features"),
            [(64, 32), (256, 16), (512, 8), (1024, 4), (1024, 2)],
        ),
        (
            partial(timm_network, "swin_tiny_patch4_window7_224", img_size=64, window_size=2, depths=(1, 1, 1, 1)),
            64,
            ("layers.0", "layers.1", "layers.2", "norm"),
            [(96, 16), (192, 8), (384, 4), (768, 2)],
        ),
        (
            partial(timm_network, "convnext_atto"),
            64,
            ("stages.0", "stages.1", "stages.2", "stages"),
            [(40, 16), (80, 8), (160, 4), (320, 2)],
        ),
    ],
)
def test_the_stages_of_networks_with_maps_are_their_last_maps(make, size, stages, shapes):
    with torch.random.fork_rng():
        teacher = Frozen(make(), preprocessing=Preprocessing(height=size, width=size, mean=(0.5,) * 3, std=(1.0,) * 3))
    assert teacher.stages == stages
    features = teacher(torch.rand(1, 3, size, size)).features
    assert [tuple(f.shape[1:]) for f in features] == [(channels, side, side) for channels, side in shapes]


@pytest.mark.parametrize(
    ("make", "size", "stages"),
    [
        (vit, 32, [f"encoder.layers.encoder_layer_{i}" for i in (1, 3, 5, 7)]),
        (partial(timm_network, "vit_tiny_patch16_224", img_size=32), 32, [f"blocks.{i}" for i in (2, 5, 8, 11)]),
        (
            partial(timm_network, "levit_128s"),
            224,
            ["stages.0.blocks.1", "stages.1.blocks.1", "stages.2.blocks.0", "stages.2.blocks.3"],
        ),
        (partial(timm_network, "cait_xxs24_224", img_size=32), 32, [f"blocks.{i}" for i in (5, 11, 17, 23)]),
    ],
)
def test_the_stages_of_transformers_are_four_of_their_blocks(make, size, stages):
    assert find_stages(make().eval(), torch.rand(2, 3, size, size)) == tuple(stages)


class Reusing(nn.Module):
    def __init__(self):
        super().__init__()
        self.pool, self.first, self.second = (
            nn.MaxPool2d(2),
            nn.Conv2d(3, 4, 3, padding=1),
            nn.Conv2d(4, 5, 3, padding=1),
        )
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        x = self.pool(self.first(x).relu_())
        return self.head(self.pool(self.second(x).relu_()).mean((2, 3)))


def test_a_module_that_is_called_twice_is_where_its_last_call_is():
    module = Reusing().eval()
    with recorded(module, ["pool", "first", "second"]) as outputs:
        module(torch.rand(1, 3, 8, 8))
    assert list(outputs) == ["first", "second", "pool"]
    assert outputs["first"].min() < 0  # as it was before the activation in place


@pytest.mark.parametrize("order", [lambda m, logits: (m, logits), lambda m, logits: (m.mean((2, 3)), logits)])
def test_logits_behind_other_outputs_do_not_cost_the_deepest_stage(order):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 12, 3, 2, 1), nn.Linear(12, 4)

        def forward(self, x):
            maps = self.two(self.one(x))
            return order(maps, self.head(maps.mean((2, 3))))

    assert Frozen(Both(), preprocessing=PLAIN, classes=4).stages == ("one", "two")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Sequential(nn.LazyConv2d(4, 3)), "parameter 0.weight has no values yet"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, device="meta")), "parameter 0.weight has no values yet"),
        (lambda: torch.export.export(nn.Conv2d(3, 4, 3), (torch.rand(2, 3, 16, 16),)).module(), "evaluation mode"),
    ],
)
def test_a_module_that_cannot_compute_here_is_refused_in_a_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        Frozen(make(), preprocessing=PLAIN)


def test_a_map_in_which_channels_come_last_is_turned():
    image = (16, 24)
    turned = as_feature(nn.GELU(), torch.zeros(2, 4, 6, 7), image)
    assert turned.shape == (2, 7, 4, 6)
    assert as_feature(nn.GELU(), torch.zeros(2, 7, 4, 6), image).shape == (2, 7, 4, 6)
    assert as_feature(nn.Linear(4, 4), torch.zeros(2, 4, 4, 4), (16, 16)).shape == (2, 4, 4, 4)
    layer = torch.arange(32.0).reshape(1, 4, 4, 2)
    assert torch.equal(as_feature(nn.Linear(2, 2), layer, (16, 16))[0, :, 1, 2], layer[0, 1, 2])
    assert as_feature(nn.GELU(), torch.zeros(2, 30, 4, 9), image) is None
    assert as_feature(nn.Softmax(-1), torch.zeros(2, 3, 4, 4), (16, 16)) is None
    assert as_feature(nn.GELU(), torch.zeros(2, 9, 7), image).shape == (2, 9, 7)


class Pair(NamedTuple):
    logits: torch.Tensor
    aux_logits: torch.Tensor


class Hub:
    def __init__(self, logits):
        self.logits, self.hidden_states = logits, None


LOGITS, EMBEDDING = torch.arange(6.0).reshape(2, 3), torch.ones(2, 8)


@pytest.mark.parametrize(
    "outputs",
    [
        LOGITS,
        LOGITS[:, :, None, None],
        {"logits": LOGITS, "embedding": EMBEDDING},
        {"out": LOGITS, "map": torch.ones(2, 3, 4, 4)},
        (LOGITS, EMBEDDING),
        (EMBEDDING, LOGITS),
        [LOGITS, LOGITS + 1],
        Pair(LOGITS, LOGITS + 1),
        Hub(LOGITS),
        Outputs(LOGITS),
        LOGITS.to(torch.bfloat16),
    ],
)
def test_logits_are_taken_from_whatever_a_network_returns(outputs):
    logits = logits_of(outputs, 3)
    assert logits.dtype is torch.float32 and torch.equal(logits, LOGITS)


@pytest.mark.parametrize("outputs", [{"map": torch.ones(2, 3, 4, 4)}, (EMBEDDING, EMBEDDING), None, "text", ()])
def test_outputs_without_logits_are_refused_with_what_they_are(outputs):
    with pytest.raises(ValueError, match=r"must return logits \[batch, classes\].* got a "):
        logits_of(outputs, 3)


PLAIN = Preprocessing(height=8, width=8, mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.mark.slow
def test_compiled_and_parallel_modules_are_used_without_what_is_around_them():
    pixels, module = torch.rand(2, 3, 8, 8), Reusing()
    expected = Frozen(module, preprocessing=PLAIN)(pixels)
    part = Reusing()
    part.load_state_dict(module.state_dict())
    part.first = torch.compile(part.first)
    for wrapped in (torch.compile(module), nn.DataParallel(module), part):
        teacher = Frozen(wrapped, preprocessing=PLAIN)
        assert teacher.stages == ("first", "second", "pool")
        assert torch.equal(teacher(pixels).logits, expected.logits)
        assert torch.equal(teacher(pixels).features[0], expected.features[0])


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_a_torchscript_module_teaches_by_logits_or_is_refused():
    module = Reusing().eval()
    traced = torch.jit.trace(module, torch.rand(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"TorchScript module shows no feature maps.*stages=\(\)"):
        Frozen(traced, preprocessing=PLAIN)
    teacher, pixels = Frozen(traced, preprocessing=PLAIN, stages=()), torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(teacher(pixels).logits, Frozen(module, preprocessing=PLAIN)(pixels).logits)


def test_a_module_of_half_precision_gives_float32():
    outputs = Frozen(Reusing().bfloat16(), preprocessing=PLAIN)(torch.rand(2, 3, 8, 8))
    assert {outputs.logits.dtype, *(f.dtype for f in outputs.features)} == {torch.float32}


class Fixed(nn.Module):
    def forward(self, x):
        assert x.shape[2] == 32, "Input height (8) doesn't match model (32)"
        return x.mean((2, 3))


def test_a_module_that_fails_is_answered_with_its_words_and_a_way_out():
    with pytest.raises(
        ValueError, match=r"3 x 8 x 8, but it fails on them \(AssertionError: Input height.*Preprocessing\("
    ):
        Frozen(Fixed(), preprocessing=PLAIN)


def test_a_stage_that_returns_no_map_is_refused():
    teacher = Frozen(Reusing(), preprocessing=PLAIN, stages=("head",))
    with pytest.raises(
        ValueError, match=r"stage 'head' of the teacher must return a map or tokens, got shape \(2, 2\)"
    ):
        teacher(torch.rand(2, 3, 8, 8))


def test_every_layer_of_a_transformer_in_a_list_is_shown():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 3)) for _ in range(5))

        def forward(self, x):
            x = F.avg_pool2d(x, 2).flatten(2).transpose(1, 2)
            for block in self.blocks:
                x = x + block(x)
            return x.mean(1)

    teacher = Frozen(Listed(), preprocessing=PLAIN)
    assert teacher.stages == ("blocks.0", "blocks.1", "blocks.2", "blocks.4")
    assert every_layer(teacher).stages == tuple(f"blocks.{i}" for i in range(5))
