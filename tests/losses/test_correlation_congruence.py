import math

import numpy as np
import pytest
import torch

from kdnas.losses.example import example
from kdnas.losses.relation.correlation_congruence import CorrelationCongruence
from kdnas.outputs import Outputs


def outputs(rows):
    return Outputs(torch.zeros(len(rows), 2), (torch.tensor(rows, dtype=torch.float64),))


def kernel(kind, gamma, order, a, b):
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    if kind == "bilinear":
        return np.dot(a, b)
    if kind == "rbf":
        return math.exp(-gamma * np.sum((a - b) ** 2))
    return sum(
        math.exp(-2 * gamma) * (2 * gamma) ** p / math.factorial(p) * np.dot(a, b) ** p for p in range(order + 1)
    )


def test_two_samples_by_hand():
    # Cosines off the diagonal: student 0, teacher 1; series 1 against 1 + 0.8 + 0.32, times exp(-0.8).
    found = CorrelationCongruence()(outputs([[1, 0], [0, 3]]), outputs([[1, 0], [2, 0]]), torch.zeros(2))
    assert float(found) == pytest.approx(2 * (1.12 * math.exp(-0.8)) ** 2 / 4, rel=1e-12)


@pytest.mark.parametrize(
    ("kind", "gamma", "order"), [("rbf_taylor", 0.4, 2), ("rbf_taylor", 0.9, 5), ("rbf", 0.7, 2), ("bilinear", 0.4, 2)]
)
def test_it_agrees_with_loops_in_numpy(kind, gamma, order):
    student, teacher, labels = example()
    s, t = (o.features[-1].numpy().mean((2, 3)) for o in (student, teacher))
    gaps = [
        kernel(kind, gamma, order, s[i], s[j]) - kernel(kind, gamma, order, t[i], t[j])
        for i in range(4)
        for j in range(4)
    ]
    loss = CorrelationCongruence(kernel=kind, gamma=gamma, order=order)
    assert float(loss(student, teacher, labels)) == pytest.approx(np.mean(np.square(gaps)), rel=1e-12)


def test_a_long_series_is_the_kernel_itself():
    student, teacher, labels = example()
    series, exact = CorrelationCongruence(order=30), CorrelationCongruence(kernel="rbf")
    assert float(series(student, teacher, labels)) == pytest.approx(float(exact(student, teacher, labels)), rel=1e-12)


def test_the_scale_of_each_embedding_does_not_matter():
    student, teacher, labels = example()
    scaled = student._replace(features=(student.features[-1] * torch.tensor([1.0, 5, 0.1, 3])[:, None, None, None],))
    loss = CorrelationCongruence()
    assert float(loss(scaled, teacher, labels)) == pytest.approx(float(loss(student, teacher, labels)), rel=1e-12)


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="`kernel` must be one of rbf_taylor, rbf, bilinear"):
        CorrelationCongruence(kernel="linear")
    with pytest.raises(ValueError, match="`gamma` must be above 0"):
        CorrelationCongruence(gamma=0)
    with pytest.raises(ValueError, match="`order` must be at least 1"):
        CorrelationCongruence(order=0)
