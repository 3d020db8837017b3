import math

import numpy as np
import pytest
import torch

from kdnas.losses.example import example, wave
from kdnas.losses.feature.probabilistic import Probabilistic
from kdnas.outputs import Outputs

LABELS = torch.zeros(4, dtype=torch.long)
OPTIONS = [
    {},
    {"divergence": "jeffreys"},
    {"diagonal": False},
    {"reduction": "batch"},
    {"divergence": "jeffreys", "diagonal": False, "reduction": "batch"},
]


def outputs(embeddings):
    return Outputs(torch.zeros(len(embeddings), 2), (embeddings[:, :, None, None],))


def reference(student, teacher, divergence="kl", diagonal=True, reduction="pairs"):
    def probabilities(e):
        n = len(e)
        near = np.zeros((n, n))
        for i in range(n):
            for j in range(n):
                if diagonal or i != j:
                    near[i, j] = (e[i] @ e[j] / np.linalg.norm(e[i]) / np.linalg.norm(e[j]) + 1) / 2
        return near / near.sum(1, keepdims=True)

    p, q = probabilities(student), probabilities(teacher)
    total = 0.0
    for i in range(len(p)):
        for j in range(len(p)):
            ratio = math.log((q[i, j] + 1e-7) / (p[i, j] + 1e-7))
            total += q[i, j] * ratio - (p[i, j] * ratio if divergence == "jeffreys" else 0)
    return total / (len(p) ** 2 if reduction == "pairs" else len(p))


def test_two_samples_by_hand():
    # Student at a right angle: K = (1, 1/2), P = (2/3, 1/3). Teacher equal: P = (1/2, 1/2).
    student, teacher = outputs(torch.eye(2)), outputs(torch.ones(2, 3))
    expected = 2 * (math.log((1 / 2) / (2 / 3)) / 2 + math.log((1 / 2) / (1 / 3)) / 2) / 4
    assert Probabilistic()(student, teacher, LABELS).item() == pytest.approx(expected, rel=1e-5)
    # Without the diagonal the other one has all the probability on both sides.
    assert Probabilistic(diagonal=False)(student, teacher, LABELS).item() == 0


@pytest.mark.parametrize("arguments", OPTIONS, ids=str)
def test_agrees_with_a_loop(arguments):
    student, teacher, labels = example()
    value = Probabilistic(**arguments)(student, teacher, labels).item()
    pooled = [o.features[-1].numpy().mean((2, 3)) for o in (student, teacher)]
    assert value == pytest.approx(reference(*pooled, **arguments), rel=1e-10)


@pytest.mark.parametrize("arguments", OPTIONS, ids=str)
def test_rotation_and_scale_of_the_embeddings_do_not_matter(arguments):
    student, teacher = wave(4, 3), wave(4, 5, phase=2)
    rotation = torch.linalg.qr(wave(3, 3, phase=1)).Q
    loss = Probabilistic(**arguments)
    turned = outputs(student @ rotation * torch.tensor([1e-6, 1.0, 5.0, 1e4])[:, None])
    assert loss(turned, outputs(teacher), LABELS).item() == pytest.approx(
        loss(outputs(student), outputs(teacher), LABELS).item(), rel=1e-9
    )


def test_the_mean_over_pairs_halves_when_the_batch_is_repeated_and_the_mean_over_the_batch_stays():
    student, teacher = wave(4, 3), wave(4, 5, phase=2)
    for reduction, factor in (("pairs", 0.5), ("batch", 1.0)):
        loss = Probabilistic(reduction=reduction)
        once = loss(outputs(student), outputs(teacher), LABELS).item()
        twice = loss(outputs(student.repeat(2, 1)), outputs(teacher.repeat(2, 1)), LABELS).item()
        assert twice == pytest.approx(factor * once, rel=1e-4)


@pytest.mark.parametrize("arguments", OPTIONS, ids=str)
def test_finite_for_opposite_embeddings_and_dead_samples(arguments):
    student = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]]).requires_grad_()
    for chosen in (student, student[:2]):
        student.grad = None
        value = Probabilistic(**arguments)(outputs(chosen), outputs(torch.ones(len(chosen), 2)), LABELS)
        value.backward()
        assert value.isfinite() and student.grad.isfinite().all()


@pytest.mark.parametrize("arguments", OPTIONS, ids=str)
def test_gradient_is_that_of_the_value(arguments):
    loss, teacher = Probabilistic(**arguments), outputs(wave(4, 5, phase=2))
    assert torch.autograd.gradcheck(lambda x: loss(outputs(x), teacher, LABELS), wave(4, 3).requires_grad_())


def test_names_are_checked():
    for arguments in ({"divergence": "js"}, {"reduction": "sum"}):
        with pytest.raises(ValueError, match="must be"):
            Probabilistic(**arguments)
