import numpy as np
import pytest
import torch

from kdnas.losses.example import example, fill, wave
from kdnas.losses.feature.aggregation import Aggregation
from kdnas.losses.feature.feature_mse import FeatureMse
from kdnas.outputs import Moment, Outputs

LABELS = torch.tensor([0, 1, 0, 1])


def networks():
    """A student of one stage, and a teacher of three layers in it."""
    student = Outputs(wave(4, 2), (wave(4, 3, 4, 6),))
    return student, Outputs(wave(4, 2), tuple(wave(4, 5, 4, 6, phase=i) for i in range(1, 4)))


def prepared(student, teacher, **arguments):
    loss = Aggregation(**arguments)
    loss.prepare(student, teacher)
    return fill(loss.double())


def softmax(x):
    return np.exp(x) / np.exp(x).sum()


def reference(loss, student, teacher, rest=None, labels=LABELS, student_to_teacher=1.0, teacher_to_student=1.0):
    total = 0.0
    for index, (i, members) in enumerate(loss.groups):
        alpha = softmax(loss.betas[index].detach().numpy())
        forth, back = (m[index].weight.detach().numpy() for m in (loss.to_teacher, loss.to_student))
        s = student.features[i].numpy()
        mixed = sum(a * teacher.features[j].numpy() for a, j in zip(alpha, members, strict=True))
        squares = []
        for b, y, x in np.ndindex(len(s), *s.shape[2:]):
            squares.extend((forth[:, : s.shape[1]] @ s[b, :, y, x] - mixed[b, :, y, x]) ** 2)
        hint = np.mean(squares)
        if rest is None:
            total += hint
            continue
        fed = np.einsum("oc,bchw->bohw", back, mixed)
        logits = rest(i, torch.from_numpy(fed)).numpy()
        entropy = -np.mean([np.log(softmax(row)[label]) for row, label in zip(logits, labels, strict=True)])
        total += student_to_teacher * hint + teacher_to_student * entropy
    return total


def classifier(stage, features):
    return features.mean((2, 3)) @ wave(features.shape[1], 2, phase=stage)


def test_two_layers_by_hand():
    # Proportions 1/4 and 3/4 of 4 and 8 make 7; the student's 5 through the identity misses by 2.
    one = torch.ones(1, 1, 1, 1)
    student, teacher = Outputs(torch.zeros(1, 2), (5 * one,)), Outputs(torch.zeros(1, 2), (4 * one, 8 * one))
    loss = Aggregation(groups=((0, (0, 1)),), student_to_teacher=0.5, teacher_to_student=3.0)
    loss.prepare(student, teacher)
    loss.betas[0].data = torch.tensor([0.0, np.log(3.0)])
    assert loss(student, teacher, LABELS[:1]).item() == pytest.approx(4)
    # The rest gives its map and 0 as logits: 7 against 0, label 0.
    at = Moment(remaining=lambda stage, features: torch.cat([features.flatten(1), 0 * features.flatten(1)], 1))
    expected = 0.5 * 4 + 3 * np.log1p(np.exp(-7))
    assert loss(student, teacher, LABELS[:1], at).item() == pytest.approx(expected, rel=1e-5)


def test_agrees_with_a_loop_in_both_stages():
    student, teacher = networks()
    loss = prepared(student, teacher, student_to_teacher=0.7, teacher_to_student=0.2)
    assert loss.groups == ((0, (0, 1, 2)),)
    assert loss(student, teacher, LABELS).item() == pytest.approx(reference(loss, student, teacher), rel=1e-12)
    expected = reference(loss, student, teacher, classifier, LABELS, 0.7, 0.2)
    assert loss(student, teacher, LABELS, Moment(remaining=classifier)).item() == pytest.approx(expected, rel=1e-12)


def test_all_the_weight_on_one_layer_is_the_plain_hint():
    student, teacher = networks()
    loss = prepared(student, teacher)
    loss.betas[0].data = torch.tensor([0.0, 0.0, 1e4], dtype=torch.float64)
    hint = FeatureMse(taps=((0, 2),))
    hint.prepare(student, teacher)
    hint.double().taps.adapters["0"].weight.data = loss.to_teacher[0].weight.data
    assert loss(student, teacher, LABELS).item() == pytest.approx(hint(student, teacher, LABELS).item(), rel=1e-12)


def test_proportions_start_equal_and_sum_to_one():
    student, teacher = networks()
    loss = Aggregation()
    loss.prepare(student, teacher)
    assert loss.alpha()[0].tolist() == pytest.approx([1 / 3] * 3)
    assert all(a.sum().item() == pytest.approx(1) for a in prepared(student, teacher).alpha())


def test_the_proportions_learn_from_both_paths_in_the_search_and_stand_still_after():
    student, teacher = networks()
    gradients = []
    for paths in ({"student_to_teacher": 0.0}, {"teacher_to_student": 0.0}):
        loss = prepared(student, teacher, **paths)
        loss(student, teacher, LABELS, Moment(remaining=classifier)).backward()
        gradients.append(loss.betas[0].grad)
        assert loss.betas[0].grad.abs().max() > 0
    assert not torch.allclose(*gradients)
    loss = prepared(student, teacher)
    loss(student, teacher, LABELS).backward()
    assert loss.betas[0].grad is None and loss.to_teacher[0].weight.grad.abs().max() > 0


def test_without_the_path_through_the_student_the_easiest_layer_wins():
    # The first teacher layer is the student's own map: the hint alone learns to ask for nothing else.
    same = wave(4, 3, 4, 6)
    student = Outputs(wave(4, 2), (same,))
    teacher = Outputs(wave(4, 2), (same, wave(4, 3, 4, 6, phase=2)))

    def learnt(share):
        loss = Aggregation(teacher_to_student=share)
        loss.prepare(student, teacher)
        loss.double()
        at = Moment(remaining=lambda stage, features: 10 * classifier(stage, features - same))
        labels = classifier(0, teacher.features[1] - same).argmax(1)
        optimizer = torch.optim.Adam(loss.betas.parameters(), 0.2)
        for _ in range(60):
            optimizer.zero_grad()
            loss(student, teacher, labels, at).backward()
            optimizer.step()
        return loss.alpha()[0][0].item()

    assert learnt(0.0) > 0.95
    assert learnt(10.0) < 0.5


def test_a_narrower_student_is_fed_its_own_width():
    student, teacher = networks()
    loss = prepared(student, teacher)
    widths = []

    def remaining(stage, features):
        widths.append(tuple(features.shape[1:]))
        return features.mean((2, 3))[:, :2]

    narrow = student._replace(features=(student.features[0][:, :2, :2],))
    assert loss(narrow, teacher, LABELS, Moment(remaining=remaining)).isfinite()
    assert widths == [(2, 2, 6)]


def test_groups_by_resolution():
    sizes = [(8, 8), (8, 8), (4, 4), (4, 4), (4, 4), (2, 2)]
    channels = [4, 8, 16, 16, 16, 32]
    teacher = Outputs(wave(2, 2), tuple(wave(2, c, *s) for c, s in zip(channels, sizes, strict=True)))
    student = Outputs(wave(2, 2), tuple(wave(2, 3, *s) for s in ((8, 8), (8, 8), (4, 4), (1, 1))))
    loss = Aggregation()
    loss.prepare(student, teacher)
    # The first teacher layer has other channels than the second and is left out.
    assert loss.groups == ((1, (1,)), (2, (2, 3, 4)), (3, (5,)))


def test_search_then_distil():
    assert [s.name for s in Aggregation().stages()] == ["search", "distil"]
    assert len(Aggregation(staged=False).stages()) == 1


def test_what_does_not_fit_is_refused():
    student, teacher, labels = example()
    with pytest.raises(ValueError, match="prepare"):
        Aggregation()(student, teacher, labels)
    with pytest.raises(ValueError, match=r"equal channels.*\(4, 8, 6\).*\(8, 4, 3\)"):
        Aggregation(groups=((0, (0, 1)),)).prepare(student, teacher)
    with pytest.raises(ValueError, match="`groups` must name teacher stages 0 to 1, got 2"):
        Aggregation(groups=((0, (2,)),)).prepare(student, teacher)
    for groups in ("order", ()):
        with pytest.raises(ValueError, match="`groups` must be"):
            Aggregation(groups=groups)
    last = Aggregation(groups=((-1, (-1,)),))
    last.prepare(student, teacher)
    assert last.groups == ((1, (1,)),)
