import numpy as np
import pytest
import torch

from kdnas.losses.example import example, fill, wave
from kdnas.losses.feature.knowledge_review import KnowledgeReview
from kdnas.outputs import Outputs


def prepared(student, teacher, **options):
    loss = KnowledgeReview(**options)
    loss.prepare(student, teacher)
    return fill(loss.double())


def normalised(x, norm):
    mean, variance = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
    weight, bias = (p.detach().numpy()[None, :, None, None] for p in (norm.weight, norm.bias))
    return (x - mean) / np.sqrt(variance + 1e-5) * weight + bias


def convolved(x, weight):
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    out = np.zeros((len(x), len(weight), *x.shape[2:]))
    for b, c, i, j in np.ndindex(out.shape):
        out[b, c, i, j] = (padded[b, :, i : i + 3, j : j + 3] * weight[c]).sum()
    return out


def cells(size, side):
    """The first and the last index of every cell of adaptive pooling."""
    return [(i * size // side, -(-(i + 1) * size // side)) for i in range(side)]


def pooled(x, side):
    rows, columns = cells(x.shape[2], side), cells(x.shape[3], side)
    return np.stack([np.stack([x[:, :, a:b, c:d].mean((2, 3)) for c, d in columns], 2) for a, b in rows], 2)


def distance(u, t):
    value, weight, total = ((u - t) ** 2).mean(), 1.0, 1.0
    for side in (4, 2, 1):
        if side < min(u.shape[2:]):
            weight /= 2
            value, total = value + weight * ((pooled(u, side) - pooled(t, side)) ** 2).mean(), total + weight
    return value / total


def reference(loss, student, teacher):
    total, deeper = 0.0, None
    for index in (1, 0):
        own, target = student.features[index].numpy(), teacher.features[index].numpy()
        entry, convolution = loss.entries[index], loss.exits[index][0].weight.detach().numpy()
        own = normalised(np.einsum("oc,bchw->bohw", entry[0].weight.detach().numpy(), own), entry[1])
        if deeper is not None:
            factors = [a // b for a, b in zip(own.shape[2:], deeper.shape[2:], strict=True)]
            deeper = deeper.repeat(factors[0], 2).repeat(factors[1], 3)
            attention = loss.attentions[index]
            weight, bias = attention.weight.detach().numpy()[:, :, 0, 0], attention.bias.detach().numpy()
            both = np.einsum("oc,bchw->bohw", weight, np.concatenate([own, deeper], 1)) + bias[None, :, None, None]
            shares = 1 / (1 + np.exp(-both))
            own = own * shares[:, :1] + deeper * shares[:, 1:]
        total += distance(normalised(convolved(own, convolution), loss.exits[index][1]), target)
        deeper = own
    return total


def test_it_agrees_with_loops():
    student, teacher, labels = example()
    loss = prepared(student, teacher, width=5)
    assert loss(student, teacher, labels).item() == pytest.approx(reference(loss, student, teacher), rel=1e-10)


def test_the_levels_by_hand():
    # A constant difference of 2 is 4 at every level; one that averages to 0 counts at full size only: 1 / 1.5.
    loss = KnowledgeReview()
    zero = torch.zeros(1, 1, 2, 2)
    assert loss.between(zero + 2, zero, 0).item() == pytest.approx(4)
    checks = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])[None, None]
    assert loss.between(checks, zero, 0).item() == pytest.approx(1 / 1.5)


def test_a_deep_stage_reaches_every_shallower_one():
    student, teacher, labels = example()
    loss = prepared(student, teacher, width=4, weights=(1.0, 0.0))
    leaves = student.map(lambda x: x.clone().requires_grad_())
    loss(leaves, teacher, labels).backward()
    assert leaves.features[1].grad.any()
    loss = prepared(student, teacher, width=4, weights=(0.0, 1.0))
    leaves = student.map(lambda x: x.clone().requires_grad_())
    loss(leaves, teacher, labels).backward()
    assert not leaves.features[0].grad.any()


def test_pairs_in_another_order_are_fused_from_the_deepest():
    student, teacher, labels = example()
    loss = prepared(student, teacher, width=4)
    turned = prepared(student, teacher, width=4, taps=((1, 1), (0, 0)))
    for parts in ("entries", "attentions", "exits"):
        for i, j in ((0, 1), (1, 0)):
            getattr(turned, parts)[i].load_state_dict(getattr(loss, parts)[j].state_dict())
    assert torch.allclose(loss(student, teacher, labels), turned(student, teacher, labels), rtol=1e-12)


def test_an_unprepared_loss_is_refused():
    with pytest.raises(ValueError, match="prepare"):
        KnowledgeReview()(*example())
    with pytest.raises(ValueError, match="`width` must be at least 1"):
        KnowledgeReview(width=0)
    assert Outputs(wave(1, 2)).features == ()
