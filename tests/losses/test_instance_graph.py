import numpy as np
import pytest
import torch

from kdnas.losses.example import example
from kdnas.losses.relation.instance_graph import InstanceGraph
from kdnas.outputs import Outputs


def edges(maps):
    squares = np.array([[np.sum((a - b) ** 2) for b in maps] for a in maps])
    return squares / squares.max()


def halved(maps):
    """`[batch, channels, h, w]` with neighbouring rows, columns and channels averaged, by loops."""
    b, c, h, w = maps.shape
    out = np.zeros((b, c // 2, h, w))
    for k in range(c // 2):
        out[:, k] = (maps[:, 2 * k] + maps[:, 2 * k + 1]) / 2
    return out


def pooled(maps):
    b, c, h, w = maps.shape
    out = np.zeros((b, c, h // 2, w // 2))
    for i in range(h // 2):
        for j in range(w // 2):
            out[:, :, i, j] = maps[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((2, 3))
    return out


def moves(first, second):
    squares = np.sum((pooled(first) - halved(second)) ** 2, axis=(1, 2, 3))
    return squares / squares.max()


def terms(student, teacher):
    """Vertex, edge and transformation terms of the example batch."""
    s, t = ([f.numpy() for f in o.features] for o in (student, teacher))
    vertex = np.mean((student.logits.numpy() - teacher.logits.numpy()) ** 2)
    layers = [*zip(s, t, strict=True), (s[-1].mean((2, 3)), t[-1].mean((2, 3)))]
    edge = np.mean([np.mean((edges(a) - edges(b)) ** 2) for a, b in layers])
    return vertex, edge, np.mean((moves(*s) - moves(*t)) ** 2)


def test_three_samples_by_hand():
    # One stage of one pixel, so map and embedding agree. Student 0, 1, 2: squares 1, 4, 1 over 4. Teacher 0, 1, 3:
    # 1, 9, 4 over 9. No second stage, no transformation. Logits differ by 1 in one of six entries.
    student, teacher = (
        Outputs(torch.zeros(3, 2, dtype=torch.float64), (torch.tensor(rows, dtype=torch.float64)[:, :, None, None],))
        for rows in ([[0], [1], [2]], [[0], [1], [3]])
    )
    student.logits[0, 0] = 1
    edge = 2 * ((1 / 4 - 1 / 9) ** 2 + (1 / 4 - 4 / 9) ** 2) / 9
    found = InstanceGraph(vertex=6, edge=3)(student, teacher, torch.zeros(3))
    assert float(found) == pytest.approx(1 + 3 * edge, rel=1e-12)


@pytest.mark.parametrize("weights", [(0.1, 5, 5), (1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_each_term_agrees_with_loops_in_numpy(weights):
    student, teacher, labels = example()
    loss = InstanceGraph(vertex=weights[0], edge=weights[1], transformation=weights[2])
    expected = np.dot(weights, terms(student, teacher))
    assert float(loss(student, teacher, labels)) == pytest.approx(expected, rel=1e-10)


def test_edges_and_transformations_do_not_depend_on_the_scale_of_all_maps():
    student, teacher, labels = example()
    scaled = student._replace(features=tuple(7 * f for f in student.features))
    loss = InstanceGraph(vertex=0)
    assert float(loss(scaled, teacher, labels)) == pytest.approx(float(loss(student, teacher, labels)), rel=1e-10)


def test_the_largest_distance_carries_gradient_only_when_asked():
    student, teacher, labels = example()
    along = {}
    for through in (True, False):
        features = [f.clone().requires_grad_() for f in student.features]
        loss = InstanceGraph(vertex=0, through_max=through)(student._replace(features=tuple(features)), teacher, labels)
        gradients = torch.autograd.grad(loss, features)
        # Along the maps themselves a loss that is free of scale does not change.
        along[through] = abs(sum((g * f).sum().item() for g, f in zip(gradients, features, strict=True)))
    assert along[True] < 1e-10 < 1e-3 < along[False]


def test_feature_vertices_go_through_a_learnable_projection():
    student, teacher, labels = example()
    loss = InstanceGraph(vertices="features", edge=0, transformation=0, vertex=1)
    with pytest.raises(ValueError, match=r"student \(4, 6\) and teacher \(4, 8\)"):
        loss(student, teacher, labels)
    loss.prepare(student, teacher)
    loss.double()
    s, t = (o.features[-1].numpy().mean((2, 3)) for o in (student, teacher))
    expected = np.mean((s @ loss.projector.weight.detach().numpy().T - t) ** 2)
    assert float(loss(student, teacher, labels).detach()) == pytest.approx(expected, rel=1e-10)


def test_other_vertices_are_refused():
    with pytest.raises(ValueError, match="`vertices` must be one of logits, features, got 'images'"):
        InstanceGraph(vertices="images")
