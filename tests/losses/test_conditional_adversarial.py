import math

import numpy as np
import pytest
import torch

from kdnas.losses.adversarial.conditional_adversarial import ConditionalAdversarial
from kdnas.losses.example import example, fill, wave
from kdnas.outputs import Outputs


def prepared(**arguments):
    student, teacher, labels = example()
    loss = ConditionalAdversarial(**arguments)
    loss.prepare(student, teacher)
    return fill(loss.double()), student, teacher, labels


def judge(loss, z):
    layers = [m for m in loss.discriminator if hasattr(m, "weight")]
    x = np.asarray(z)
    for index, layer in enumerate(layers):
        x = x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
        if index < len(layers) - 1:
            x = np.where(x > 0, x, 0.2 * x)
    return x


def softplus(x):
    return np.log1p(np.exp(x)).mean()


def class_term(judged, labels):
    scores = judged[:, 1:]
    return np.mean([math.log(np.exp(row).sum()) - row[y] for row, y in zip(scores, labels.tolist(), strict=True)])


def student_reference(loss, student, teacher, labels):
    judged = judge(loss, student.logits)
    distance = np.abs(student.logits.numpy() - teacher.logits.numpy()).mean()
    return softplus(-judged[:, 0]) + class_term(judged, labels) + distance


def test_an_undecided_discriminator_by_hand():
    # All weights 0: softplus(0) = log 2, two even classes log 2, and |1 - 0| averaged over two classes.
    loss = ConditionalAdversarial(regression=3)
    student, teacher = Outputs(torch.tensor([[1.0, 0.0]])), Outputs(torch.zeros(1, 2))
    loss.prepare(student, teacher)
    for parameter in loss.parameters():
        torch.nn.init.zeros_(parameter)
    label = torch.tensor([0])
    assert loss(student, teacher, label).item() == pytest.approx(2 * math.log(2) + 3 * 0.5)
    assert loss.adversary(student, teacher, label).item() == pytest.approx(4 * math.log(2))


def test_agrees_with_numpy():
    loss, student, teacher, labels = prepared(width=7)
    expected = student_reference(loss, student, teacher, labels)
    assert loss(student, teacher, labels).item() == pytest.approx(expected, rel=1e-12)
    ours, theirs = judge(loss, student.logits), judge(loss, teacher.logits)
    expected = softplus(-theirs[:, 0]) + softplus(ours[:, 0]) + class_term(ours, labels) + class_term(theirs, labels)
    assert loss.adversary(student, teacher, labels).item() == pytest.approx(expected, rel=1e-12)


def test_golden():
    loss, student, teacher, labels = prepared()
    expected = student_reference(loss, student, teacher, labels)
    assert ConditionalAdversarial.golden == pytest.approx(expected, rel=1e-12)


def test_what_helps_the_student_hurts_the_discriminator():
    loss, student, teacher, labels = prepared(conditional=False, regression=0)
    logits = student.logits.clone().requires_grad_()
    loss(Outputs(logits), teacher, labels).backward()
    moved = Outputs(logits.detach() - 0.1 * logits.grad)
    assert loss(moved, teacher, labels) < loss(student, teacher, labels)
    assert loss.adversary(moved, teacher, labels) > loss.adversary(student, teacher, labels)


def test_unconditional_ignores_the_labels():
    loss, student, teacher, labels = prepared(conditional=False)
    assert torch.equal(loss(student, teacher, labels), loss(student, teacher, labels.flip(0)))
    loss, student, teacher, labels = prepared()
    assert not torch.equal(loss(student, teacher, labels), loss(student, teacher, labels.flip(0)))


def test_maps_and_unprepared_calls_are_refused():
    student, teacher, labels = example(dense=True)
    with pytest.raises(ValueError, match=r"logits \[batch, classes\], got \(4, 5, 4, 3\)"):
        ConditionalAdversarial().prepare(student, teacher)
    flat = Outputs(wave(4, 5))
    with pytest.raises(ValueError, match="Call prepare"):
        ConditionalAdversarial()(flat, flat, labels[:, 0, 0])
    with pytest.raises(ValueError, match="`width` must be at least 1"):
        ConditionalAdversarial(width=0)
