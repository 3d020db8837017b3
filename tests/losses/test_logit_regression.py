import pytest
import torch

from kdnas.losses.example import example, wave
from kdnas.losses.response.logit_regression import LogitRegression
from kdnas.outputs import Outputs

LABELS = torch.zeros(2, dtype=torch.long)


def test_two_classes_by_hand():
    # Differences (1, -3): (1 + 9) / 2. About their mean -1: (2, -2), so (4 + 4) / 2.
    student, teacher = Outputs(torch.tensor([[2.0, 0.0]])), Outputs(torch.tensor([[1.0, 3.0]]))
    assert LogitRegression()(student, teacher, LABELS).item() == 5
    assert LogitRegression(centre=True)(student, teacher, LABELS).item() == 4


def test_agrees_with_a_loop_and_with_golden():
    student, teacher, labels = example()
    total = sum(
        (a - b) ** 2
        for z_s, z_t in zip(student.logits.tolist(), teacher.logits.tolist(), strict=True)
        for a, b in zip(z_s, z_t, strict=True)
    )
    assert LogitRegression()(student, teacher, labels).item() == pytest.approx(total / 20, rel=1e-12)
    assert LogitRegression.golden == pytest.approx(total / 20, rel=1e-12)


def test_centred_ignores_a_shift_of_all_logits():
    student, teacher = Outputs(wave(3, 5)), Outputs(wave(3, 5, phase=1))
    shifted = Outputs(student.logits + torch.tensor([[100.0], [-3.0], [7.0]]))
    loss = LogitRegression(centre=True)
    assert loss(shifted, teacher, LABELS).item() == pytest.approx(loss(student, teacher, LABELS).item(), rel=1e-10)
    assert LogitRegression()(shifted, teacher, LABELS) > 100
