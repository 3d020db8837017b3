import numpy as np
import pytest
import torch

from kdnas.losses.example import example
from kdnas.losses.relation.similarity_preserving import SimilarityPreserving
from kdnas.outputs import Outputs


def outputs(*rows):
    return Outputs(torch.zeros(len(rows), 2), (torch.tensor(rows, dtype=torch.float64)[:, :, None, None],))


def reference(student, teacher):
    """The loss of one pair of numpy maps, by loops."""
    matrices = []
    for maps in (student, teacher):
        gram = np.array([[np.sum(a * b) for b in maps] for a in maps])
        matrices.append([row / np.sqrt(np.sum(row**2)) for row in gram])
    return np.sum((np.array(matrices[0]) - np.array(matrices[1])) ** 2) / len(student) ** 2


def test_two_samples_by_hand():
    # Student orthogonal: G = I. Teacher equal: every row (1, 1)/sqrt 2. Four squares, 2 (1 - 1/sqrt 2)^2 + 2 * 1/2.
    student, teacher = outputs((1, 0), (0, 1)), outputs((1, 0), (1, 0))
    expected = (2 * (1 - 0.5**0.5) ** 2 + 1) / 4
    assert float(SimilarityPreserving()(student, teacher, torch.zeros(2))) == pytest.approx(expected, rel=1e-12)


def test_it_agrees_with_loops_in_numpy():
    student, teacher, labels = example()
    expected = sum(reference(s.numpy(), t.numpy()) for s, t in zip(student.features, teacher.features, strict=True))
    assert float(SimilarityPreserving()(student, teacher, labels)) == pytest.approx(expected, rel=1e-12)


def test_the_scale_of_the_maps_does_not_matter_even_where_their_squares_overflow():
    student, teacher, labels = (x.map(torch.Tensor.float) if isinstance(x, Outputs) else x for x in example())
    huge = student._replace(features=tuple(f * 1e12 for f in student.features))
    loss = SimilarityPreserving()
    assert float(loss(huge, teacher, labels)) == pytest.approx(float(loss(student, teacher, labels)), rel=1e-5)


def test_a_rotation_of_the_features_does_not_matter():
    student, teacher, labels = example()
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    turned = student._replace(
        features=(student.features[0], torch.einsum("dc,bchw->bdhw", rotation, student.features[1]))
    )
    loss = SimilarityPreserving()
    assert float(loss(turned, teacher, labels)) == pytest.approx(float(loss(student, teacher, labels)), rel=1e-10)


def test_repeating_the_batch_halves_it():
    student, teacher, labels = example()
    twice = [o.map(lambda x: torch.cat([x, x])) for o in (student, teacher)]
    loss = SimilarityPreserving()
    once = float(loss(student, teacher, labels))
    assert float(loss(*twice, torch.cat([labels, labels]))) == pytest.approx(once / 2, rel=1e-10)
