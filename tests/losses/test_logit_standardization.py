import math

import numpy as np
import pytest
import torch

from kdnas.losses.example import example, wave
from kdnas.losses.response.decoupled import Decoupled
from kdnas.losses.response.logit_standardization import LogitStandardization
from kdnas.losses.response.soft_targets import SoftTargets
from kdnas.outputs import Outputs
from kdnas.specs import spec

LABELS = torch.zeros(4, dtype=torch.long)


def softmax(z):
    return np.exp(z) / np.exp(z).sum()


def reference(z_s, z_t, temperature=2.0):
    total = 0.0
    for a, b in zip(z_s.numpy(), z_t.numpy(), strict=True):
        p, q = (softmax((z - z.mean()) / z.std() / temperature) for z in (a, b))
        total += sum(q_c * math.log(q_c / p_c) for p_c, q_c in zip(p, q, strict=True))
    return temperature**2 * total / len(z_s)


def test_two_classes_by_hand():
    # Any two unequal logits become +-1: students (5, 1) and (1, 5) against (9, 8) give 0 and
    # KL(q || reversed q) = (q_1 - q_2) log(q_1 / q_2) = tanh(1) * 2 with q = softmax(1, -1).
    student, teacher = torch.tensor([[5.0, 1.0], [1.0, 5.0]]), torch.tensor([[9.0, 8.0]] * 2)
    loss = LogitStandardization(of=SoftTargets(temperature=1))
    assert loss(Outputs(student[:1]), Outputs(teacher[:1]), LABELS).item() == pytest.approx(0, abs=1e-6)
    assert loss(Outputs(student), Outputs(teacher), LABELS).item() == pytest.approx(math.tanh(1))


def test_agrees_with_a_loop_and_with_golden():
    student, teacher, labels = example()
    expected = reference(student.logits, teacher.logits)
    assert LogitStandardization()(student, teacher, labels).item() == pytest.approx(expected, rel=1e-12)
    assert LogitStandardization.golden == pytest.approx(expected, rel=1e-12)


def test_neither_size_nor_shift_of_the_student_matters():
    student, teacher, labels = example()
    other = student._replace(logits=7 * student.logits - 100)
    loss = LogitStandardization()
    assert loss(other, teacher, labels).item() == pytest.approx(loss(student, teacher, labels).item(), rel=1e-10)
    assert SoftTargets()(other, teacher, labels).item() != pytest.approx(SoftTargets()(student, teacher, labels).item())


def test_constant_logits_have_no_gradient():
    logits = torch.full((2, 10), 0.1).requires_grad_()
    LogitStandardization()(Outputs(logits), Outputs(wave(2, 10).float()), LABELS).backward()
    assert logits.grad.abs().max() == 0


def test_another_loss_fits_inside_and_in_a_spec():
    student, teacher, labels = example()
    loss = spec(LogitStandardization, of=spec(Decoupled, temperature=2.0)).build()
    made = [o._replace(logits=3 * o.logits + 1) for o in (student, teacher)]
    assert loss(*made, labels).item() == pytest.approx(loss(student, teacher, labels).item(), rel=1e-10)
    with pytest.raises(ValueError, match="at least 3 classes"):
        loss.prepare(Outputs(wave(2, 2)), Outputs(wave(2, 2)))


def test_something_else_inside_is_refused():
    with pytest.raises(ValueError, match="`of` must be a Loss"):
        LogitStandardization(of="soft_targets")
