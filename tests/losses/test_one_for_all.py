import numpy as np
import pytest
import torch

from kdnas.losses.example import example, fill, wave
from kdnas.losses.feature.one_for_all import OneForAll
from kdnas.losses.response.soft_targets import SoftTargets
from kdnas.outputs import Outputs

LABELS = torch.tensor([0])


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def reference(logits, teacher, labels, gamma, temperature):
    total = 0.0
    for z, t, y in zip(logits, teacher, labels, strict=True):
        p, q = softmax(z / temperature), softmax(t / temperature)
        for c in range(len(p)):
            m = float(c == y)
            total -= ((q[c] + m) ** gamma - m) * np.log(p[c]) / len(labels)
    return total


def test_two_classes_by_hand():
    # q = (3/4, 1/4), label 0, gamma 2: weights (49/16 - 1, 1/16); p = (1/2, 1/2).
    teacher = torch.tensor([[np.log(3.0), 0.0]])
    student = Outputs(torch.zeros(1, 2, dtype=torch.float64), (torch.zeros(1, 1, 1, 1, dtype=torch.float64),))
    loss = OneForAll(gamma=2.0, stages=(0,))
    loss.prepare(student, teacher)
    torch.nn.init.zeros_(loss.exits[0][-1].weight)
    torch.nn.init.zeros_(loss.exits[0][-1].bias)
    one = (33 / 16 + 1 / 16) * np.log(2)
    assert loss.double()(student, teacher, LABELS).item() == pytest.approx(2 * one)
    alone = OneForAll(gamma=2.0, stages=(0,), final=False)
    alone.prepare(student, teacher)
    alone.load_state_dict(loss.state_dict())
    assert alone.double()(student, teacher, LABELS).item() == pytest.approx(one)


@pytest.mark.parametrize(("gamma", "temperature"), [(1.0, 1.0), (1.5, 1.0), (1.2, 3.0)])
def test_it_agrees_with_a_loop(gamma, temperature):
    student, teacher, labels = example()
    loss = OneForAll(gamma=gamma, temperature=temperature, width=7)
    loss.prepare(student, teacher)
    fill(loss.double())
    logits = [loss.exits[i](f).detach().numpy() for i, f in enumerate(student.features)] + [student.logits.numpy()]
    expected = sum(reference(z, teacher.logits.numpy(), labels.numpy(), gamma, temperature) for z in logits)
    assert loss(student, teacher, labels).item() == pytest.approx(expected, rel=1e-11)


def test_gamma_1_is_the_soft_cross_entropy():
    student, teacher, labels = example()
    loss = OneForAll(gamma=1.0, stages=(-1,))
    loss.prepare(student, teacher)
    fill(loss.double())
    soft = SoftTargets(form="soft_cross_entropy", temperature=1.0)
    expected = soft(student, teacher) + soft(loss.exits[0](student.features[-1]), teacher.logits)
    assert loss(student, teacher, labels).item() == pytest.approx(expected.item(), rel=1e-12)


def test_a_teacher_of_logits_alone_will_do():
    student, teacher, labels = example()
    loss = OneForAll()
    loss.prepare(student, teacher.logits)
    fill(loss.double())
    assert torch.equal(loss(student, teacher.logits, labels), loss(student, teacher, labels))


def test_faults_are_named():
    student, teacher, labels = example()
    with pytest.raises(ValueError, match="prepare"):
        OneForAll()(student, teacher, labels)
    with pytest.raises(ValueError, match="name student stages 0 to 1, got 2"):
        OneForAll(stages=(2,)).prepare(student, teacher)
    with pytest.raises(ValueError, match="`stages` must be 'all' or a tuple"):
        OneForAll(stages="last")
    dense = Outputs(wave(2, 3, 4, 4), (wave(2, 3, 4, 4),))
    with pytest.raises(ValueError, match="Use PixelWise"):
        OneForAll().prepare(dense, dense)
