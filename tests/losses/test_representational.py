import numpy as np
import pytest
import torch

from kdnas.losses.example import example
from kdnas.losses.relation.representational import Representational
from kdnas.outputs import Outputs


def reference(student, teacher):
    triangles = []
    for maps in (student, teacher):
        matrix = 1 - np.corrcoef(maps.reshape(len(maps), -1))
        triangles.append([matrix[i, j] for i in range(len(maps)) for j in range(i + 1, len(maps))])
    return 1 - np.corrcoef(*triangles)[0, 1]


def test_three_samples_by_hand():
    # Correlations of (0, 1, 2), (0, 2, 1), (2, 1, 0): 1/2, -1, -1/2, so the triangle is (1/2, 2, 3/2). The teacher
    # swaps the last two samples: (2, 1/2, 3/2). About the mean 4/3: (-5, 4, 1)/6 and (4, -5, 1)/6,
    # r = (-20 - 20 + 1)/42.
    student = torch.tensor([[0.0, 1, 2], [0, 2, 1], [2, 1, 0]], dtype=torch.float64)
    s, t = (Outputs(torch.zeros(3, 2), (f,)) for f in (student, student[[0, 2, 1]]))
    assert float(Representational()(s, t, torch.zeros(3))) == pytest.approx(1 + 39 / 42, rel=1e-12)


def test_it_agrees_with_numpy():
    student, teacher, labels = example()
    expected = sum(reference(s.numpy(), t.numpy()) for s, t in zip(student.features, teacher.features, strict=True))
    assert float(Representational()(student, teacher, labels)) == pytest.approx(expected, rel=1e-12)


def test_it_is_zero_for_a_student_scaled_and_shifted_sample_by_sample():
    _, teacher, labels = example()
    scale = torch.tensor([1.0, 2, 0.5, 7], dtype=torch.float64)[:, None, None, None]
    student = teacher._replace(features=tuple(f * scale + 3 * scale for f in teacher.features))
    assert float(Representational()(student, teacher, labels)) == pytest.approx(0, abs=1e-12)


def test_two_samples_have_nothing_to_correlate():
    student, teacher, labels = example(batch=2)
    assert float(Representational()(student, teacher, labels)) == 0


def test_a_step_along_its_gradient_raises_the_similarity():
    student, teacher, labels = example()
    features = [f.clone().requires_grad_() for f in student.features]
    before = Representational()(student._replace(features=tuple(features)), teacher, labels)
    steps = torch.autograd.grad(before, features)
    moved = student._replace(features=tuple(f - 0.1 * g for f, g in zip(features, steps, strict=True)))
    assert Representational()(moved, teacher, labels).item() < before.item()
