"""The direction of a vector of features, of one teacher or of several."""

import math

import pytest
import torch

from kdnas.losses.example import example
from kdnas.losses.response.cosine import Cosine
from kdnas.outputs import Outputs


def of(rows):
    return Outputs(torch.tensor(rows))


def test_two_images_by_hand():
    # cosines 1 / sqrt(2) and -1
    value = float(Cosine()(of([[3.0, 0.0], [0.0, 2.0]]), of([[1.0, 1.0], [0.0, -5.0]])))
    assert value == pytest.approx((1 - 1 / math.sqrt(2) + 2) / 2)


def test_teachers_weigh_alike_whatever_their_widths_and_scales():
    student, teacher = of([[1.0, 0.0, 0.0, 0.0, 1.0]]), of([[2.0, 0.0, 0.0, 900.0, 0.0]])
    assert float(Cosine(widths=(1, 4))(student, teacher)) == pytest.approx((0 + 1) / 2)
    assert float(Cosine(widths=(5,))(student, teacher)) == float(Cosine()(student, teacher))


def test_a_zero_vector_has_a_finite_gradient():
    student = torch.zeros(1, 3, requires_grad=True)
    value = Cosine()(Outputs(student), of([[1.0, 2.0, 3.0]]))
    value.backward()
    assert float(value.detach()) == 1
    assert student.grad is not None and bool(student.grad.isfinite().all())


def test_golden_by_a_loop():
    student, teacher, _ = example()
    cosines = [
        sum(a * b for a, b in zip(s, t, strict=True)) / math.hypot(*s) / math.hypot(*t)
        for s, t in zip(student.logits.tolist(), teacher.logits.tolist(), strict=True)
    ]
    assert Cosine.golden == pytest.approx(1 - sum(cosines) / len(cosines), rel=1e-12)


def test_widths_are_those_of_the_outputs():
    with pytest.raises(ValueError, match=r"`widths` must have the sum 2, the number of outputs, got \(1, 2\)"):
        Cosine(widths=(1, 2))(of([[1.0, 2.0]]), of([[1.0, 2.0]]))
