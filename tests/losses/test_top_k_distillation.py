import math

import numpy as np
import pytest
import torch

from kdnas.losses.example import example, wave
from kdnas.losses.response.soft_targets import SoftTargets
from kdnas.losses.response.top_k_distillation import TopKDistillation
from kdnas.outputs import Outputs

LABELS = torch.zeros(4, dtype=torch.long)


def softmax(z):
    return np.exp(z) / np.exp(z).sum()


def reference(z_s, z_t, count, renormalize):
    total = 0.0
    for a, b in zip(z_s.numpy(), z_t.numpy(), strict=True):
        top = sorted(range(len(b)), key=lambda c: -b[c])[:count]
        p, q = (softmax(z[top]) if renormalize else softmax(z)[top] for z in (a, b))
        total += sum(q_c * math.log(q_c / p_c) for p_c, q_c in zip(p, q, strict=True))
    return total / len(z_s)


def test_three_classes_by_hand():
    # q = (1/2, 1/4, 1/4 - tiny), p = (1/4, 1/4, 1/2), K = 1: 1/2 log 2.
    student = Outputs(torch.tensor([[0.25, 0.25, 0.5]]).log())
    teacher = Outputs(torch.tensor([[0.5, 0.25, 0.25]]).log())
    loss = TopKDistillation(num_classes=1)
    assert loss(student, teacher, LABELS).item() == pytest.approx(math.log(2) / 2)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_agrees_with_a_loop(count, renormalize):
    student, teacher, labels = example()
    value = TopKDistillation(num_classes=count, renormalize=renormalize)(student, teacher, labels).item()
    assert value == pytest.approx(reference(student.logits, teacher.logits, count, renormalize), rel=1e-12)


def test_golden():
    student, teacher, _ = example()
    assert TopKDistillation.golden == pytest.approx(reference(student.logits, teacher.logits, 5, False), rel=1e-12)


def test_by_default_five_of_more_classes_count():
    student, teacher = wave(4, 9), 2 * wave(4, 9, phase=3)
    found = TopKDistillation()(Outputs(student), Outputs(teacher), LABELS).item()
    assert found == pytest.approx(reference(student, teacher, 5, False), rel=1e-12)


@pytest.mark.parametrize("count", [5, 50])
@pytest.mark.parametrize("renormalize", [False, True])
def test_all_classes_are_ordinary_kl(count, renormalize):
    kl = SoftTargets(temperature=1)(*example()).item()
    assert TopKDistillation(num_classes=count, renormalize=renormalize)(*example()).item() == pytest.approx(kl)


def test_other_classes_are_pushed_down_through_the_normaliser_only():
    student, teacher = wave(1, 6).requires_grad_(), wave(1, 6, phase=2)
    TopKDistillation(num_classes=2)(Outputs(student), Outputs(teacher), LABELS).backward()
    top = teacher.topk(2, 1).indices
    rest = torch.ones(1, 6, dtype=torch.bool).scatter(1, top, False)
    mass = teacher.softmax(1).gather(1, top).sum()
    assert torch.allclose(student.grad[rest], (student.detach().softmax(1) * mass)[rest])


def test_renormalised_other_classes_get_no_gradient():
    student, teacher = wave(1, 6).requires_grad_(), wave(1, 6, phase=2)
    TopKDistillation(num_classes=2, renormalize=True)(Outputs(student), Outputs(teacher), LABELS).backward()
    assert (student.grad != 0).sum() == 2


def test_dense_logits_average_over_positions():
    a, b = wave(2, 7, 4, 5), wave(2, 7, 4, 5, phase=1)
    rows = [x.movedim(1, -1).reshape(-1, 7) for x in (a, b)]
    loss = TopKDistillation(num_classes=3)
    assert loss(Outputs(a), Outputs(b), LABELS).item() == pytest.approx(
        loss(Outputs(rows[0]), Outputs(rows[1]), LABELS).item()
    )


def test_too_few_classes_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        TopKDistillation(num_classes=0)
    with pytest.raises(ValueError, match="at least 2"):
        TopKDistillation(num_classes=1, renormalize=True)
