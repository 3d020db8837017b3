"""Oracle distillation: who is right teaches."""

import math

import numpy as np
import pytest
import torch

from kdnas.losses.example import example, wave
from kdnas.losses.response.cross_entropy import CrossEntropy
from kdnas.losses.response.oracle import Oracle
from kdnas.losses.response.soft_targets import SoftTargets
from kdnas.outputs import Outputs


def ensemble(*logits):
    members = tuple(Outputs(one) for one in logits)
    return Outputs(torch.stack(logits).mean(0), members=members)


def saying(classes, batch=4, count=5, phase=0.0):
    """Logits of a member that says these classes."""
    logits = wave(batch, count, phase=phase)
    return logits + 4 * torch.nn.functional.one_hot(torch.tensor(classes), count)


LABELS = torch.tensor([0, 1, 2, 3])
STUDENT = Outputs(2 * wave(4, 5, phase=9))
RIGHT, WRONG = [0, 1, 2, 3], [1, 2, 3, 4]


def reference(student, members, labels, share, temperature):
    def softmax(z):
        return np.exp(z - z.max()) / np.exp(z - z.max()).sum()

    total = 0.0
    for b, label in enumerate(labels):
        task = -math.log(softmax(student[b])[label])
        losses = []
        for z in members:
            if z[b].argmax() == label:
                q, p = softmax(z[b] / temperature), softmax(student[b] / temperature)
                losses.append((1 - share) * task + share * temperature**2 * (q * np.log(q / p)).sum())
        total += np.mean(losses) if losses else task
    return total / len(labels)


def test_agrees_with_a_loop():
    members = [saying([0, 2, 2, 0], phase=1), saying([0, 1, 3, 1], phase=2), saying([4, 1, 2, 2], phase=3)]
    for share, temperature in ((0.9, 4.0), (0.3, 1.0), (1.0, 2.0)):
        found = Oracle(share=share, temperature=temperature)(STUDENT, ensemble(*members), LABELS).item()
        expected = reference(STUDENT.logits.numpy(), [m.numpy() for m in members], LABELS.tolist(), share, temperature)
        assert found == pytest.approx(expected, rel=1e-12)


def test_two_classes_by_hand():
    # p = (3/4, 1/4); the right member says (2/3, 1/3), the wrong one is left out; label 0.
    student = Outputs(torch.tensor([[3.0, 1.0]]).log())
    teacher = ensemble(torch.tensor([[2.0, 1.0]]).log(), torch.tensor([[1.0, 5.0]]).log())
    divergence = 2 / 3 * math.log(8 / 9) + 1 / 3 * math.log(4 / 3)
    expected = 0.5 * math.log(4 / 3) + 0.5 * divergence
    found = Oracle(share=0.5, temperature=1.0)(student, teacher, torch.tensor([0])).item()
    assert found == pytest.approx(expected, rel=1e-5)


def test_where_all_are_wrong_it_is_exactly_cross_entropy():
    teacher = ensemble(saying(WRONG, phase=1), saying(WRONG, phase=2))
    found, expected = [], []
    for loss, values in ((Oracle(), found), (CrossEntropy(), expected)):
        logits = STUDENT.logits.clone().requires_grad_()
        value = loss(Outputs(logits), teacher, LABELS)
        value.backward()
        values += [value.item(), logits.grad]
    assert found[0] == pytest.approx(expected[0], rel=1e-15)  # one rounding: the sum is taken in another order
    torch.testing.assert_close(found[1], expected[1], rtol=1e-14, atol=0)


def test_where_one_is_right_it_is_distillation_from_that_one():
    right = saying(RIGHT, phase=1)
    teacher = ensemble(saying(WRONG, phase=2), right, saying(WRONG, phase=3))
    expected = 0.1 * CrossEntropy()(STUDENT, teacher, LABELS) + 0.9 * SoftTargets()(STUDENT, Outputs(right), LABELS)
    assert Oracle()(STUDENT, teacher, LABELS).item() == pytest.approx(expected.item(), rel=1e-12)
    assert Oracle()(STUDENT, Outputs(right), LABELS).item() == pytest.approx(expected.item(), rel=1e-12)


def test_the_order_of_the_members_does_not_matter():
    members = [saying([0, 2, 2, 0], phase=1), saying(RIGHT, phase=2), saying([4, 1, 2, 2], phase=3)]
    found = Oracle()(STUDENT, ensemble(*members), LABELS).item()
    assert Oracle()(STUDENT, ensemble(*members[::-1]), LABELS).item() == pytest.approx(found, rel=1e-12)


def test_a_wrong_member_has_no_influence_and_a_right_one_has():
    right, wrong = saying(RIGHT, phase=1), saying(WRONG, phase=2)
    found = Oracle()(STUDENT, ensemble(right, wrong), LABELS)
    moved = wrong + 0.3 * wave(4, 5, phase=7)
    assert (moved.argmax(1) == wrong.argmax(1)).all()
    assert torch.equal(Oracle()(STUDENT, ensemble(right, moved), LABELS), found)
    # Nor where its confidence is beyond all bounds, or it rules the label out and its divergence is no number.
    assert torch.equal(Oracle()(STUDENT, ensemble(right, 1e30 * wrong), LABELS), found)
    ruled_out = wrong.scatter(1, LABELS[:, None], -math.inf)
    assert torch.equal(Oracle()(STUDENT, Outputs(right, members=(Outputs(right), Outputs(ruled_out))), LABELS), found)
    assert not torch.equal(Oracle()(STUDENT, ensemble(right + 0.3 * wave(4, 5, phase=7), wrong), LABELS), found)


def test_it_is_the_mean_of_losses_and_not_the_loss_of_the_mean():
    one, other = saying(RIGHT, phase=1), saying(RIGHT, phase=2)
    found = Oracle(share=1.0, temperature=1.0)(STUDENT, ensemble(one, other), LABELS).item()
    each = [SoftTargets(temperature=1.0)(STUDENT, Outputs(z), LABELS).item() for z in (one, other)]
    mean = ((one.softmax(1) + other.softmax(1)) / 2).log()
    of_mean = SoftTargets(temperature=1.0)(STUDENT, Outputs(mean), LABELS).item()
    assert found == pytest.approx(sum(each) / 2, rel=1e-12)
    assert found > of_mean + 1e-3


def test_labels_left_out_count_for_nothing():
    teacher = ensemble(saying(RIGHT, phase=1))
    labels = torch.tensor([0, -100, 2, -100])
    rows = [0, 2]
    small = ensemble(saying(RIGHT, phase=1)[rows])
    expected = Oracle()(Outputs(STUDENT.logits[rows]), small, labels[rows]).item()
    assert Oracle()(STUDENT, teacher, labels).item() == pytest.approx(expected, rel=1e-12)
    assert Oracle()(STUDENT, teacher, torch.full((4,), -100)).item() == 0


def test_maps_are_compared_position_by_position():
    student, teacher, labels = example(dense=True)
    flat = [o.logits.movedim(1, -1).flatten(0, 2) for o in (student, teacher)]
    expected = Oracle()(Outputs(flat[0]), Outputs(flat[1]), labels.flatten()).item()
    assert Oracle()(student, teacher, labels).item() == pytest.approx(expected, rel=1e-12)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="share"):
        Oracle(share=1.1)
    with pytest.raises(ValueError, match="temperature"):
        Oracle(temperature=0.0)
    with pytest.raises(ValueError, match=r"teacher's member's \(4, 3\)"):
        Oracle()(STUDENT, Outputs(STUDENT.logits, members=(Outputs(wave(4, 3)),)), LABELS)
