import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kdnas.losses.example import example
from kdnas.losses.relation.relational_angle import RelationalAngle
from kdnas.outputs import Outputs


def outputs(rows):
    return Outputs(torch.zeros(len(rows), 2), (torch.tensor(rows, dtype=torch.float64),))


def cosine(a, b):
    lengths = np.linalg.norm(a) * np.linalg.norm(b)
    return np.dot(a, b) / lengths if lengths > 0 else 0.0


def huber(x):
    return x * x / 2 if abs(x) <= 1 else abs(x) - 0.5


def reference(student, teacher, vertices):
    n = len(student)
    triplets = [(i, j, k) for j in range(vertices) for i in range(n) for k in range(n)]
    values = []
    for i, j, k in triplets:
        mine, theirs = (cosine(rows[i] - rows[j], rows[k] - rows[j]) for rows in (student, teacher))
        values.append(huber(mine - theirs))
    return np.mean(values)


def test_a_right_angle_against_a_line_by_hand():
    # Cosines at the three corners, student (0, 1/sqrt 2, 1/sqrt 2), teacher on a line (-1, 1, 1) with the middle first.
    student, teacher = outputs([[0, 0], [1, 0], [0, 1]]), outputs([[0], [1], [-1]])
    gap = 1 - 0.5**0.5
    expected = 2 * (1 / 2 + 2 * gap**2 / 2) / 27
    assert float(RelationalAngle()(student, teacher, torch.zeros(3))) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("vertices", [0, 2])
def test_it_agrees_with_loops_in_numpy(vertices):
    student, teacher, labels = example()
    expected = reference(*(o.features[-1].numpy().mean((2, 3)) for o in (student, teacher)), vertices or 4)
    assert float(RelationalAngle(vertices=vertices)(student, teacher, labels)) == pytest.approx(expected, rel=1e-12)


def test_moving_turning_and_scaling_the_student_does_not_matter():
    student, teacher, labels = example()
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    moved = student._replace(features=(3 * torch.einsum("dc,bchw->bdhw", rotation, student.features[-1]) + 1,))
    loss = RelationalAngle()
    assert float(loss(moved, teacher, labels)) == pytest.approx(float(loss(student, teacher, labels)), rel=1e-10)


def test_a_negative_count_of_vertices_is_refused():
    with pytest.raises(ValueError, match=r"`vertices` must be at least 0, got -1"):
        RelationalAngle(vertices=-1)


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
def test_its_largest_tensor_is_as_documented_and_vertices_bound_it(batch, dims):
    assert largest(RelationalAngle(), batch, dims) == batch * batch * max(dims, batch)
    assert largest(RelationalAngle(vertices=3), batch, dims) == 3 * batch * max(dims, batch)
