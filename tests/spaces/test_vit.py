"""AutoFormer's space: count, published cost, and the arithmetic of its blocks."""

import dataclasses
import random

import pytest
import torch
from torch import nn

from kdnas.blocks.vit import Attention, EncoderBlock, PatchTokens, RelativePosition, TokensLinear
from kdnas.costs.count import cost
from kdnas.losses.attention.attention_map import AttentionMap
from kdnas.spaces.vit import ViT
from kdnas.supernet import Supernet
from kdnas.tables import load_space

TINY = load_space("autoformer_t")
SMALL = ViT(
    patch=2,
    widths=(6, 8),
    depths=(2, 3),
    heads=(1, 2),
    ratios=(1.5, 2.0),
    head_width=4,
    reach=2,
    cuts=(1,),
    resolutions=(6, 8),
)


def released():
    """AutoFormer-T as released: its ratios of 3 are outside the space it is said to be from."""
    heads = [3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 4, 3, 3]
    ratios = [3.5, 3.5, 3.0, 3.5, 3.0, 3.0, 4.0, 4.0, 3.5, 4.0, 3.5, 4.0, 3.5]
    values = {"width": 192, "depth": 13}
    for place in range(13):
        values |= {f"layer{place}.heads": heads[place], f"layer{place}.ratio": ratios[place]}
    return values


def test_the_space_counts_a_width_and_per_layer_two_heads_and_two_ratios():
    assert TINY.count() == 3 * (4**12 + 4**13 + 4**14)


def test_the_released_network_has_its_published_cost():
    space = dataclasses.replace(TINY, ratios=(3.0, 3.5, 4.0))
    architecture = space.architecture(released())
    # Published as 5.8 M, cut off, and 1.3 G without the products of the relative positions.
    assert int(cost(space.blueprint(architecture)).params / 1e5) == 58
    plain = dataclasses.replace(space, reach=0)
    assert round(cost(plain.blueprint(architecture)).macs / 1e9, 1) == 1.3


def test_a_network_has_the_parameters_counted_by_hand():
    width, inner, hidden = 192, 3 * 64, 672
    linears = 3 * (width * inner + inner) + inner * width + width + 2 * width * hidden + hidden + width
    layer = linears + 4 * width + 4 * 30 * 64
    ends = 3 * 16 * 16 * width + width + width * (14 * 14 + 1) + 2 * width + width * 1000 + 1000
    assert cost(TINY.blueprint(TINY.smallest)).params == 12 * layer + ends


def test_a_subnet_is_its_student_at_every_resolution():
    supernet, rng = Supernet(SMALL).eval(), random.Random(0)
    assert sum(p.numel() for p in supernet.parameters()) == cost(SMALL.blueprint(SMALL.largest)).params
    for architecture in (SMALL.smallest, SMALL.largest, *(SMALL.sample(rng) for _ in range(4))):
        images = torch.randn(2, 3, 8, 8)
        student = supernet.extract(architecture)
        inside, outside = supernet(images, architecture), student(images)
        assert torch.equal(inside.logits, outside.logits)
        assert all(map(torch.equal, inside.features, outside.features))
        tokens = 1 + (architecture["resolution"] // 2) ** 2
        assert [f.shape for f in inside.features] == [(2, tokens, architecture["width"])] * 2
        assert SMALL.parse(SMALL.code(architecture)) == architecture


def test_the_head_reads_the_class_token_or_the_mean_of_the_others():
    x = torch.tensor([[[1.0, 3.0], [5.0, 5.5], [0.0, 4.0]]])
    for pool, normed in (("class", [-1.0, 1.0]), ("mean", [-1.0, 1.0])):
        head = TokensLinear(2, 2, pool, 3.0)
        with torch.no_grad():
            head.linear.weight.copy_(torch.eye(2))
            head.linear.bias.zero_()
        # Centred tokens are (-1, 1), (-1/4, 1/4), (-2, 2); the variances 1, 1/16, 4; eps is 3.
        scales = [1 / 2] if pool == "class" else [0.25 / 3.0625**0.5, 2 / 7**0.5]
        expected = torch.tensor(normed) * sum(scales) / len(scales)
        torch.testing.assert_close(head(x)[0], expected)


def test_norms_biases_and_the_head_are_as_the_table_says():
    space = dataclasses.replace(SMALL, pool="class", norm_eps=0.5, qkv_bias=False)
    student = Supernet(space).extract(space.smallest)
    norms = [m for m in student.modules() if isinstance(m, nn.LayerNorm)]
    assert len(norms) == 5 and {norm.eps for norm in norms} == {0.5} and student.head.pool == "class"
    found = {name.rpartition(".")[0].rpartition(".")[2] for name, _ in student.named_parameters() if "bias" in name}
    assert found & {"queries", "keys", "values"} == set() and "out" in found
    assert {m.eps for m in Supernet(SMALL).modules() if isinstance(m, nn.LayerNorm)} == {1e-5}


def test_an_inner_width_that_is_no_multiple_is_whole():
    # Cut off instead of rounded, most of them would be one less.
    hidden_widths = sorted({n for n in range(1, 200) if int(49 * (n / 49)) != n} | {3, 48, 50, 199})
    assert len(hidden_widths) > 8
    space = dataclasses.replace(SMALL, widths=(49,), ratios=tuple(n / 49 for n in hidden_widths))
    for hidden in hidden_widths:
        architecture = space.architecture({**space.smallest, "layer0.ratio": hidden / 49})
        assert space.blueprint(architecture).stages[0][0].make["hidden"] == hidden


def test_fewer_heads_are_the_leading_heads_of_more():
    supernet = Supernet(SMALL)
    student = supernet.extract(SMALL.smallest)
    rows = supernet.bank["stages_0_0:shared"].attention.queries.weight
    assert torch.equal(student.stages[0][0].attention.queries.weight, rows[:4, :6])


def test_a_smaller_image_has_the_middle_of_the_positions():
    space = dataclasses.replace(SMALL, resolutions=(4, 8))
    supernet = Supernet(space)
    student = supernet.extract(space.architecture({**space.largest, "resolution": 4}))
    assert torch.equal(student.stem.positions, supernet.bank["stem:shared"].positions[:, :, 1:3, 1:3])


def test_tokens_are_patches_in_reading_order_behind_the_class_token():
    stem = PatchTokens(1, 1, 2, 2)
    with torch.no_grad():
        stem.patches.weight.fill_(0.25)
        stem.patches.bias.zero_()
        stem.class_token.fill_(9.0)
        stem.positions.copy_(torch.tensor([[[[10.0, 20.0], [30.0, 40.0]]]]))
    images = torch.tensor([[1.0, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]])[None, None]
    assert stem(images)[0, :, 0].tolist() == [9.0, 11.0, 22.0, 33.0, 44.0]


def test_relative_positions_are_rows_plus_columns_up_to_their_reach():
    relative = RelativePosition(1, 1)
    with torch.no_grad():
        relative.rows.copy_(torch.tensor([[0.5], [1.0], [2.0], [3.0]]))
        relative.columns.copy_(torch.tensor([[0.25], [10.0], [20.0], [30.0]]))
    vectors = relative(3)[..., 0]
    assert vectors[0].eq(0.75).all()
    assert vectors[:, 0].eq(0.75).all()
    # From the patch at row 0, column 0: itself, one to the right, two to the right (as one), two down (as one).
    assert vectors[1, [1, 2, 3, 7]].tolist() == [22.0, 32.0, 32.0, 23.0]
    # From the last patch to the first: up and left.
    assert vectors[9, 1] == 11.0


def test_attention_is_a_softmax_of_scaled_products_with_relative_positions():
    """Against a loop over samples, heads and pairs."""
    attention = Attention(3, 2, 4, 2).double()
    x, maps = torch.randn(2, 5, 3, dtype=torch.float64), []
    attention.softmax.register_forward_hook(lambda module, given, made: maps.append(made))
    output = attention(x)
    keys_at, values_at = attention.key_positions(2), attention.value_positions(2)
    for sample in range(2):
        seen = torch.zeros(5, 8, dtype=torch.float64)
        for head in range(2):
            part = slice(4 * head, 4 * head + 4)
            queries, keys, values = (
                made(x[sample])[:, part] for made in (attention.queries, attention.keys, attention.values)
            )
            for i in range(5):
                scores = torch.stack([queries[i] @ (keys[j] + keys_at[i, j]) for j in range(5)]) / 2
                weights = scores.exp() / scores.exp().sum()
                torch.testing.assert_close(maps[0][sample, head, i], weights)
                seen[i, part] = sum(weights[j] * (values[j] + values_at[i, j]) for j in range(5))
        torch.testing.assert_close(output[sample], attention.out(seen))


def test_only_later_layers_drop_paths_and_only_in_training():
    _, stages, _ = SMALL.layers(SMALL.largest)
    assert [one.make["drop_path"] for stage in stages for one in stage] == [0.0, 0.05, 0.1]
    block, x = EncoderBlock(4, 1, 4, 4, 0, 1.0 - 1e-9), torch.randn(2, 5, 4)
    assert torch.equal(block.train()(x), x)
    assert not torch.equal(block.eval()(x), x)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"resolutions": (100,)}, "multiples of `patch`"),
        ({"cuts": (12,)}, "the smallest depth"),
        ({"cuts": (8, 4)}, "must be ascending"),
        ({"pool": "token"}, "`pool` must be one of mean, class"),
    ],
)
def test_a_wrong_table_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ViT(**fields)


def test_every_attention_layer_shows_its_map_alike_in_the_supernet_and_in_its_student():
    space = dataclasses.replace(load_space("autoformer_t"), resolutions=(32,))
    supernet = Supernet(space).eval()
    images = torch.rand(2, 3, 32, 32)
    inside, student = supernet(images, space.smallest), supernet.extract(space.smallest)
    outside = student(images)
    assert len(inside.attentions) == space.smallest["depth"]
    for one, other in zip(inside.attentions, outside.attentions, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one.sum(-1), torch.ones(one.shape[:-1]))
    assert not any(module._forward_hooks for module in student.modules())
    assert not any(m._forward_hooks for plan in supernet._plans.values() for m in plan.module.modules())


def test_attention_maps_are_distilled_from_a_transformer_to_every_subnet():
    space = dataclasses.replace(load_space("autoformer_t"), resolutions=(32,))
    supernet = Supernet(space).eval()
    images = torch.rand(2, 3, 32, 32)
    teacher = supernet.extract(space.largest)(images)
    loss = AttentionMap()
    loss.prepare(supernet(images, space.largest), teacher, elastic=True)
    student = supernet(images, space.smallest)
    value = loss(student, teacher, torch.zeros(2, dtype=torch.long))
    value.backward()
    assert torch.isfinite(value) and value.item() > 0
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in supernet.parameters())
