"""Stages of other people's networks, and logits among what they return."""

from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer

from kdnas.network import hooked
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


def rows(layers=4, batch_first=False):
    """A transformer whose tokens are the 16 patches of an image, by default before the batch."""

    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches = nn.Conv2d(3, 8, 4, 4)
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)
            self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
            self.head = nn.Linear(8, 5)

        def forward(self, x):
            tokens = self.patches(x).flatten(2).permute((0, 2, 1) if batch_first else (2, 0, 1))
            return self.head(self.encoder(tokens).mean(1 if batch_first else 0))

    return Rows().eval()


@pytest.mark.parametrize("batch", [3, 16])
def test_tokens_that_come_before_the_batch_are_turned(batch):
    module = rows()
    teacher = Frozen(module, preprocessing=Preprocessing(height=16, width=16, mean=(0.0,) * 3, std=(1.0,) * 3))
    assert teacher.stages == tuple(f"encoder.layers.{i}" for i in range(4))
    pixels = torch.rand(batch, 3, 16, 16)
    feature, expected = teacher(pixels).features[-1], []
    with hooked([module.encoder.layers[3]], after=lambda _, __, output: expected.append(output)):
        module(pixels)
    assert torch.equal(feature, expected[0].transpose(0, 1))


def test_tokens_of_a_convolution_over_positions_have_their_channels_last():
    assert as_feature(nn.Conv1d(5, 7, 1), torch.zeros(2, 7, 9), (2, 3, 12, 12)).shape == (2, 9, 7)


def test_few_blocks_of_a_transformer_are_its_stages_rather_than_the_convolution_before_them():
    stages = find_stages(rows(layers=2, batch_first=True), torch.rand(2, 3, 16, 16))
    assert stages == ("encoder.layers.0", "encoder.layers.1")


class Branches(nn.Module):
    """A branch of low resolution, then one of full resolution."""

    def __init__(self):
        super().__init__()
        self.coarse = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 6, 3, 2, 1))
        self.fine, self.gate, self.head = nn.Conv2d(3, 5, 1), nn.Conv2d(3, 1, 3), nn.Linear(11, 2)

    def forward(self, x):
        coarse, fine = self.coarse(x).mean((2, 3)), self.fine(x) * self.gate(x).mean()
        return self.head(torch.cat([coarse, fine.mean((2, 3))], 1))


def test_stages_of_branches_are_in_order_of_resolution_and_gates_are_none():
    assert find_stages(Branches(), torch.rand(2, 3, 16, 16)) == ("fine", "coarse.1", "coarse")


def test_stages_that_come_before_most_layers_are_refused():
    class Folded(nn.Module):
        """Its blocks see all images of the batch in one sequence."""

        def __init__(self):
            super().__init__()
            self.patches, self.blocks = nn.Conv2d(3, 8, 4, 4), nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
            self.head = nn.Linear(8, 2)

        def forward(self, x):
            tokens = self.patches(x).flatten(2).transpose(1, 2)
            sequence = tokens.flatten(0, 1)[None]
            for block in self.blocks:
                sequence = block(sequence)
            return self.head(sequence.unflatten(1, tokens.shape[:2])[0].mean(1))

    with pytest.raises(ValueError, match="feature map or tokens, 'patches', comes before most of its layers"):
        find_stages(Folded(), torch.rand(2, 3, 16, 16))


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
    image, square = (2, 3, 16, 24), (2, 3, 16, 16)
    turned = as_feature(nn.GELU(), torch.zeros(2, 4, 6, 7), image)
    assert turned.shape == (2, 7, 4, 6)
    assert as_feature(nn.GELU(), torch.zeros(2, 7, 4, 6), image).shape == (2, 7, 4, 6)
    assert as_feature(nn.Linear(4, 4), torch.zeros(2, 4, 4, 4), square).shape == (2, 4, 4, 4)
    layer = torch.arange(32.0).reshape(1, 4, 4, 2)
    assert torch.equal(as_feature(nn.Linear(2, 2), layer, (1, 3, 16, 16))[0, :, 1, 2], layer[0, 1, 2])
    assert as_feature(nn.GELU(), torch.zeros(2, 30, 4, 9), image) is None
    assert as_feature(nn.Softmax(-1), torch.zeros(2, 3, 4, 4), square) is None
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
        {"aux": LOGITS + 1, "out": LOGITS},
        {"embedding": LOGITS + 1, "Predictions": LOGITS},
        (LOGITS, EMBEDDING),
        (EMBEDDING, LOGITS),
        (LOGITS.sum(), LOGITS),
        SimpleNamespace(scores=LOGITS, hidden=EMBEDDING),
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


@pytest.mark.parametrize(
    ("outputs", "names"),
    [([LOGITS, LOGITS + 1], "number 0 and number 1"), ({"aux": LOGITS, "scores": LOGITS}, "aux and scores")],
)
def test_of_several_outputs_that_may_be_the_logits_none_is_guessed(outputs, names):
    with pytest.raises(ValueError, match=f"of which {names} may be the logits"):
        logits_of(outputs, 3)


@pytest.mark.parametrize("logits", [LOGITS.long(), LOGITS.to(torch.complex64), LOGITS.to_sparse()])
def test_logits_that_are_no_dense_floats_are_refused(logits):
    with pytest.raises(ValueError, match="the teacher's logits must be a dense tensor of floats, got"):
        logits_of({"logits": logits}, 3)


@pytest.mark.parametrize(
    ("change", "shape"),
    [
        (lambda logits: logits[:1], r"\(1, 2\) for 4 images"),
        (lambda logits: logits.t(), r"\(2, 4\) for 4 images"),
        (lambda logits: logits.flatten(), r"\(8,\) for 4 images"),
    ],
)
def test_logits_are_one_row_per_image(change, shape):
    class Changed(Reusing):
        def forward(self, x):
            return change(super().forward(x))

    with pytest.raises(ValueError, match=rf"must return logits \[batch, classes\], got {shape}"):
        Frozen(Changed(), preprocessing=PLAIN)(torch.rand(4, 3, 8, 8))


def test_a_teacher_that_writes_into_its_images_does_not_change_those_that_losses_see():
    class Writing(Reusing):
        def forward(self, x):
            return super().forward(x.mul_(0))

    pixels = torch.rand(2, 3, 8, 8)
    images = Frozen(Writing(), preprocessing=PLAIN)(pixels).images
    assert images is not None
    torch.testing.assert_close(images, (pixels - 0.5) / 0.5)


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
def test_a_torchscript_module_inside_is_refused_by_its_name():
    module = Reusing()
    module.second = torch.jit.script(module.second)
    with pytest.raises(ValueError, match="second of the teacher is a TorchScript module"):
        Frozen(module, preprocessing=PLAIN)
    assert Frozen(module, preprocessing=PLAIN, stages=("first",)).stages == ("first",)
    assert Frozen(module, preprocessing=PLAIN, stages=())(torch.rand(2, 3, 8, 8)).logits.shape == (2, 2)


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


class Embedding(nn.Module):
    """Halves a map's sides, and returns tokens."""

    def __init__(self, inputs, width):
        super().__init__()
        self.reduce, self.norm = nn.Conv2d(inputs, width, 2, 2), nn.LayerNorm(width)

    def forward(self, x):
        return self.norm(self.reduce(x).flatten(2).transpose(1, 2))


class OneBlockPerStage(nn.Module):
    """A pyramid of tokens (PVT) of which every stage has a single block."""

    def __init__(self):
        super().__init__()
        widths = (3, 4, 6, 8, 10)
        self.embeddings = nn.ModuleList(map(Embedding, widths, widths[1:]))
        layers = (nn.TransformerEncoderLayer(width, 2, 8, 0.0, batch_first=True) for width in widths[1:])
        self.blocks = nn.ModuleList(nn.ModuleList([layer]) for layer in layers)
        self.head = nn.Linear(10, 5)

    def forward(self, x):
        for embedding, blocks in zip(self.embeddings, self.blocks, strict=True):
            tokens = blocks[0](embedding(x))
            x = tokens.transpose(1, 2).unflatten(2, (x.shape[2] // 2, x.shape[3] // 2))
        return self.head(tokens.mean(1))


def test_a_stage_of_one_block_ends_with_it_and_not_with_its_embedding():
    found = find_stages(OneBlockPerStage().eval(), torch.zeros(2, 3, 32, 32), classes=5)
    assert found == ("blocks.0.0", "blocks.1.0", "blocks.2.0", "blocks.3.0")
