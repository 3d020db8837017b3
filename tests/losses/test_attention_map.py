import math

import numpy as np
import pytest
import torch

from kdnas.losses.attention.attention_map import AttentionMap
from kdnas.losses.example import attention, example
from kdnas.outputs import Outputs

LABELS = torch.zeros(2, dtype=torch.int64)
KINDS = ("cosine", "kl", "mse", "inner")


def outputs(*maps):
    return Outputs(torch.zeros(len(maps[0]), 2, dtype=maps[0].dtype), attentions=maps)


def of_two_maps(kind, s, t):
    n = len(s)
    if kind == "cosine":
        return 1 - (s * t).sum() / (np.linalg.norm(s) * np.linalg.norm(t))
    if kind == "inner":
        return -sum(s[i] @ t[i] for i in range(n)) / n
    total = 0.0
    for i in range(n):
        for j in range(n):
            if kind == "kl":
                total += t[i, j] * math.log((t[i, j] + 1e-6) / (s[i, j] + 1e-6)) / n
            else:
                total += (s[i, j] - t[i, j]) ** 2 / n**2
    return total


@pytest.mark.parametrize("kind", KINDS)
def test_it_agrees_with_loops(kind):
    s, t = attention(2, 3, 4, 4), attention(2, 3, 4, 4, phase=1)
    expected = np.mean([of_two_maps(kind, s[b, h].numpy(), t[b, h].numpy()) for b in range(2) for h in range(3)])
    found = float(AttentionMap(kind=kind)(outputs(s), outputs(t), LABELS))
    assert found == pytest.approx(expected, rel=1e-12)


def test_its_golden_value_averages_unequal_heads_first():
    student, teacher, _ = example()
    s, t = student.attentions[0].numpy().mean(1), teacher.attentions[0].numpy().mean(1)
    expected = np.mean([of_two_maps("cosine", s[b], t[b]) for b in range(4)])
    assert AttentionMap.golden == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("kind", "expected"),
    # The student attends to both tokens alike, the teacher to one each.
    [("cosine", 1 - 1 / 2**0.5), ("kl", math.log(2)), ("mse", 0.25), ("inner", -0.5)],
)
def test_values_worked_by_hand(kind, expected):
    s, t = torch.full((1, 1, 2, 2), 0.5), torch.eye(2)[None, None]
    assert float(AttentionMap(kind=kind)(outputs(s), outputs(t), LABELS)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_smallest_or_rewarded_at_agreement(kind):
    t = torch.eye(3, dtype=torch.float64)[None, None]
    loss = AttentionMap(kind=kind)
    same = float(loss(outputs(t), outputs(t), LABELS))
    assert same < float(loss(outputs(attention(1, 1, 3, 3)), outputs(t), LABELS))
    assert kind == "inner" or same == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_one_hot_maps_have_finite_gradients(kind):
    s = torch.eye(4)[None, None].clone().requires_grad_()
    t = torch.eye(4).roll(1, 0)[None, None]
    value = AttentionMap(kind=kind)(outputs(s), outputs(t), LABELS)
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(s.grad).all()


def test_pooling_averages_windows_and_divides_rows_by_their_sums():
    s, t = attention(2, 1, 4, 4), attention(2, 1, 4, 4, phase=1)

    def pooled(a):
        found = np.array([[a[y : y + 2, x : x + 2].mean() for x in (0, 2)] for y in (0, 2)])
        return found / found.sum(1, keepdims=True)

    expected = np.mean([of_two_maps("kl", pooled(s[b, 0].numpy()), pooled(t[b, 0].numpy())) for b in range(2)])
    found = float(AttentionMap(kind="kl", pool=2)(outputs(s), outputs(t), LABELS))
    assert found == pytest.approx(expected, rel=1e-10)


def test_maps_of_other_token_counts_are_resized_to_the_smaller():
    # A uniform map stays uniform at any size, and a map copied tile by tile is found again.
    wide = torch.full((1, 1, 6, 6), 1 / 6)
    narrow = torch.full((1, 1, 4, 4), 1 / 4)
    for s, t in ((wide, narrow), (narrow, wide)):
        assert float(AttentionMap(kind="mse")(outputs(s), outputs(t), LABELS)) == pytest.approx(0, abs=1e-12)
    small = attention(1, 1, 3, 3)
    big = small.repeat_interleave(8, 2).repeat_interleave(8, 3) / 8
    assert float(AttentionMap()(outputs(big), outputs(small), LABELS)) < 0.03  # the triangle filter blurs


def test_layers_are_paired_uniformly_last_with_last():
    loss = AttentionMap()
    assert loss._pairs(2, 6) == ((0, 2), (1, 5))
    assert loss._pairs(3, 3) == ((0, 0), (1, 1), (2, 2))
    assert loss._pairs(3, 2) == ((0, 0), (1, 1), (2, 1))
    assert AttentionMap(layers="last")._pairs(4, 12) == ((3, 11),)


def test_layers_are_summed():
    maps = [attention(2, 1, 3, 3, phase=p) for p in range(4)]
    one, other = (float(AttentionMap()(outputs(maps[i]), outputs(maps[i + 2]), LABELS)) for i in (0, 1))
    both = float(AttentionMap(layers=((0, 0), (-1, 1)))(outputs(*maps[:2]), outputs(*maps[2:]), LABELS))
    assert both == pytest.approx(one + other)


def test_wrong_options_and_missing_maps_are_refused():
    with pytest.raises(ValueError, match="`kind` must be one of cosine, kl, mse, inner, got 'dot'"):
        AttentionMap(kind="dot")
    with pytest.raises(ValueError, match="`layers` must be one of uniform, last or tuple"):
        AttentionMap(layers="first")
    with pytest.raises(ValueError, match="`pool` must be at least 1"):
        AttentionMap(pool=0)
    maps = outputs(attention(2, 1, 3, 3))
    with pytest.raises(ValueError, match=r"1 student and 1 teacher attention layers, got the pair \(0, 1\)"):
        AttentionMap(layers=((0, 1),))(maps, maps, LABELS)
    with pytest.raises(ValueError, match=r"AttentionMap needs attention"):
        AttentionMap()(maps._replace(attentions=()), maps, LABELS)
    with pytest.raises(ValueError, match="AttentionMap needs attentions, but the student has none"):
        AttentionMap().prepare(maps._replace(attentions=()), maps)
