import math

import numpy as np
import pytest
import torch

from kdnas.losses.example import example, wave
from kdnas.losses.response.cross_entropy import CrossEntropy
from kdnas.outputs import Outputs


def test_two_classes_by_hand():
    # p = (3/4, 1/4): -log(3/4) for class 0 and -log(1/4) for class 1, mean 0.837.
    logits = torch.tensor([[3.0, 1.0], [3.0, 1.0]]).log()
    loss = CrossEntropy()(Outputs(logits), Outputs(logits), torch.tensor([0, 1]))
    assert loss.item() == pytest.approx((math.log(4 / 3) + math.log(4)) / 2)


def test_smoothing_by_hand():
    # Target (0.9, 0.1): a share of 0.2 is spread over both classes.
    logits = torch.tensor([[3.0, 1.0]]).log()
    loss = CrossEntropy(label_smoothing=0.2)(Outputs(logits), Outputs(logits), torch.tensor([0]))
    assert loss.item() == pytest.approx(0.9 * math.log(4 / 3) + 0.1 * math.log(4))


def test_agrees_with_a_loop_and_with_golden():
    student, teacher, labels = example()
    total = 0.0
    for row, label in zip(student.logits.numpy(), labels.tolist(), strict=True):
        total -= row[label] - np.log(np.exp(row).sum())
    value = CrossEntropy()(student, teacher, labels).item()
    assert value == pytest.approx(total / 4, rel=1e-12)
    assert value == pytest.approx(CrossEntropy.golden, rel=1e-12)


def test_left_out_labels_do_not_count():
    student, teacher, labels = example()
    some = labels.clone()
    some[2:] = -100
    first = Outputs(student.logits[:2])
    assert torch.equal(CrossEntropy()(student, teacher, some), CrossEntropy()(first, teacher, labels[:2]))


def test_no_labels_at_all_is_a_connected_zero():
    logits = wave(2, 3).requires_grad_()
    loss = CrossEntropy()(Outputs(logits), Outputs(logits.detach()), torch.tensor([-100, -100]))
    loss.backward()
    assert loss.item() == 0 and logits.grad.abs().max() == 0


def test_dense_logits_average_over_positions():
    logits, labels = wave(2, 3, 4, 5), torch.arange(40).reshape(2, 4, 5) % 3
    dense = CrossEntropy()(Outputs(logits), Outputs(logits), labels)
    rows = logits.movedim(1, -1).reshape(-1, 3)
    assert dense.item() == pytest.approx(CrossEntropy()(Outputs(rows), Outputs(rows), labels.flatten()).item())


def test_the_teacher_may_know_other_classes():
    CrossEntropy().prepare(Outputs(wave(2, 3)), Outputs(wave(2, 1000)))


def test_smoothing_outside_a_share_is_refused():
    with pytest.raises(ValueError, match="`label_smoothing` must be in"):
        CrossEntropy(label_smoothing=1.0)
