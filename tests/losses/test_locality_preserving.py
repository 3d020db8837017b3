import math

import numpy as np
import pytest
import torch

from kdnas.losses.example import example
from kdnas.losses.relation.locality_preserving import LocalityPreserving
from kdnas.outputs import Outputs


def outputs(rows):
    return Outputs(torch.zeros(len(rows), 2), (torch.tensor(rows, dtype=torch.float64),))


def reference(student, teacher, neighbours, sigma2):
    n = len(student)
    squares = [[np.sum((teacher[i] - teacher[j]) ** 2) for j in range(n)] for i in range(n)]
    near = [sorted((j for j in range(n) if j != i), key=lambda j, i=i: squares[i][j])[:neighbours] for i in range(n)]
    width = sigma2 or np.mean([squares[i][j] for i in range(n) for j in near[i]])
    terms = [
        math.exp(-squares[i][j] / width) * np.sum((student[i] - student[j]) ** 2) for i in range(n) for j in near[i]
    ]
    return sum(terms) / (2 * n)


def test_three_points_on_a_line_by_hand():
    # Teacher 0, 1, 3 with one neighbour each: 0-1, 1-0, 3-1 at squared distances 1, 1, 4; sigma2 = 2.
    student, teacher = outputs([[0], [2], [3]]), outputs([[0], [1], [3]])
    expected = (2 * math.exp(-1 / 2) * 4 + math.exp(-4 / 2) * 1) / 6
    assert float(LocalityPreserving(neighbours=1)(student, teacher, torch.zeros(3))) == pytest.approx(
        expected, rel=1e-12
    )


@pytest.mark.parametrize(("neighbours", "sigma2"), [(5, 0.0), (2, 0.0), (3, 0.05), (100, 2.0)])
def test_it_agrees_with_loops_in_numpy(neighbours, sigma2):
    student, teacher, labels = example(batch=9)
    expected = reference(*(o.features[-1].numpy().mean((2, 3)) for o in (student, teacher)), neighbours, sigma2)
    found = LocalityPreserving(neighbours=neighbours, sigma2=sigma2)(student, teacher, labels)
    assert float(found) == pytest.approx(expected, rel=1e-10)


def test_the_teachers_scale_does_not_matter_by_default():
    student, teacher, labels = example()
    loss = LocalityPreserving()
    for scale in (1e-6, 1e6):
        scaled = teacher._replace(features=tuple(scale * f for f in teacher.features))
        assert float(loss(student, scaled, labels)) == pytest.approx(float(loss(student, teacher, labels)), rel=1e-9)


def test_ties_between_neighbours_do_not_depend_on_the_order():
    # A square: two neighbours at distance 1 tie for the first place.
    teacher, student = torch.tensor([[0.0, 0], [1, 0], [1, 1], [0, 1]]), torch.tensor([[0.0], [1], [5], [2]])
    values = set()
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 3, 1, 0]):
        s, t = (Outputs(torch.zeros(4, 2), (rows[order].double(),)) for rows in (student, teacher))
        values.add(round(float(LocalityPreserving(neighbours=1)(s, t, torch.zeros(4))), 12))
    assert len(values) == 1


def test_a_gradient_step_draws_neighbours_together():
    student, teacher, labels = example()
    rows = student.features[-1].mean((2, 3)).requires_grad_()
    loss = LocalityPreserving()(student._replace(features=(rows,)), teacher, labels)
    (gradient,) = torch.autograd.grad(loss, rows)
    # A quadratic form: the gradient along the rows themselves is twice the value.
    assert (gradient * rows).sum().item() == pytest.approx(2 * loss.item(), rel=1e-10)


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="`neighbours` must be at least 1, got 0"):
        LocalityPreserving(neighbours=0)
    with pytest.raises(ValueError, match="`sigma2` must be at least 0"):
        LocalityPreserving(sigma2=-1)
