import math

import numpy as np
import pytest
import torch

from kdnas.losses.example import example, wave
from kdnas.losses.response.decoupled import Decoupled
from kdnas.outputs import Outputs


def softmax(z):
    return np.exp(z) / np.exp(z).sum()


def kl(q, p):
    return sum(a * math.log(a / b) for a, b in zip(q, p, strict=True))


def reference(z_s, z_t, labels, alpha, beta, temperature):
    total = 0.0
    for a, b, y in zip(z_s.numpy() / temperature, z_t.numpy() / temperature, labels.tolist(), strict=True):
        p, q = softmax(a), softmax(b)
        p_rest, q_rest = (softmax(np.delete(z, y)) for z in (a, b))
        total += alpha * kl((q[y], 1 - q[y]), (p[y], 1 - p[y])) + beta * kl(q_rest, p_rest)
    return temperature**2 * total / len(z_s)


def test_three_classes_by_hand():
    # Label 0. Teacher (1/2, 1/4, 1/4), student (1/4, 3/8, 3/8): the others are ranked alike, so only the label's
    # KL((1/2, 1/2) || (1/4, 3/4)) = log(4/3) / 2 is left. Student (1/2, 3/8, 1/8): only KL((1/2, 1/2) || (3/4, 1/4)).
    teacher, label = Outputs(torch.tensor([[0.5, 0.25, 0.25]]).log()), torch.tensor([0])
    loss = Decoupled(alpha=2, beta=3, temperature=1)
    first = loss(Outputs(torch.tensor([[0.25, 0.375, 0.375]]).log()), teacher, label).item()
    second = loss(Outputs(torch.tensor([[0.5, 0.375, 0.125]]).log()), teacher, label).item()
    assert first == pytest.approx(2 * math.log(4 / 3) / 2)
    assert second == pytest.approx(3 * math.log(4 / 3) / 2)


@pytest.mark.parametrize("alpha, beta, temperature", [(1, 8, 4), (1, 0, 1), (0, 1, 2)])
def test_agrees_with_a_loop(alpha, beta, temperature):
    student, teacher, labels = example()
    value = Decoupled(alpha=alpha, beta=beta, temperature=temperature)(student, teacher, labels).item()
    expected = reference(student.logits, teacher.logits, labels, alpha, beta, temperature)
    assert value == pytest.approx(expected, rel=1e-12)


def test_golden():
    student, teacher, labels = example()
    assert Decoupled.golden == pytest.approx(reference(student.logits, teacher.logits, labels, 1, 8, 4), rel=1e-12)


def test_hinton_is_the_sum_weighted_by_what_the_teacher_leaves():
    student, teacher, _ = example(1)
    label = torch.tensor([2])
    q = softmax(teacher.logits[0].numpy())
    expected = kl(q, softmax(student.logits[0].numpy()))
    loss = Decoupled(alpha=1, beta=float(1 - q[2]), temperature=1)
    assert loss(student, teacher, label).item() == pytest.approx(expected, rel=1e-12)


def test_logits_of_eighty_are_finite_in_float32():
    z_s = torch.tensor([[80.0, -80.0, 0.0], [1e4, 0.0, -1e4]]).requires_grad_()
    z_t = torch.tensor([[-80.0, 80.0, 0.0], [0.0, 1e4, -1e4]])
    loss = Decoupled(temperature=1)(Outputs(z_s), Outputs(z_t), torch.tensor([0, 1]))
    loss.backward()
    assert loss.isfinite() and z_s.grad.isfinite().all()


def test_left_out_labels_do_not_count():
    student, teacher, labels = example()
    some = labels.clone()
    some[2:] = -100
    two = [Outputs(o.logits[:2]) for o in (student, teacher)]
    assert torch.equal(Decoupled()(student, teacher, some), Decoupled()(*two, labels[:2]))
    assert Decoupled()(student, teacher, torch.full_like(labels, -100)).item() == 0


def test_dense_logits_average_over_positions():
    a, b, labels = wave(2, 3, 4, 5), wave(2, 3, 4, 5, phase=1), torch.arange(40).reshape(2, 4, 5) % 3
    rows = [Outputs(x.movedim(1, -1).reshape(-1, 3)) for x in (a, b)]
    dense = Decoupled()(Outputs(a), Outputs(b), labels).item()
    assert dense == pytest.approx(Decoupled()(*rows, labels.flatten()).item())


def test_two_classes_are_refused():
    two = Outputs(wave(4, 2))
    with pytest.raises(ValueError, match="at least 3 classes, got 2"):
        Decoupled().prepare(two, two)
    with pytest.raises(ValueError, match="at least 3 classes, got 2"):
        Decoupled()(two, two, torch.zeros(4, dtype=torch.long))


def test_it_compiles_into_one_graph():
    student, teacher, labels = example()
    compiled = torch.compile(Decoupled(), backend="eager", fullgraph=True)
    assert torch.equal(compiled(student, teacher, labels), Decoupled()(student, teacher, labels))
