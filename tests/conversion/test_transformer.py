"""Vision transformers as supernets: what they compute, what their subnets are, and what is refused."""

import copy
import random
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torchvision.models import swin_t
from torchvision.models.vision_transformer import ConvStemConfig, VisionTransformer

from kdnas.cli.commands import main
from kdnas.conversion.base import TOLERANCE
from kdnas.conversion.convert import convert
from kdnas.costs.budget import Budget
from kdnas.costs.count import cost
from kdnas.distillers.base import Batch, Step
from kdnas.distillers.sandwich import Sandwich
from kdnas.jobs.convert import SPACE, WEIGHTS, convert_source
from kdnas.jobs.prune import prune
from kdnas.settings import Prune
from kdnas.specs import spec
from kdnas.students.folder import read_student
from kdnas.supernet import Supernet
from kdnas.tables import load_space, space_from_table, table_of
from tests.toy import data

IMAGE = (3, 16, 16)
NORM = partial(nn.LayerNorm, eps=1e-3)
IMAGES = torch.randn(4, *IMAGE, generator=torch.Generator().manual_seed(0))


class TimmAttention(nn.Module):
    """timm's names: a fused projection, optional norms of queries and keys."""

    def __init__(self, width, heads, bias=True, qk_norm=nn.Identity, head_width=None):
        super().__init__()
        self.num_heads, self.head_dim = heads, head_width or width // heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(width, 3 * heads * self.head_dim, bias=bias)
        self.q_norm, self.k_norm = qk_norm(self.head_dim), qk_norm(self.head_dim)
        self.attn_drop = nn.Dropout(0.0)
        self.norm = nn.Identity()
        self.proj = nn.Linear(heads * self.head_dim, width)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x):
        shape = (*x.shape[:2], 3, self.num_heads, self.head_dim)
        queries, keys, values = self.qkv(x).reshape(shape).permute(2, 0, 3, 1, 4).unbind(0)
        queries, keys = self.q_norm(queries), self.k_norm(keys)
        seen = (queries * self.scale @ keys.transpose(-2, -1)).softmax(-1) @ values
        return self.proj_drop(self.proj(self.norm(seen.transpose(1, 2).flatten(2))))


class TimmMlp(nn.Module):
    def __init__(self, width, hidden, act):
        super().__init__()
        self.fc1, self.act, self.drop1 = nn.Linear(width, hidden), act(), nn.Dropout(0.0)
        self.norm, self.fc2, self.drop2 = nn.Identity(), nn.Linear(hidden, width), nn.Dropout(0.0)

    def forward(self, x):
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


class LayerScale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.gamma


class DropPath(nn.Module):
    drop_prob = 0.1

    def forward(self, x):
        assert not self.training
        return x


class TimmBlock(nn.Module):
    def __init__(self, width, heads, hidden, norm, act, scale=False, **attention):
        super().__init__()
        self.norm1, self.attn = norm(width), TimmAttention(width, heads, **attention)
        self.ls1, self.drop_path1 = LayerScale(width) if scale else nn.Identity(), nn.Identity()
        self.norm2, self.mlp = norm(width), TimmMlp(width, hidden, act)
        self.ls2, self.drop_path2 = LayerScale(width) if scale else nn.Identity(), DropPath()

    def forward(self, x):
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class PostBlock(TimmBlock):
    """The norms behind the branches, under the same names."""

    def forward(self, x):
        x = x + self.norm1(self.attn(x))
        return x + self.norm2(self.mlp(x))


class MaskedBlock(TimmBlock):
    """Attention that is scaled otherwise."""

    def __init__(self, *arguments, **more):
        super().__init__(*arguments, **more)
        self.attn.scale = 1.0


class GatedBlock(TimmBlock):
    """One half of the inner channels opens and closes the other."""

    def __init__(self, *arguments, **more):
        super().__init__(*arguments, **more)
        self.mlp.fc2 = nn.Linear(32, 32)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        value, gate = self.mlp.fc1(self.norm2(x)).chunk(2, 2)
        return x + self.mlp.fc2(value * self.mlp.act(gate))


class PatchEmbed(nn.Module):
    def __init__(self, width, patch, stride=None):
        super().__init__()
        self.proj, self.norm = nn.Conv2d(3, width, patch, stride or patch), nn.Identity()

    def forward(self, x):
        return self.norm(self.proj(x).flatten(2).transpose(1, 2))


class TimmTransformer(nn.Module):
    """A stand-in with the names and the order of computation of timm's VisionTransformer."""

    def __init__(
        self,
        block=TimmBlock,
        depth=3,
        heads=4,
        hidden=64,
        norm=NORM,
        act=nn.GELU,
        registers=0,
        no_embed_class=False,
        global_pool="token",
        pre_norm=False,
        stride=None,
        side=4,
        classes=5,
        **more,
    ):
        super().__init__()
        width, self.global_pool, self.no_embed_class = 32, global_pool, no_embed_class
        self.patch_embed = PatchEmbed(width, 16 // side, stride)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if global_pool == "token" else None
        self.reg_token = nn.Parameter(torch.zeros(1, registers, width)) if registers else None
        prefix = 0 if no_embed_class or global_pool != "token" else 1 + registers
        self.pos_embed = nn.Parameter(torch.zeros(1, prefix + side * side, width))
        self.pos_drop, self.patch_drop = nn.Dropout(0.0), nn.Identity()
        self.norm_pre = norm(width) if pre_norm else nn.Identity()
        self.blocks = nn.Sequential(*(block(width, heads, hidden, norm, act, **more) for _ in range(depth)))
        pools = global_pool == "avg"
        self.norm, self.fc_norm = (nn.Identity(), norm(width)) if pools else (norm(width), nn.Identity())
        self.head_drop, self.head = nn.Dropout(0.0), nn.Linear(width, classes)

    def forward_features(self, x):
        x = self.patch_embed(x)
        tokens = [t.expand(len(x), -1, -1) for t in (self.cls_token, self.reg_token) if t is not None]
        if self.no_embed_class:
            x = torch.cat([*tokens, x + self.pos_embed], 1)
        else:
            x = torch.cat([*tokens, x], 1) + self.pos_embed
        return self.norm(self.blocks(self.norm_pre(self.patch_drop(self.pos_drop(x)))))

    def forward(self, x):
        x = self.forward_features(x)
        x = x[:, 0] if self.global_pool == "token" else x.mean(1)
        return self.head(self.head_drop(self.fc_norm(x)))


class Distilled(TimmTransformer):
    def __init__(self):
        super().__init__()
        self.dist_token, self.head_dist = nn.Parameter(torch.zeros(1, 1, 32)), nn.Linear(32, 5)
        self.pos_embed = nn.Parameter(torch.zeros(1, 18, 32))


class SharedKeysBlock(TimmBlock):
    """All heads have the same keys and values."""

    def __init__(self, *arguments, **more):
        super().__init__(*arguments, **more)
        self.attn.qkv = nn.Linear(32, 32 + 2 * 8)


class WideHead(TimmTransformer):
    """Its classifier reads the class token and the mean of the others."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 5)


class TwoTokens(TimmTransformer):
    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 2, 32))


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = TimmTransformer()


class Pooled(TimmTransformer):
    """No attribute says that its head pools."""

    def __init__(self):
        super().__init__()
        del self.global_pool

    def forward(self, x):
        return self.head(self.forward_features(x)[:, 1:].mean(1))


class OtherStem(TimmTransformer):
    def forward_features(self, x):
        return super().forward_features(x.flip(3))


def lived(module, seed=0):
    """No norm, position, bias or factor is what it is in a new network."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() > 1 and "pos_embed" not in name:
                parameter.normal_(0, 1.2 * parameter[0].numel() ** -0.5 if "token" not in name else 1.0)
            else:
                parameter.normal_(0, 0.5).add_(1.0 if "weight" in name or "gamma" in name else 0.0)
    return module.eval()


def torchvision_source(**more):
    options = {"num_layers": 3, "num_heads": 4, "hidden_dim": 32, "mlp_dim": 64, "num_classes": 5} | more
    return lived(VisionTransformer(image_size=16, patch_size=4, **options))


def timm_source(**more):
    return lived(TimmTransformer(**more))


SOURCES = {
    "torchvision": torchvision_source,
    "torchvision, own eps and dropout": partial(
        torchvision_source, norm_layer=partial(nn.LayerNorm, eps=0.1), dropout=0.2, attention_dropout=0.1
    ),
    "timm": timm_source,
    "timm, no bias": partial(timm_source, bias=False),
    "timm, layer scale": partial(timm_source, scale=True),
    "timm, no position of the class token": partial(timm_source, no_embed_class=True),
    "timm, wide heads": partial(timm_source, heads=3, head_width=16),
    "timm, an odd inner width": partial(timm_source, hidden=67),
}


def attention_of(source, place):
    """Output projection of the attention, and the second linear layer, of one block."""
    if isinstance(source, VisionTransformer):
        block = source.encoder.layers[place]
        return block.self_attention.out_proj, block.mlp[3]
    block = source.blocks[place]
    return block.attn.proj, block.mlp.fc2


def least(weight, groups, kept):
    """The columns to be zeroed: those of all but the `kept` groups with the largest sums of absolute weights."""
    weight = weight.detach().numpy()
    columns = np.abs(weight).sum(0).reshape(groups, -1).sum(1)
    gone = np.argsort(-columns, kind="stable")[kept:]
    return [c for g in gone for c in range(g * weight.shape[1] // groups, (g + 1) * weight.shape[1] // groups)]


@pytest.mark.parametrize("name", SOURCES)
def test_the_largest_subnet_is_the_source(name):
    source = SOURCES[name]()
    found = convert(source, image=IMAGE, name="small")
    with torch.no_grad():
        expected = source(IMAGES)
        outputs = found.supernet(IMAGES, found.space.largest)
    assert expected.std() > 0.1
    torch.testing.assert_close(outputs.logits, expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert found.error <= TOLERANCE * max(1.0, float(expected.abs().max()))
    assert space_from_table(table_of(found.space)) == found.space
    for architecture in (found.space.smallest, found.space.sample(random.Random(0))):
        student = found.supernet.extract(architecture)
        assert torch.equal(student(IMAGES).logits, found.supernet(IMAGES, architecture).logits)
        assert not torch.allclose(student(IMAGES).logits, expected, atol=0.01)
    params = sum(p.numel() for n, p in source.named_parameters() if "gamma" not in n)
    token = 0 if name.endswith("class token") else 32  # one vector with its position
    assert cost(found.space.blueprint(found.space.largest)).params == params - token


def test_choices_are_depth_and_each_block_s_heads_and_inner_width():
    space = convert(torchvision_source(), image=IMAGE).space
    assert {choice.name: choice.options for choice in space.choices} == {
        "width": (32,),
        "depth": (2, 3),
        **{f"layer{i}.heads": (2, 3, 4) for i in range(3)},
        **{f"layer{i}.ratio": (1.0, 1.5, 2.0) for i in range(3)},
    }
    assert space.count() == 9**2 + 9**3
    assert (space.patch, space.head_width, space.norm_eps, space.qkv_bias, space.pool) == (4, 8, 1e-6, True, "class")
    assert convert(timm_source(), image=IMAGE).space.norm_eps == 1e-3
    # 67 channels are no multiple of the tokens' 32, and all of them are there.
    odd = convert(timm_source(hidden=67), image=IMAGE).space
    found = [odd.blueprint(odd.architecture({**odd.largest, "layer1.ratio": r})).stages[0][0].make for r in odd.ratios]
    assert {make["hidden"] for make in found} == {67}
    assert [round(ratio * 32) for ratio in odd.ratios] == [32, 48, 67]


@pytest.mark.parametrize("name", ["torchvision", "timm", "timm, no bias", "timm, wide heads"])
def test_a_subnet_with_fewer_heads_is_the_source_with_the_least_read_heads_columns_at_zero(name):
    source = SOURCES[name]()
    found = convert(source, image=IMAGE)
    heads = found.space.heads[-1]
    kept = {0: heads - 1, 2: 2}
    cut = copy.deepcopy(source)
    for place, number in kept.items():
        out, _ = attention_of(cut, place)
        with torch.no_grad():
            out.weight[:, least(out.weight, heads, number)] = 0
    values = {**found.space.largest, **{f"layer{place}.heads": number for place, number in kept.items()}}
    with torch.no_grad():
        logits = found.supernet(IMAGES, found.space.architecture(values)).logits
        torch.testing.assert_close(logits, cut(IMAGES), rtol=1e-4, atol=TOLERANCE)
        assert not torch.allclose(logits, source(IMAGES), atol=0.01)


def test_layer_scale_counts_for_which_heads_matter():
    source = timm_source(scale=True)
    found = convert(source, image=IMAGE)
    out, _ = attention_of(source, 1)
    cut = copy.deepcopy(source)
    with torch.no_grad():
        scaled = source.blocks[1].ls1.gamma[:, None] * out.weight
        attention_of(cut, 1)[0].weight[:, least(scaled, 4, 2)] = 0
        architecture = found.space.architecture({**found.space.largest, "layer1.heads": 2})
        torch.testing.assert_close(found.supernet(IMAGES, architecture).logits, cut(IMAGES), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["torchvision", "timm"])
def test_a_narrower_subnet_is_the_source_with_the_least_read_inner_channels_at_zero(name):
    source = SOURCES[name]()
    found = convert(source, image=IMAGE)
    cut = copy.deepcopy(source)
    _, down = attention_of(cut, 1)
    with torch.no_grad():
        down.weight[:, least(down.weight, 64, 48)] = 0
        architecture = found.space.architecture({**found.space.largest, "layer1.ratio": 1.5})
        torch.testing.assert_close(found.supernet(IMAGES, architecture).logits, cut(IMAGES), rtol=1e-4, atol=1e-5)


def test_a_shallower_subnet_is_the_source_without_its_last_block():
    source = timm_source()
    found = convert(source, image=IMAGE)
    values = {n: v for n, v in found.space.largest.items() if not n.startswith("layer2")}
    cut = copy.deepcopy(source)
    cut.blocks = cut.blocks[:2]
    with torch.no_grad():
        logits = found.supernet(IMAGES, found.space.architecture({**values, "depth": 2})).logits
        torch.testing.assert_close(logits, cut(IMAGES), rtol=1e-4, atol=1e-5)


def rows(source):
    return {row.module: (row.elastic, row.reason) for row in convert(source, image=IMAGE).report}


def test_every_part_with_weights_is_listed_elastic_or_fixed_and_why():
    source = torchvision_source(dropout=0.2, attention_dropout=0.1)
    told = rows(source)
    for name, _ in source.named_parameters():
        assert name in told or name.rpartition(".")[0] in told, name
    assert all(why for _, why in told.values())
    block = "encoder.layers.encoder_layer_0"
    assert told[f"{block}.self_attention"] == (True, "heads 2, 3, 4 (layer0.heads)")
    assert told[f"{block}.mlp.0"] == (True, "channels out 32, 48, 64 (layer0.ratio)")
    assert told[f"{block}.mlp.3"] == (True, "channels in 32, 48, 64 (layer0.ratio)")
    assert not told[f"{block}.ln_1"][0] and "layer norm over some of them would be another" in told[f"{block}.ln_1"][1]
    assert told["encoder.layers.encoder_layer_2.ln_2"] == (True, "may be left out (depth)")
    assert not told["conv_proj"][0] and "layer norm over some" in told["conv_proj"][1]
    assert told["encoder.dropout (0.2 dropped)"] == (False, "it is active in training only; no subnet has it")
    assert f"{block}.self_attention (0.1 dropped)" in told
    scaled = rows(timm_source(scale=True))
    assert scaled["blocks.0.ls1"] == (False, "its factors are multiplied into blocks.0.attn.proj")
    assert scaled["blocks.2.ls2"][1] == "may be left out (depth); its factors are multiplied into blocks.2.mlp.fc2"
    assert "blocks.1.drop_path2 (0.1 dropped)" in scaled


def test_a_part_with_nothing_to_choose_says_so():
    told = rows(timm_source(heads=1, hidden=8))
    assert told["blocks.0.attn.qkv"] == (False, "one head leaves nothing to choose")
    assert told["blocks.0.mlp.fc1"] == (False, "8 channels in steps of 8 leave nothing to choose")
    with pytest.raises(ValueError, match=r"can be made elastic.*blocks\.0\.attn\.qkv, blocks\.0\.attn\.proj: one head"):
        convert(timm_source(heads=1, hidden=8, depth=1), image=IMAGE)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Distilled, "dist_token is not part .*distillation token with a head of its own"),
        (partial(TimmTransformer, registers=2), "reg_token .*register tokens"),
        (
            partial(TimmTransformer, block=PostBlock),
            r"blocks\.0 \(PostBlock\) must be .*norm before it.* it differs by",
        ),
        (partial(TimmTransformer, block=MaskedBlock), r"blocks\.0 \(MaskedBlock\) must be"),
        (partial(TimmTransformer, block=GatedBlock), r"fc1 has 64 output channels, but blocks\.0\.mlp\.fc2 32"),
        (partial(TimmTransformer, block=SharedKeysBlock), r"must be queries, .* 4 heads, .* got shape \(48, 32\)"),
        (WideHead, r"head has weights of other shapes: size mismatch for linear\.weight"),
        (TwoTokens, r"cls_token must have the shape \(1, 1, 32\), got \(1, 2, 32\)"),
        (Wrapped, r"inner\.blocks\.0\.attn .* is attention .*with other parts beside a transformer"),
        (partial(TimmTransformer, global_pool="avg"), "the head pools the tokens .*'avg'"),
        (Pooled, "the input of head must be the normalised class token"),
        (OtherStem, r"the input of blocks\.0 must be the class token, then the patches"),
        (
            partial(TimmTransformer, norm=lambda width: nn.LayerNorm(width, bias=False)),
            r"the tensor .*norm.*\.bias .*is missing",
        ),
        (partial(TimmTransformer, pre_norm=True), "norm_pre.weight .*a norm before the blocks"),
        (partial(TimmTransformer, qk_norm=nn.LayerNorm), "q_norm.weight .*normalised queries"),
        (partial(TimmTransformer, act=nn.ReLU), r"blocks\.0\.mlp\.act must be exact GELU, it is a ReLU"),
        (partial(TimmTransformer, act=partial(nn.GELU, "tanh")), r"must be exact GELU, it is a GELU"),
        (partial(TimmTransformer, stride=2), "square, adjacent patches"),
        (partial(TimmTransformer, norm=nn.BatchNorm1d), r"blocks\.0\.norm1\.running_mean is not part"),
        (
            partial(VisionTransformer, 16, 4, 3, 4, 32, 64, representation_size=8),
            r"heads\.pre_logits\.weight .*a hidden layer before the classifier",
        ),
        (
            partial(VisionTransformer, 16, 4, 3, 4, 32, 64, conv_stem_configs=[ConvStemConfig(8, 3, 4)]),
            "conv_proj.* a stem that is more than one convolution",
        ),
        (partial(swin_t, weights=None), r"features\.1\.0\.attn \(ShiftedWindowAttention\) is attention"),
        (partial(nn.Sequential, nn.MultiheadAttention(8, 2)), r"0 \(MultiheadAttention\) is attention"),
    ],
)
def test_what_is_no_plain_vision_transformer_is_refused_by_name(source, message):
    made = source()
    if isinstance(made, TimmTransformer):
        lived(made)
    with pytest.raises(ValueError, match=message):
        convert(made, image=IMAGE)


def test_blocks_that_differ_are_refused():
    source = timm_source()
    source.blocks[1] = lived(TimmBlock(32, 2, 64, NORM, nn.GELU))
    with pytest.raises(ValueError, match="the same heads, inner widths and biases"):
        convert(source, image=IMAGE)
    source = timm_source()
    source.norm.eps = 1e-6
    with pytest.raises(ValueError, match=r"layer norms' eps, got \[1e-06, 0\.001\]"):
        convert(source, image=IMAGE)


def test_a_classifier_of_zeros_hides_nothing():
    """A new torchvision network's logits are all zero, whatever its blocks do."""
    source = timm_source(block=PostBlock)
    nn.init.zeros_(source.head.weight)
    with pytest.raises(ValueError, match="PostBlock"):
        convert(source, image=IMAGE)
    source = lived(Pooled())
    nn.init.zeros_(source.head.weight)
    with pytest.raises(ValueError, match="the input of head"):
        convert(source, image=IMAGE)


def test_images_of_another_size_or_with_other_channels_are_refused():
    with pytest.raises(ValueError, match=r"4 x 4 patches .* 32 x 32 have 8 x 8 patches\. Use .* image size, 16"):
        convert(torchvision_source(), image=(3, 32, 32))
    with pytest.raises(ValueError, match=r"18 x 18 have 4\.5 x 4\.5"):
        convert(timm_source(), image=(3, 18, 18))
    with pytest.raises(ValueError, match="3 channels for this network, got 1"):
        convert(timm_source(), image=(1, 16, 16))


def test_scale_factors_are_for_convolutions(tmp_path):
    settings = Prune(
        data=spec("tests.toy:data"),
        source="tests.conversion.test_transformer:tiny",
        budget=Budget(macs=1000),
        teacher=spec("kdnas.teachers:own_teacher", function="tests.toy:cnn"),
    )
    with pytest.raises(ValueError, match=r"tests\.conversion\.test_transformer:tiny is a vision transformer"):
        prune(settings, tmp_path / "pruned")


def test_a_sandwich_step_trains_every_weight():
    found, ids = convert(lived(TimmTransformer(side=4, classes=3)), image=IMAGE), torch.arange(8)
    supernet, given = found.supernet.train(), data()
    images = F.interpolate(given.train.take(ids).float(), (16, 16))
    batch = Batch(images, given.train.labels[ids], ids, given, None)
    before = {name: tensor.clone() for name, tensor in supernet.named_parameters()}
    optimiser = torch.optim.SGD(supernet.parameters(), 0.01)
    names = []
    for name, loss in Sandwich(terms=()).losses(supernet, batch, Step(0, 10, 0)):
        assert torch.isfinite(loss)
        loss.backward()
        names.append(name)
    optimiser.step()
    assert len(names) == 4
    for name, tensor in supernet.named_parameters():
        # A bias of the keys shifts all scores of a query alike, which a softmax does not see.
        assert not torch.equal(tensor, before[name]) or name.endswith("keys.bias"), name


def tiny():
    torch.manual_seed(1)
    return lived(VisionTransformer(8, 4, 2, 2, 16, 32, num_classes=3))


EXPERIMENT = """
from kdnas.costs.budget import Budget
from kdnas.costs.count import cost
from kdnas.settings import Experiment, Search, Train
from kdnas.specs import spec
from kdnas.tables import load_space
from kdnas.settings import FitTeacher, Recipe


def experiment():
    space, recipe = load_space({space!r}), Recipe(steps=2, batch_size=16, learning_rate=1e-9)
    train = Train(
        space=space, data=spec("tests.toy:data"), recipe=recipe, teacher=FitTeacher(recipe=recipe), weights={weights!r}
    )
    budget = Budget(macs=cost(space.blueprint(space.largest)).macs - 1)
    return Experiment(train=train, search=Search(budget=budget, num_evaluations=4, num_images=30))
"""


def test_from_the_command_line_to_a_student(tmp_path, capsys):
    out, run = tmp_path / "converted", tmp_path / "run"
    main(["convert", "tests.conversion.test_transformer:tiny", "--out", str(out), "--size", "8"])
    assert "subnets; the largest reproduces the source within" in capsys.readouterr().out
    supernet = Supernet(load_space(out / SPACE)).eval()
    supernet.load_state_dict(load_file(out / WEIGHTS))
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(supernet(images, supernet.space.largest).logits, tiny()(images))
    path = tmp_path / "experiment.py"
    path.write_text(EXPERIMENT.format(space=str(out / SPACE), weights=str(out / WEIGHTS)))
    main(["train", str(path), "--out", str(run)])
    main(["search", str(run)])
    main(["export", str(run), "--place", "1"])
    # Compared before they were written: the network, student.py, student.onnx.
    student = run / "students" / "place-1"
    assert {"student.py", "student.onnx"} <= {path.name for path in student.iterdir()}
    network, card = read_student(student)
    assert card.cost == cost(network.blueprint)
    assert card.cost.macs < cost(supernet.space.blueprint(supernet.space.largest)).macs
    weights = network.state_dict()["stem.patches.weight"]
    torch.testing.assert_close(weights, tiny().state_dict()["conv_proj.weight"], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="must be empty"):
        convert_source("tests.conversion.test_transformer:tiny", out, size=8)
