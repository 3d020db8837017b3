import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kdnas.losses.example import example
from kdnas.losses.relation.relational_distance import RelationalDistance
from kdnas.outputs import Outputs


def outputs(rows):
    return Outputs(torch.zeros(len(rows), 2), (torch.tensor(rows, dtype=torch.float64),))


def huber(x):
    return x * x / 2 if abs(x) <= 1 else abs(x) - 0.5


def reference(student, teacher, normalize=False):
    relative = []
    for rows in (student, teacher):
        if normalize:
            rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        distances = np.array([[np.linalg.norm(a - b) for b in rows] for a in rows])
        relative.append(distances / distances[distances > 0].mean())
    return np.mean([huber(a - b) for a, b in zip(relative[0].ravel(), relative[1].ravel(), strict=True)])


def test_three_points_on_a_line_by_hand():
    # Student 0, 1, 3: distances 1, 2, 3, mean 2. Teacher 0, 1, 2: distances 1, 1, 2, mean 4/3.
    differences = (1 / 2 - 3 / 4, 2 / 2 - 3 / 4, 3 / 2 - 3 / 2)
    expected = 2 * sum(d * d / 2 for d in differences) / 9
    found = RelationalDistance()(outputs([[0], [1], [3]]), outputs([[0], [1], [2]]), torch.zeros(3))
    assert float(found) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("normalize", [False, True])
def test_it_agrees_with_loops_in_numpy(normalize):
    student, teacher, labels = example()
    expected = reference(*(o.features[-1].numpy().mean((2, 3)) for o in (student, teacher)), normalize)
    assert float(RelationalDistance(normalize=normalize)(student, teacher, labels)) == pytest.approx(
        expected, rel=1e-12
    )


def test_moving_and_scaling_the_student_does_not_matter():
    student, teacher, labels = example()
    moved = student._replace(features=tuple(5 * f + 2 for f in student.features))
    loss = RelationalDistance()
    assert float(loss(moved, teacher, labels)) == pytest.approx(float(loss(student, teacher, labels)), rel=1e-12)


def test_the_students_mean_distance_carries_gradient():
    # Scaling changes nothing, so the gradient has no component along the embeddings about their mean.
    student, teacher, labels = example()
    rows = student.features[-1].mean((2, 3)).requires_grad_()
    loss = RelationalDistance()(student._replace(features=(rows,)), teacher, labels)
    (gradient,) = torch.autograd.grad(loss, rows)
    assert gradient.abs().max() > 1e-3
    assert (gradient * rows).sum().item() == pytest.approx(0, abs=1e-12)


def test_equal_samples_have_no_distance_and_no_gradient():
    rows = torch.full((4, 3), 0.1, requires_grad=True)
    _, teacher, labels = example()
    loss = RelationalDistance()(Outputs(torch.zeros(4, 2), (rows,)), teacher.map(torch.Tensor.float), labels)
    loss.backward()
    assert torch.isfinite(loss)
    assert rows.grad.abs().max() == 0


class Largest(TorchDispatchMode):
    """The most numbers any operation returned, forward or backward."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else (found,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return found


def largest(loss, batch, dims):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(batch, dims, generator=generator) for _ in range(2)]
    rows[0].requires_grad_()
    student, teacher = (Outputs(torch.zeros(batch, 2), (r[:, :, None, None],)) for r in rows)
    with Largest() as seen:
        loss(student, teacher, torch.zeros(batch)).backward()
    return seen.numel


@pytest.mark.parametrize(("batch", "dims"), [(8, 50), (40, 5)])
def test_its_largest_tensor_is_the_matrix_of_distances_or_the_embeddings(batch, dims):
    assert largest(RelationalDistance(), batch, dims) == batch * max(batch, dims)
