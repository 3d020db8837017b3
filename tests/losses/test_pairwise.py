import numpy as np
import pytest
import torch

from kdnas.losses.example import example
from kdnas.losses.relation.pairwise import Pairwise
from kdnas.outputs import Outputs

PHI = {
    "cosine": lambda a, b: np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b),
    "inner": np.dot,
    "l2": lambda a, b: np.linalg.norm(a - b),
    "sq_l2": lambda a, b: np.sum((a - b) ** 2),
}


def outputs(rows):
    return Outputs(torch.zeros(len(rows), 2), (torch.tensor(rows, dtype=torch.float64),))


def reference(student, teacher, phi, normalize, reduction):
    relations = []
    for rows in (student, teacher):
        values = np.array([PHI[phi](rows[i], rows[j]) for i in range(len(rows)) for j in range(len(rows)) if i != j])
        unit = {"none": 1.0, "mean": np.abs(values).mean(), "max": np.abs(values).max()}[normalize]
        relations.append(values / unit)
    return getattr(np, reduction)((relations[0] - relations[1]) ** 2)


@pytest.mark.parametrize(("phi", "expected"), [("cosine", 1), ("inner", 1), ("l2", 2), ("sq_l2", 4)])
def test_two_samples_by_hand(phi, expected):
    # Orthogonal unit vectors against one vector twice: cosine and inner 0 and 1, squared distance 2 and 0.
    loss = Pairwise(phi=phi)
    found = loss(outputs([[1, 0], [0, 1]]), outputs([[1, 0], [1, 0]]), torch.zeros(2))
    assert float(found) == pytest.approx(expected, rel=1e-12)
    total = Pairwise(phi=phi, reduction="sum")(outputs([[1, 0], [0, 1]]), outputs([[1, 0], [1, 0]]), torch.zeros(2))
    assert float(total) == pytest.approx(2 * expected, rel=1e-12)


@pytest.mark.parametrize("phi", PHI)
@pytest.mark.parametrize("normalize", ["none", "mean", "max"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_it_agrees_with_loops_in_numpy(phi, normalize, reduction):
    student, teacher, labels = example()
    expected = reference(*(o.features[-1].numpy().mean((2, 3)) for o in (student, teacher)), phi, normalize, reduction)
    found = Pairwise(phi=phi, normalize=normalize, reduction=reduction)(student, teacher, labels)
    assert float(found) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("phi", PHI)
def test_normalised_relations_do_not_depend_on_the_students_scale(phi):
    student, teacher, labels = example()
    scaled = student._replace(features=tuple(9 * f for f in student.features))
    loss = Pairwise(phi=phi, normalize="mean")
    assert float(loss(scaled, teacher, labels)) == pytest.approx(float(loss(student, teacher, labels)), rel=1e-10)


@pytest.mark.parametrize("phi", PHI)
@pytest.mark.parametrize("normalize", ["none", "mean", "max"])
def test_equal_samples_and_huge_maps_stay_finite(phi, normalize):
    _, teacher, labels = example()
    teacher = teacher.map(torch.Tensor.float)
    for rows in (torch.full((4, 3), 0.1), torch.zeros(4, 3), 1e6 * torch.eye(4)):
        rows.requires_grad_()
        loss = Pairwise(phi=phi, normalize=normalize)(Outputs(torch.zeros(4, 2), (rows,)), teacher, labels)
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(rows.grad).all()


@pytest.mark.parametrize("wrong", [{"phi": "l1"}, {"normalize": "sum"}, {"reduction": "none"}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` must be one of"):
        Pairwise(**wrong)
