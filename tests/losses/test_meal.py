import math

import numpy as np
import pytest
import torch

from kdnas.losses.adversarial.meal import Meal
from kdnas.losses.example import example, fill
from kdnas.outputs import Outputs


def prepared(**arguments):
    student, teacher, labels = example()
    loss = Meal(**arguments)
    loss.prepare(student, teacher)
    return fill(loss.double()), student, teacher, labels


def to_length(x, length):
    # Entry i averages the entries from floor(i n / length) to ceil((i + 1) n / length).
    n = x.shape[1]
    return np.stack([x[:, i * n // length : math.ceil((i + 1) * n / length)].mean(1) for i in range(length)], axis=1)


def vectors(student, teacher):
    found = []
    for u, v in [*zip(student.features, teacher.features, strict=True), (student.logits, teacher.logits)]:
        u, v = (x.numpy().mean((2, 3)) if x.dim() == 4 else x.numpy() for x in (u, v))
        length = min(u.shape[1], v.shape[1])
        found.append((to_length(u, length), to_length(v, length)))
    return found


def judge(discriminator, x):
    layers = [m for m in discriminator if hasattr(m, "weight")]
    for index, layer in enumerate(layers):
        x = x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
        if index < len(layers) - 1:
            x = np.maximum(x, 0)
    return x[:, 0]


def softmax(x):
    return np.exp(x) / np.exp(x).sum(1, keepdims=True)


def softplus(x):
    return np.log1p(np.exp(x)).mean()


def reference(loss, student, teacher, similarity, gammas, adversarial):
    total = 0.0
    for (u, v), gamma, d in zip(vectors(student, teacher), gammas, loss.discriminators, strict=True):
        p, q = softmax(u), softmax(v)
        per_sample = {"soft_cross_entropy": -q * np.log(p), "l1": np.abs(p - q), "l2": (p - q) ** 2}[similarity]
        total += gamma * per_sample.sum(1).mean() + adversarial * softplus(-judge(d, u))
    return total


def test_an_undecided_discriminator_by_hand():
    # One feature of one channel (softmax 1, soft cross-entropy 0), even logits (log 2): 2 log 2 from two
    # discriminators of zeros, and 1 * log 2.
    outputs = Outputs(torch.zeros(2, 2), (torch.ones(2, 1, 3, 3),))
    loss = Meal()
    loss.prepare(outputs, outputs)
    for parameter in loss.parameters():
        torch.nn.init.zeros_(parameter)
    assert loss(outputs, outputs, torch.zeros(2)).item() == pytest.approx(3 * math.log(2))
    assert loss.adversary(outputs, outputs, torch.zeros(2)).item() == pytest.approx(4 * math.log(2))


@pytest.mark.parametrize("similarity", ["soft_cross_entropy", "l1", "l2"])
def test_agrees_with_numpy(similarity):
    gammas = (0.3, 0.5, 2.0)
    loss, student, teacher, labels = prepared(similarity=similarity, gammas=gammas, adversarial=0.7)
    expected = reference(loss, student, teacher, similarity, gammas, 0.7)
    assert loss(student, teacher, labels).item() == pytest.approx(expected, rel=1e-12)
    pairs = zip(vectors(student, teacher), loss.discriminators, strict=True)
    against = sum(softplus(-judge(d, v)) + softplus(judge(d, u)) for (u, v), d in pairs)
    assert loss.adversary(student, teacher, labels).item() == pytest.approx(against, rel=1e-12)


def test_golden_has_the_last_of_the_authors_gammas():
    loss, student, teacher, _ = prepared()
    expected = reference(loss, student, teacher, "soft_cross_entropy", (0.05, 0.1, 1.0), 1.0)
    assert Meal.golden == pytest.approx(expected, rel=1e-12)


def test_more_than_five_depths_weigh_the_shallow_ones_least():
    student, teacher, labels = example()
    pairs = ((0, 0), (0, 1), (1, 0), (1, 1), (0, 0), (1, 1))
    default, same = (Meal(taps=pairs, gammas=g) for g in (None, (0.001, 0.001, 0.001, 0.01, 0.05, 0.1, 1.0)))
    for loss in (default, same):
        loss.prepare(student, teacher)
        fill(loss.double())
    assert torch.equal(default(student, teacher, labels), same(student, teacher, labels))


def test_what_helps_the_student_hurts_the_discriminators():
    loss, student, teacher, labels = prepared(gammas=(0.0, 0.0, 0.0))
    student = student.map(lambda x: x.clone().requires_grad_())
    loss(student, teacher, labels).backward()
    with torch.no_grad():
        moved = Outputs(student.logits - 0.1 * student.logits.grad, tuple(f - 0.1 * f.grad for f in student.features))
    assert loss(moved, teacher, labels) < loss(student, teacher, labels)
    assert loss.adversary(moved, teacher, labels) > loss.adversary(student, teacher, labels)


def test_wrong_settings_and_unprepared_calls_are_refused():
    student, teacher, labels = example()
    with pytest.raises(ValueError, match="`similarity` must be one of"):
        Meal(similarity="kl")
    with pytest.raises(ValueError, match="`gammas` must have 3 numbers"):
        Meal(gammas=(1.0,)).prepare(student, teacher)
    with pytest.raises(ValueError, match="Call prepare"):
        Meal()(student, teacher, labels)
