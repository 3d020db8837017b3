import numpy as np
import pytest
import torch
from torch import nn

from kdnas.losses.example import example, wave
from kdnas.losses.feature.attention_transfer import AttentionTransfer
from kdnas.losses.guide import Recorder
from kdnas.outputs import Outputs

LABELS = torch.zeros(1, dtype=torch.long)
POOLS = ["sum", "sum_p", "max_p"]


def outputs(feature):
    return Outputs(torch.zeros(len(feature), 2), (feature,))


def attention(feature, pool, p):
    out = np.zeros(feature.shape[1:])
    for y, x in np.ndindex(out.shape):
        sizes = [abs(v) for v in feature[:, y, x]]
        out[y, x] = {"sum": sum(sizes), "sum_p": sum(v**p for v in sizes), "max_p": max(sizes) ** p}[pool]
    return out.flatten() / np.sqrt((out**2).sum())


def reference(student, teacher, pool, p, reduction):
    values = []
    for s, t in zip(student.numpy(), teacher.numpy(), strict=True):
        squares = (attention(s, pool, p) - attention(t, pool, p)) ** 2
        values.append(squares.mean() if reduction == "mean" else np.sqrt(squares.sum()) / 2)
    return np.mean(values)


def test_two_positions_by_hand():
    # Sums of squares (3, 4) and (0, 5) become (3/5, 4/5) and (0, 1): squares 9/25 and 1/25.
    student = torch.tensor([[1.0, -2.0], [-(2.0**0.5), 0.0]]).reshape(1, 2, 1, 2)
    teacher = torch.tensor([[0.0, 5.0**0.5]]).reshape(1, 1, 1, 2)
    value = AttentionTransfer()(outputs(student), outputs(teacher), LABELS)
    assert value.item() == pytest.approx((9 / 25 + 1 / 25) / 2)
    value = AttentionTransfer(reduction="paper")(outputs(student), outputs(teacher), LABELS)
    assert value.item() == pytest.approx((10 / 25) ** 0.5 / 2)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, 4.0])
@pytest.mark.parametrize("reduction", ["mean", "paper"])
def test_agrees_with_a_loop(pool, p, reduction):
    student, teacher, labels = example()
    value = AttentionTransfer(pool=pool, p=p, reduction=reduction)(student, teacher, labels).item()
    pairs = zip(student.features, teacher.features, strict=True)
    assert value == pytest.approx(sum(reference(s, t, pool, p, reduction) for s, t in pairs), rel=1e-12)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("reduction", ["mean", "paper"])
def test_scale_sign_and_channel_order_do_not_matter(pool, reduction):
    student, teacher, labels = example()
    loss = AttentionTransfer(pool=pool, p=3, reduction=reduction)
    scale = torch.tensor([1e-3, 1.0, -20.0, 1e4]).reshape(-1, 1, 1, 1)
    changed = student._replace(features=tuple((f * scale).flip(1) for f in student.features))
    assert loss(changed, teacher, labels).item() == pytest.approx(loss(student, teacher, labels).item(), rel=1e-9)


@pytest.mark.parametrize("reduction", ["mean", "paper"])
def test_equal_maps_give_zero_and_gradient_zero(reduction):
    feature = wave(2, 3, 4, 4).requires_grad_()
    value = AttentionTransfer(reduction=reduction)(outputs(feature), outputs(feature.detach()), LABELS)
    value.backward()
    assert value.item() == 0 and feature.grad.abs().max() == 0


def test_the_attention_map_is_pooled_and_not_the_features():
    # Features of opposite sign cancel in a pooled map, but not in its attention.
    large = torch.tensor([[1.0, -1.0, 3.0, 3.0]]).reshape(1, 1, 1, 4)
    small = torch.tensor([[1.0, 3.0]]).reshape(1, 1, 1, 2)
    assert AttentionTransfer()(outputs(large), outputs(small), LABELS).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("reduction", ["mean", "paper"])
def test_gradient_is_that_of_the_value(pool, reduction):
    loss = AttentionTransfer(pool=pool, p=3, reduction=reduction)
    teacher = outputs(wave(2, 2, 3, 2, phase=1))
    s = wave(2, 3, 3, 2, phase=3).requires_grad_()  # no entry at 0, where |f| has a corner
    assert torch.autograd.gradcheck(lambda x: loss(outputs(x), teacher, LABELS), s)
    assert torch.autograd.gradgradcheck(lambda x: loss(outputs(x), teacher, LABELS), s, fast_mode=True)


def test_arguments_are_checked():
    for arguments in ({"pool": "mean"}, {"p": 0.5}, {"p": 5}, {"reduction": "sum"}):
        with pytest.raises(ValueError, match="must"):
            AttentionTransfer(**arguments)


def test_gradients_of_linear_networks_by_hand():
    # d CE / d x = W^T (softmax(W x) - onehot), compared by its length: half the mean of |J_s - J_t|.
    images, labels = wave(3, 2, 1, 2), torch.tensor([0, 2, 1])
    networks = [nn.Sequential(nn.Flatten(), nn.Linear(4, 3, bias=False)).double() for _ in range(2)]
    for phase, network in enumerate(networks):
        network[1].weight.data = wave(3, 4, phase=phase)
    networks[1].requires_grad_(False)
    outputs = [Recorder(network, ()).gradients(images, labels) for network in networks]
    jacobians = []
    for phase in range(2):
        w, x = wave(3, 4, phase=phase).numpy(), images.flatten(1).numpy()
        p = np.exp(x @ w.T) / np.exp(x @ w.T).sum(1, keepdims=True)
        jacobians.append((p - np.eye(3)[labels.numpy()]) @ w)
    expected = np.linalg.norm(jacobians[0] - jacobians[1], axis=1).mean() / 2
    loss = AttentionTransfer(pool="gradient", reduction="paper")(*outputs)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    loss.backward()
    assert networks[0][1].weight.grad.any() and networks[1][1].weight.grad is None


def test_gradients_of_unequal_channels_are_refused():
    student, teacher, labels = example()
    with pytest.raises(ValueError, match="gradients must have equal channels"):
        AttentionTransfer(pool="gradient")(student, teacher, labels)
