import numpy as np
import pytest
import torch

from kdnas.losses.dense.channel_wise import ChannelWise
from kdnas.losses.example import example, fill, wave
from kdnas.outputs import Outputs


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def reference(student, teacher, temperature):
    values = []
    for b, c in np.ndindex(student.shape[:2]):
        p, q = softmax(student[b, c] / temperature), softmax(teacher[b, c] / temperature)
        values.append((q * np.log(q / p)).sum())
    return np.mean(values) * temperature**2


def test_two_positions_by_hand():
    # Teacher (3/4, 1/4), student (1/2, 1/2): 3/4 log 3/2 + 1/4 log 1/2.
    teacher = Outputs(torch.zeros(1, 2), (torch.tensor([np.log(3.0), 0.0]).reshape(1, 1, 1, 2),))
    student = Outputs(torch.zeros(1, 2, dtype=torch.float64), (torch.zeros(1, 1, 1, 2, dtype=torch.float64),))
    teacher = teacher.map(torch.Tensor.double)
    assert ChannelWise()(student, teacher).item() == pytest.approx(0.75 * np.log(1.5) + 0.25 * np.log(0.5))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_it_agrees_with_a_loop(temperature):
    student, teacher, labels = example()
    loss = ChannelWise(temperature=temperature)
    loss.prepare(student, teacher)
    fill(loss.double())
    mapped = np.einsum("oc,bchw->bohw", loss.taps.adapters["0"].weight.detach().numpy(), student.features[1].numpy())
    expected = reference(mapped, teacher.features[1].numpy(), temperature)
    assert loss(student, teacher, labels).item() == pytest.approx(expected, rel=1e-11)


def test_logits_are_compared_class_by_class_without_an_adapter():
    student, teacher, labels = example(dense=True)
    loss = ChannelWise(maps="logits", temperature=2.0)
    loss.prepare(student, teacher)
    assert not list(loss.parameters())
    expected = reference(student.logits.numpy(), teacher.logits.numpy(), 2.0)
    assert loss(student.logits, teacher.logits).item() == pytest.approx(expected, rel=1e-11)
    finer = teacher._replace(logits=teacher.logits.repeat_interleave(2, 2))
    assert loss(student, finer, labels).item() == pytest.approx(expected, rel=1e-11)
    with pytest.raises(ValueError, match=r"needs logits \[batch, classes, height, width\]"):
        loss(wave(4, 5), wave(4, 5))


def test_a_shift_of_a_channel_changes_nothing():
    student, teacher = example()[:2]
    shifted = teacher._replace(features=tuple(f + wave(*f.shape[:2])[..., None, None] for f in teacher.features))
    loss = ChannelWise()
    loss.prepare(student, teacher)
    loss.double()
    assert loss(student, shifted).item() == pytest.approx(loss(student, teacher).item(), rel=1e-10)
