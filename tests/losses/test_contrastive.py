import math

import numpy as np
import pytest
import torch

from kdnas.losses.example import example, fill, wave
from kdnas.losses.relation.contrastive import Contrastive
from kdnas.outputs import Moment, Outputs

STUDENT, TEACHER, LABELS = example()


def prepared(**options):
    loss = Contrastive(**{"dims": 6, "temperature": 0.5} | options)
    loss.prepare(STUDENT, TEACHER)
    return fill(loss.double())


def embedded(loss, student=STUDENT, teacher=TEACHER):
    rows = []
    for outputs, head in zip((student, teacher), loss.heads, strict=True):
        row = outputs.features[-1].numpy().mean((2, 3)) @ head.weight.detach().numpy().T
        rows.append(row / np.linalg.norm(row, axis=1, keepdims=True))
    return rows


def direction(anchors, positives, negatives, temperature=0.5, dims=6):
    """Mean over anchors; `negatives` has a list of rows for each."""
    total = 0.0
    for anchor, positive, rows in zip(anchors, positives, negatives, strict=True):
        shift = math.log(len(rows)) + 1 / (2 * dims * temperature**2)
        chance = [1 / (1 + math.exp(shift - anchor @ row / temperature)) for row in (positive, *rows)]
        total -= math.log(chance[0]) + sum(math.log(1 - h) for h in chance[1:])
    return total / len(anchors)


def others(rows):
    return [[row for j, row in enumerate(rows) if j != i] for i in range(len(rows))]


def test_without_ids_the_negatives_are_the_rest_of_the_batch():
    loss = prepared()
    u, v = embedded(loss)
    expected = direction(u, v, others(v)) + direction(v, u, others(u))
    assert loss(STUDENT, TEACHER, LABELS).item() == pytest.approx(expected, rel=1e-6)


def test_with_ids_positives_and_negatives_come_from_the_memories():
    loss = prepared(momentum=0.5)
    first = Moment(ids=torch.tensor([5, 2, 9, 0]))
    u, v = embedded(loss)
    expected = direction(u, v, others(v)) + direction(v, u, others(u))
    assert loss(STUDENT, TEACHER, LABELS, first).item() == pytest.approx(expected, rel=1e-6)

    turned = [
        o._replace(features=tuple(f.flip(0) * wave(*f.shape[1:], phase=3) for f in o.features))
        for o in (STUDENT, TEACHER)
    ]
    more = Moment(0.1, ids=torch.tensor([5, 2, 7, 8]))
    u_now, v_now = embedded(loss, *turned)
    # Four rows moved half-way to themselves, so unchanged; 7 and 8 are new and start as they are now.
    ours, theirs = ({5: a[0], 2: a[1], 9: a[2], 0: a[3], 7: b[2], 8: b[3]} for a, b in ((u, u_now), (v, v_now)))
    rest = [[i for i in ours if i != j] for j in (5, 2, 7, 8)]
    expected = 0.0
    for anchors, memory in ((u_now, theirs), (v_now, ours)):
        positives = [memory[j] for j in (5, 2, 7, 8)]
        expected += direction(anchors, positives, [[memory[i] for i in ids] for ids in rest])
    assert loss(*turned, LABELS, more).item() == pytest.approx(expected, rel=1e-6)
    row = 0.5 * u[0] + 0.5 * u_now[0]
    np.testing.assert_allclose(loss.students.rows[5].numpy(), row / np.linalg.norm(row), rtol=1e-6)
    assert loss.students.is_known.nonzero().flatten().tolist() == [0, 2, 5, 7, 8, 9]


def test_a_step_draws_its_negatives_and_repeats_them():
    loss, at = prepared(num_negatives=2), Moment(0.25, ids=torch.arange(4))
    loss(STUDENT, TEACHER, LABELS, at)
    with torch.no_grad():
        same = [loss(STUDENT, TEACHER, LABELS, at).item() for _ in range(2)]
        values = {loss(STUDENT, TEACHER, LABELS, Moment(p, ids=at.ids)).item() for p in (0.25, 0.5, 0.75, 0.8, 0.9)}
    assert same[0] == same[1] and len(values) > 1


def test_evaluation_moves_no_memory():
    loss, at = prepared(), Moment(ids=torch.arange(4))
    loss(STUDENT, TEACHER, LABELS, at)
    rows = loss.students.rows.clone()
    turned = STUDENT.map(lambda x: x.flip(0))
    with torch.no_grad():
        loss(turned, TEACHER, LABELS, at)
    assert torch.equal(rows, loss.students.rows)
    loss(turned, TEACHER, LABELS, at)
    assert not torch.equal(rows, loss.students.rows)


def test_a_checkpoint_brings_the_memories_back_whatever_their_length():
    loss, at = prepared(), Moment(0.5, ids=torch.tensor([3, 1, 4, 11]))
    loss(STUDENT, TEACHER, LABELS, at)
    restored = prepared()
    restored.load_state_dict(loss.state_dict())
    assert len(restored.students.rows) == 12
    assert torch.equal(restored(STUDENT, TEACHER, LABELS, at), loss(STUDENT, TEACHER, LABELS, at))


def test_both_heads_learn():
    loss = prepared()
    loss(STUDENT, TEACHER, LABELS, Moment(ids=torch.arange(4))).backward()
    assert all(head.weight.grad.any() for head in loss.heads)


def test_faults_are_named():
    with pytest.raises(ValueError, match="not prepared"):
        Contrastive()(STUDENT, TEACHER, LABELS)
    with pytest.raises(ValueError, match="one per sample, got 3 for a batch of 4"):
        prepared()(STUDENT, TEACHER, LABELS, Moment(ids=torch.arange(3)))
    with pytest.raises(
        ValueError, match=r"`ids` must be the samples' indices from 0 on, below .* got 10000000000003. Num"
    ):
        prepared()(STUDENT, TEACHER, LABELS, Moment(ids=torch.arange(4) + 10**13))
    with pytest.raises(ValueError, match="`momentum` must be in"):
        Contrastive(momentum=1.0)
    alone = [Outputs(o.logits[:1], tuple(f[:1] for f in o.features)) for o in (STUDENT, TEACHER)]
    assert prepared()(*alone, LABELS[:1]).item() == 0
