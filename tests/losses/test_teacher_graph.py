import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch

from kdnas.losses.example import example, fill, wave
from kdnas.losses.relation.teacher_graph import TeacherGraph, _convolve, _Sketch
from kdnas.outputs import Outputs


def ensemble(num_members=3):
    """A student, an ensemble's outputs with members, and labels."""
    student, teacher, labels = example()
    members = tuple(
        Outputs(3 * wave(4, 5, phase=10 + m), (wave(4, 4 + m, 4, 3, phase=20 + m),)) for m in range(num_members)
    )
    return student, teacher._replace(members=members), labels


def prepared(student, teacher, **options):
    loss = TeacherGraph(**options)
    loss.prepare(student, teacher)
    return fill(loss.double())


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def unit(x):
    return x / np.linalg.norm(x)


def mmd(x, y, spread):
    def kernel(a, b):
        return np.mean([np.exp(-((a - b) ** 2).sum() / (2 * f * spread)) for f in (0.25, 0.5, 1, 2, 4)])

    def mean(p, q):
        return np.mean([[kernel(a, b) for b in q] for a in p])

    return mean(x, x) + mean(y, y) - 2 * mean(x, y)


def logits_graph(student, members, weights, temperature=4.0):
    total = 0.0
    for b in range(len(student.logits)):
        p = softmax(student.logits[b].numpy() / temperature)
        for weight, member in zip(weights, members, strict=True):
            q = softmax(member.logits[b].numpy() / temperature)
            total += weight * np.abs(p - q).sum() / 2
    return temperature * total / len(student.logits)


def sketch(module, x):
    result = np.zeros(module.dims)
    for value, place, sign in zip(x, module.place.tolist(), module.sign.tolist(), strict=True):
        result[place] += sign * value
    return result


def circular_convolution(x, y):
    n = len(x)
    return np.array([sum(x[i] * y[(k - i) % n] for i in range(n)) for k in range(n)])


def representation_graph(loss, student, members, edges):
    pooled = [m.features[-1].mean((2, 3)).numpy() for m in members]
    pooled = pooled * 2 if len(pooled) == 1 else pooled
    mine = student.features[-1].mean((2, 3)).numpy()
    total = 0.0
    pairs = [(j, k) for j in range(len(pooled)) for k in range(j + 1, len(pooled))]
    for projection, edge, (j, k) in zip(loss.projections, edges, pairs, strict=True):
        fused = []
        for a, b in zip(pooled[j], pooled[k], strict=True):
            a, b = unit(a), unit(b)
            if loss.fusion == "bilinear":
                joint = np.outer(a, b).ravel()
            elif loss.fusion == "concatenation":
                joint = np.concatenate([a, b])
            else:
                joint = circular_convolution(sketch(loss.sketches[j], a), sketch(loss.sketches[k], b))
            # The square root would blow up what the Fourier transform leaves of an exact 0.
            joint = np.where(np.abs(joint) < 1e-14, 0, joint)
            fused.append(unit(np.sign(joint) * np.sqrt(np.abs(joint))))
        own = [unit(projection.weight.detach().numpy() @ x) for x in mine]
        spread = np.mean([[((a - b) ** 2).sum() for b in fused] for a in fused])
        total += edge * mmd(own, fused, spread)
    return total


def test_its_golden_value_agrees_with_loops():
    student, teacher, labels = example()
    loss = prepared(student, teacher)
    expected = logits_graph(student, [teacher], [1.0]) + representation_graph(loss, student, [teacher], [1.0])
    assert float(loss(student, teacher, labels).detach()) == pytest.approx(expected, rel=1e-6)
    assert TeacherGraph.golden == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("fusion", ["compact_bilinear", "bilinear", "concatenation"])
def test_three_teachers_agree_with_loops(fusion):
    student, teacher, labels = ensemble()
    loss = prepared(student, teacher, fusion=fusion, edges=(1.0, 2.0, 1.0), dims=64)
    edges = np.array([2.0, 1.0, 2.0]) / 5  # products of the teachers' weights, summing to 1
    expected = logits_graph(student, teacher.members, [0.25, 0.5, 0.25])
    expected += representation_graph(loss, student, teacher.members, edges)
    assert float(loss(student, teacher, labels).detach()) == pytest.approx(expected, rel=1e-6)


def test_a_value_worked_by_hand():
    # p_s = (1/2, 1/2), teachers (3/4, 1/4) and (1/4, 3/4): both 1/4 away.
    student = Outputs(torch.zeros(1, 2), (torch.ones(1, 2),))
    members = tuple(Outputs(torch.tensor([p]).log(), (torch.ones(1, 2),)) for p in ([0.75, 0.25], [0.25, 0.75]))
    teacher = members[0]._replace(members=members)
    loss = TeacherGraph(temperature=1.0, representation_weight=0.0)
    loss.prepare(student, teacher)
    assert float(loss(student, teacher, torch.zeros(1)).detach()) == pytest.approx(0.25)


def test_the_distances_are_earth_movers_distances():
    p, q = softmax(wave(5).numpy()), softmax(3 * wave(5, phase=1).numpy())
    line = scipy.stats.wasserstein_distance(range(5), range(5), p, q)
    # The cheapest plan between p and q, every two classes 1 apart.
    cost = 1 - np.eye(5).ravel()
    rows, columns = np.kron(np.eye(5), np.ones(5)), np.kron(np.ones(5), np.eye(5))
    plan = scipy.optimize.linprog(cost, A_eq=np.vstack([rows, columns]), b_eq=np.concatenate([p, q]))
    a, b = torch.tensor(p)[None, None], torch.tensor(q)[None, None]
    assert float(TeacherGraph(distance="ordered")._distance(a, b)) == pytest.approx(line)
    assert float(TeacherGraph()._distance(a, b)) == pytest.approx(plan.fun)


def test_compact_bilinear_pooling_keeps_inner_products():
    # The sketch of an outer product has the inner product <x, x'> <y, y'> on average over hashes.
    x, y, u, v = wave(4, 6)
    exact = float((x @ u) * (y @ v))
    found = []
    for seed in range(200):
        one, other = _Sketch(6, 256, f"{seed}/0").double(), _Sketch(6, 256, f"{seed}/1").double()
        found.append(float((_convolve(one(x[None]), other(y[None])) * _convolve(one(u[None]), other(v[None]))).sum()))
    assert np.mean(found) == pytest.approx(exact, abs=4 * np.std(found) / 200**0.5)


def test_confidence_weighs_each_sample_by_the_teachers_entropy():
    student, teacher, labels = ensemble(2)
    loss = prepared(student, teacher, edges="confidence", representation_weight=0.0, temperature=1.0)
    expected = 0.0
    for b in range(4):
        q = [softmax(m.logits[b].numpy()) for m in teacher.members]
        weights = softmax(np.array([-scipy.stats.entropy(x) for x in q]))
        p = softmax(student.logits[b].numpy())
        expected += sum(w * np.abs(p - x).sum() / 2 for w, x in zip(weights, q, strict=True)) / 4
    assert float(loss(student, teacher, labels).detach()) == pytest.approx(expected)


def test_a_member_of_weight_zero_is_as_good_as_absent_from_the_logits_graph():
    student, teacher, labels = ensemble(2)
    both = prepared(student, teacher, edges=(1.0, 0.0))
    alone = teacher.members[0]
    one = prepared(student, alone, representation_weight=0.0)
    assert float(both(student, teacher, labels).detach()) == pytest.approx(float(one(student, alone, labels).detach()))


def test_a_student_whose_projection_is_the_teachers_fusion_has_no_representation_loss():
    student, teacher, labels = ensemble(1)
    member = teacher.members[0]
    student = member._replace(
        features=(TeacherGraph(fusion="concatenation")._fuse([member.features[-1].mean((2, 3))])[0],)
    )
    loss = TeacherGraph(fusion="concatenation")
    loss.prepare(student, teacher)  # equal widths: the projection starts as the identity
    loss.double()
    assert float(loss(student, teacher, labels).detach()) == pytest.approx(0.0, abs=1e-12)


def test_wrong_options_are_refused():
    student, teacher, labels = ensemble(2)
    with pytest.raises(ValueError, match="one weight per teacher: 2 teachers, got 3"):
        TeacherGraph(edges=(1.0, 1.0, 1.0)).prepare(student, teacher)
    with pytest.raises(
        ValueError, match=r"`edges` must be one of equal, confidence or tuple\[float, ...\], got 'learnt'"
    ):
        TeacherGraph(edges="learnt")
    with pytest.raises(ValueError, match="`edges` must not be negative nor all 0"):
        TeacherGraph(edges=(0.0, 0.0))
    with pytest.raises(ValueError, match=r"Call loss\.prepare"):
        TeacherGraph()(student, teacher, labels)
