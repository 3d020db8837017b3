import numpy as np
import pytest
import torch

from kdnas.losses.example import example, fill, wave
from kdnas.losses.feature.activation_boundary import ActivationBoundary
from kdnas.outputs import Outputs

LABELS = torch.zeros(2, dtype=torch.long)


def outputs(*features):
    return Outputs(torch.zeros(len(features[0]), 2), features)


def connected(student, adapter, gain, bias):
    """A 1x1 convolution, then every channel normalised over batch and positions."""
    out = np.zeros((len(student), len(adapter), *student.shape[2:]))
    for b, c, y, x in np.ndindex(out.shape):
        out[b, c, y, x] = adapter[c] @ student[b, :, y, x]
    for c in range(out.shape[1]):
        channel = out[:, c]
        out[:, c] = gain[c] * (channel - channel.mean()) / np.sqrt(channel.var() + 1e-5) + bias[c]
    return out


def reference(u, teacher, margin, reduction):
    total = 0.0
    for s, t in zip(u.flatten(), teacher.flatten(), strict=True):
        total += max(0, margin - s) ** 2 if t > 0 else max(0, margin + s) ** 2
    return total / (len(u) if reduction == "sum" else u.size)


def test_four_units_by_hand():
    # On and beyond the margin 0, on and off (1 + 2)^2, off at zero 1, off and beyond the margin 0: 10.
    student = outputs(torch.tensor([1.5, -2.0, 0.0, -1.0]).reshape(1, 4, 1, 1))
    teacher = outputs(torch.tensor([0.1, 3.0, 0.0, -5.0]).reshape(1, 4, 1, 1))
    for reduction, value in (("sum", 10.0), ("mean", 2.5)):
        loss = ActivationBoundary(connector="none", reduction=reduction)
        assert loss(student, teacher, LABELS[:1]).item() == pytest.approx(value)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("margin", [1.0, 0.3])
def test_agrees_with_a_loop(reduction, margin):
    student, teacher, labels = example()
    loss = ActivationBoundary(margin=margin, reduction=reduction)
    loss.prepare(student, teacher)
    fill(loss.double())
    expected = 0.0
    for s, t, c, w in zip(student.features, teacher.features, loss.connectors, (0.5, 1.0), strict=True):
        parts = [p.detach().numpy() for p in c.parameters()]
        expected += w * reference(connected(s.numpy(), *parts), t.numpy(), margin, reduction)
    assert loss(student, teacher, labels).item() == pytest.approx(expected, rel=1e-11)


def test_earlier_layers_weigh_half_of_the_next_unless_told_otherwise():
    one = torch.zeros(1, 1, 1, 1)
    network = outputs(one, one, one)  # every unit costs the squared margin, 1
    loss = ActivationBoundary(connector="none", taps="order")
    assert loss(network, network, LABELS[:1]).item() == pytest.approx(1 + 1 / 2 + 1 / 4)
    loss = ActivationBoundary(connector="none", taps="order", weights=(1.0, 2.0, 3.0))
    assert loss(network, network, LABELS[:1]).item() == pytest.approx(6)


def test_the_teachers_activation_function_does_not_matter():
    student, teacher, labels = example()
    loss = ActivationBoundary()
    loss.prepare(student, teacher)
    fill(loss.double())
    before = loss(student, teacher, labels).item()
    for function in (torch.relu, torch.nn.functional.silu, torch.nn.functional.gelu):
        after = teacher._replace(features=tuple(function(f) for f in teacher.features))
        assert loss(student, after, labels).item() == before


def test_a_student_that_ends_in_a_relu_gets_its_units_switched_on():
    # Without a connector a dead ReLU has no gradient; through it, the weights before still move.
    before = wave(2, 3, 4, 4, phase=1).float().requires_grad_()
    teacher = outputs(torch.ones(2, 3, 4, 4))
    student = outputs(torch.relu(before))
    loss = ActivationBoundary()
    loss.prepare(student, teacher)
    assert len(loss.connectors) == 1, "built for equal channels too"
    loss(student, teacher, LABELS).backward()
    assert before.grad.abs().max() > 0


def test_a_larger_teacher_counts_by_its_share_of_units_that_are_on():
    teacher = outputs(torch.tensor([1.0, 1.0, 1.0, -9.0]).reshape(1, 1, 2, 2))
    student = outputs(torch.tensor(0.25).reshape(1, 1, 1, 1))
    loss = ActivationBoundary(connector="none")
    # Three of four units are on: their mean, although the average of the map is negative.
    assert loss(student, teacher, LABELS[:1]).item() == pytest.approx(0.75 * 0.75**2 + 0.25 * 1.25**2)


def test_two_stages_boundaries_then_student():
    assert [(s.name, s.uses, s.trains) for s in ActivationBoundary().stages()] == [
        ("boundaries", "loss", "both"),
        ("student", "task", "student"),
    ]
    assert len(ActivationBoundary(staged=False).stages()) == 1


def test_a_single_value_per_channel_survives_the_normalisation():
    student, teacher = outputs(torch.ones(2, 3, 1, 1)), outputs(torch.ones(2, 3, 1, 1))
    loss = ActivationBoundary()
    loss.prepare(student, teacher)
    one = outputs(torch.ones(1, 3, 1, 1))
    assert loss(one, one, LABELS[:1]).item() == pytest.approx(3)  # every unit at 0, the squared margin each


def test_arguments_are_checked():
    for arguments in ({"connector": "conv1x1"}, {"margin": 0.0}, {"reduction": "batch"}):
        with pytest.raises(ValueError, match="must be"):
            ActivationBoundary(**arguments)
    student, teacher, labels = example()
    with pytest.raises(ValueError, match=r"\(3, 8, 6\).*\(4, 8, 6\)"):
        ActivationBoundary(connector="none").prepare(student, teacher)
    with pytest.raises(ValueError, match="prepare"):
        ActivationBoundary()(student, teacher, labels)
