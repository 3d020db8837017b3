import numpy as np
import pytest
import torch

from kdnas.losses.example import example, wave
from kdnas.losses.response.dist import Dist
from kdnas.outputs import Outputs

LABELS = torch.zeros(4, dtype=torch.long)


def softmax(z):
    return np.exp(z) / np.exp(z).sum()


def reference(z_s, z_t, inter, intra, temperature):
    p = np.array([softmax(z / temperature) for z in z_s.numpy()])
    q = np.array([softmax(z / temperature) for z in z_t.numpy()])
    rows = [1 - np.corrcoef(p[b], q[b])[0, 1] for b in range(len(p))]
    columns = [1 - np.corrcoef(p[:, c], q[:, c])[0, 1] for c in range(p.shape[1])]
    return temperature**2 * (inter * np.mean(rows) + intra * np.mean(columns))


def test_two_samples_and_classes_by_hand():
    # Rows (3/4, 1/4) and (1/4, 3/4) against (2/3, 1/3) twice. Two numbers correlate +-1: rows 1 and -1, mean 1;
    # the teacher's columns are constant and correlate 0, mean 1.
    student = Outputs(torch.tensor([[3.0, 1.0], [1.0, 3.0]]).log())
    teacher = Outputs(torch.tensor([[2.0, 1.0], [2.0, 1.0]]).log())
    assert Dist(inter=3, intra=0)(student, teacher, LABELS).item() == pytest.approx(3)
    assert Dist(inter=0, intra=5)(student, teacher, LABELS).item() == pytest.approx(5)


@pytest.mark.parametrize("inter, intra, temperature", [(1, 1, 1), (2, 0, 4), (0, 1, 2)])
def test_agrees_with_numpy(inter, intra, temperature):
    student, teacher, labels = example()
    value = Dist(inter=inter, intra=intra, temperature=temperature)(student, teacher, labels).item()
    assert value == pytest.approx(reference(student.logits, teacher.logits, inter, intra, temperature), rel=1e-12)


def test_golden():
    student, teacher, _ = example()
    assert Dist.golden == pytest.approx(reference(student.logits, teacher.logits, 1, 1, 1), rel=1e-12)


def test_equal_predictions_give_zero():
    _, teacher, labels = example()
    assert Dist()(teacher, teacher, labels).item() == pytest.approx(0, abs=1e-12)


def test_classes_below_the_smallest_float_still_correlate():
    # The last class has probabilities of about e^-200 that rank the samples alike.
    z = torch.tensor([[0.0, 1.0, -200.0], [1.0, 0.0, -201.0], [0.5, 0.0, -203.0]])
    loss = Dist(inter=0)(Outputs(z), Outputs(z), LABELS)
    assert loss.item() == pytest.approx(0, abs=1e-5)


def test_one_sample_keeps_the_relation_between_classes():
    student, teacher, labels = example(1)
    p, q = (softmax(o.logits[0].numpy()) for o in (student, teacher))
    assert Dist()(student, teacher, labels).item() == pytest.approx(1 - np.corrcoef(p, q)[0, 1], rel=1e-12)


def test_positions_of_dense_logits_are_samples():
    a, b = wave(2, 3, 4, 5), wave(2, 3, 4, 5, phase=1)
    rows = [Outputs(x.movedim(1, -1).reshape(-1, 3)) for x in (a, b)]
    assert Dist()(Outputs(a), Outputs(b), LABELS).item() == pytest.approx(Dist()(*rows, LABELS).item())


def test_a_temperature_of_zero_is_refused():
    with pytest.raises(ValueError, match="`temperature` must be above 0"):
        Dist(temperature=0)
