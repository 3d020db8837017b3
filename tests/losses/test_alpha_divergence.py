import math

import numpy as np
import pytest
import torch

from kdnas.losses.example import example, wave
from kdnas.losses.response.alpha_divergence import AlphaDivergence
from kdnas.outputs import Outputs

LABELS = torch.zeros(4, dtype=torch.long)


def fixed(alpha, clip=5.0):
    return AlphaDivergence(alpha_min=alpha, alpha_max=alpha, clip=clip)


def outputs(*probabilities):
    return Outputs(torch.tensor([probabilities], dtype=torch.float64).log())


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def divergence(p, q, alpha):
    if alpha == 1:
        return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    if alpha == 0:
        return sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
    return sum(b * ((a / b) ** alpha - 1) for a, b in zip(p, q, strict=True)) / (alpha * (alpha - 1))


def clipped(p, q, alpha, clip):
    """The estimate in which (p/q)^alpha is at most `clip`; for alpha 1 it is the divergence."""
    if alpha == 1:
        return divergence(p, q, 1)
    if alpha == 0:
        return -(q * np.log(np.minimum(p / q, clip))).sum()
    return (q * (np.minimum((p / q) ** alpha, clip) - 1)).sum() / (alpha * (alpha - 1))


def clipped_gradient(p, q, low, high, clip):
    """The gradient of -sum q rho log q, q and rho constant, of the alpha with the larger clipped value."""
    best = None
    for alpha in (high, low):
        if alpha == 1:
            rho, value = p / q, divergence(p, q, 1)
        elif alpha == 0:
            rho = np.log(np.minimum(p / q, clip)) - 1
            value = -(q * (rho + 1)).sum()
        else:
            ratio, base = np.minimum((p / q) ** alpha, clip), 1 / (alpha * (alpha - 1))
            rho, value = ratio / alpha + base, (q * (ratio - 1)).sum() * base
        if best is None or value > best[0]:
            slope = [
                -sum(q[i] * rho[i] * ((i == k) - q[k]) for i in range(len(q)))  # d log q_i / d z_k = [i=k] - q_k
                for k in range(len(q))
            ]
            best = (value, slope)
    return best[1]


def gradient(loss, z_s, z_t):
    z_s = z_s.clone().requires_grad_()
    loss(Outputs(z_s), Outputs(z_t), LABELS).backward()
    return z_s.grad


def test_two_classes_by_hand():
    # p = (1/4, 3/4), q = (1/2, 1/2), alpha 2: 1/2 * [1/2 * (1/4 - 1) + 1/2 * (9/4 - 1)] = 1/8.
    assert fixed(2.0)(outputs(0.5, 0.5), outputs(0.25, 0.75), LABELS).item() == pytest.approx(1 / 8)
    # alpha -1: 1/2 * [1/2 * (2 - 1) + 1/2 * (2/3 - 1)] = 1/6.
    assert fixed(-1.0)(outputs(0.5, 0.5), outputs(0.25, 0.75), LABELS).item() == pytest.approx(1 / 6)


@pytest.mark.parametrize("low, high", [(-1, 1), (-1, -1), (0, 1), (0, 0), (1, 1), (-0.5, 2), (0.5, 0.5), (1, 3)])
def test_the_value_is_the_larger_divergence(low, high):
    student, teacher, labels = example()
    expected = 0.0
    for a, b in zip(teacher.logits.numpy(), student.logits.numpy(), strict=True):
        expected += max(divergence(softmax(a), softmax(b), low), divergence(softmax(a), softmax(b), high)) / 4
    loss = AlphaDivergence(alpha_min=low, alpha_max=high, value="divergence")
    assert loss(student, teacher, labels).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("low, high", [(-1, 1), (-1, -1), (0, 1), (0, 0), (1, 1), (-0.5, 2), (0.5, 0.5), (1, 3)])
@pytest.mark.parametrize("clip", [1.5, 5.0])
def test_the_value_is_the_larger_clipped_estimate_which_is_optimised(low, high, clip):
    student, teacher, labels = example()
    expected = 0.0
    for a, b in zip(teacher.logits.numpy(), student.logits.numpy(), strict=True):
        expected += max(clipped(softmax(a), softmax(b), alpha, clip) for alpha in (low, high)) / 4
    loss = AlphaDivergence(alpha_min=low, alpha_max=high, clip=clip)
    assert loss(student, teacher, labels).item() == pytest.approx(expected, rel=1e-12)


def test_a_confident_teacher_does_not_raise_the_value_to_millions():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(64, 100, generator=generator) for _ in range(2))
    assert AlphaDivergence(value="divergence")(student, 10 * teacher) > 1e12
    assert AlphaDivergence()(student, 10 * teacher) < 10
    student.requires_grad_()
    gradients = [
        torch.autograd.grad(AlphaDivergence(value=value)(student, 10 * teacher), student)[0]
        for value in ("clipped", "divergence")
    ]
    assert torch.equal(*gradients)


def test_golden():
    assert AlphaDivergence()(*example()).item() == pytest.approx(AlphaDivergence.golden, rel=1e-12)


@pytest.mark.parametrize("low, high", [(-1, 1), (-1, -1), (0, 0), (0, 1), (1, 1), (-0.5, 2)])
def test_the_gradient_is_the_clipped_one(low, high):
    student, teacher, _ = example()
    expected = [
        clipped_gradient(softmax(a), softmax(b), low, high, 5.0)
        for a, b in zip(teacher.logits.numpy(), student.logits.numpy(), strict=True)
    ]
    found = gradient(AlphaDivergence(alpha_min=low, alpha_max=high), student.logits, teacher.logits)
    np.testing.assert_allclose(found.numpy(), np.array(expected) / 4, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.5, 1.0, 2.0])
def test_unclipped_gradient_is_that_of_the_divergence(alpha):
    student, teacher = 0.5 * wave(3, 4), 0.5 * wave(3, 4, phase=5)

    def loss(logits):
        return fixed(alpha)(Outputs(logits), Outputs(teacher), LABELS)

    assert torch.autograd.gradcheck(loss, student.requires_grad_())
    assert torch.autograd.gradgradcheck(loss, student)


def test_the_choice_is_made_per_sample():
    # Over-estimated by the student (alpha -1 is larger), then under-estimated (alpha 1 is larger).
    over, under = (torch.tensor([p]).log() for p in ([0.45, 0.55], [0.1, 0.9]))
    z_s = torch.cat([over * 0, under])
    z_t = torch.cat([torch.tensor([[0.15, 0.85]]).log(), torch.tensor([[0.4, 0.6]]).log()])
    alone = [
        [fixed(a)(Outputs(z_s[i : i + 1]), Outputs(z_t[i : i + 1]), LABELS).item() for a in (-1.0, 1.0)] for i in (0, 1)
    ]
    assert alone[0][0] > alone[0][1] and alone[1][1] > alone[1][0]
    assert AlphaDivergence()(Outputs(z_s), Outputs(z_t), LABELS).item() == pytest.approx(
        (alone[0][0] + alone[1][1]) / 2
    )


@pytest.mark.parametrize(
    "low, high, value",
    [*((a, b, "divergence") for a, b in ((-1, 1), (0, 0), (2, 2), (-1, -1), (1, 1))), (-1, 1, "clipped")],
)
def test_never_negative_and_zero_only_for_equal_distributions(low, high, value):
    loss = AlphaDivergence(alpha_min=low, alpha_max=high, value=value)
    z = 3 * wave(1, 7).float()
    assert loss(Outputs(z), Outputs(z + 100), LABELS).item() < 1e-9
    assert loss(Outputs(z), Outputs(z), LABELS).item() == 0
    for size in (1e-5, 1e-3, 0.1, 1.0, 10.0):
        other = z.clone()
        other[0, 0] += size
        assert loss(Outputs(z), Outputs(other), LABELS).item() > 0


def test_ties_go_to_the_larger_alpha():
    # For p = (a, b) and q = (b, a) the two directions of KL, alpha 0 and 1, are equal; their gradients are not.
    z_s, z_t = torch.tensor([[0.5, -0.5]]).double(), torch.tensor([[-0.5, 0.5]]).double()
    tied = gradient(AlphaDivergence(alpha_min=0.0, alpha_max=1.0), z_s, z_t)
    assert torch.equal(tied, gradient(fixed(1.0), z_s, z_t))
    assert not torch.allclose(tied, gradient(fixed(0.0), z_s, z_t))


@pytest.mark.parametrize("low, high", [(-1.0, 1.0), (-1.0, -1.0), (0.0, 0.0), (2.0, 2.0)])
def test_extreme_logits_are_finite_in_float32(low, high):
    z_t = torch.tensor([[1e4, 0.0, -1e4], [80.0, -80.0, 0.0], [0.0, 1e4, 0.0]])
    z_s = torch.tensor([[-1e4, 0.0, 1e4], [-80.0, 80.0, 0.0], [1.0, 0.0, 0.0]]).requires_grad_()
    loss = AlphaDivergence(alpha_min=low, alpha_max=high)(Outputs(z_s), Outputs(z_t), LABELS)
    loss.backward()
    assert loss.isfinite() and z_s.grad.isfinite().all()


def test_a_confidently_wrong_student_is_still_pulled():
    z_s, z_t = torch.tensor([[20.0, 0.0, 0.0]]), torch.tensor([[0.0, 20.0, 0.0]])
    assert gradient(fixed(-1.0), z_s, z_t).abs().max() < 1e-6
    assert gradient(AlphaDivergence(), z_s, z_t).abs().max() > 0.9


def test_dense_logits_average_over_positions():
    a, b = wave(2, 3, 4, 5), wave(2, 3, 4, 5, phase=1)
    dense = AlphaDivergence()(Outputs(a), Outputs(b), LABELS)
    rows = [x.movedim(1, -1).reshape(-1, 3) for x in (a, b)]
    assert dense.item() == pytest.approx(AlphaDivergence()(Outputs(rows[0]), Outputs(rows[1]), LABELS).item())


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="`alpha_min` must not exceed"):
        AlphaDivergence(alpha_min=2, alpha_max=1)
    with pytest.raises(ValueError, match="`clip` must be at least 1"):
        AlphaDivergence(clip=0.5)
