import math

import numpy as np
import pytest
import torch

from kdnas.losses.example import example, fill, wave
from kdnas.losses.relation._singular_vectors import leading_vectors
from kdnas.losses.relation.multi_head_graph import MultiHeadGraph
from kdnas.outputs import Outputs


def prepared(**options):
    student, teacher, labels = example()
    loss = MultiHeadGraph(**options)
    loss.prepare(student, teacher)
    fill(loss.double())
    return loss, student, teacher, labels


def first_vectors(maps, like=None):
    found = []
    for b, one in enumerate(maps):
        _, s, v = np.linalg.svd(one.reshape(len(one), -1).T)
        if like is None:
            found.append(v[0] * np.sign(v[0][np.abs(v[0]).argmax()]))
        else:
            v = v[: min(4, (s > 1e-5 * s[0]).sum())]
            cosines = v @ like[b]
            best = np.abs(cosines).argmax()
            found.append(v[best] * np.sign(cosines[best]))
    return np.array(found)


def normed(x, linear, norm):
    weight, scale, shift = (p.detach().numpy() for p in (linear.weight, norm.weight, norm.bias))
    mean, variance = norm.running_mean.numpy(), norm.running_var.numpy()
    return (x @ weight.T - mean) / np.sqrt(variance + 1e-5) * scale + shift


def row_softmax(row):
    row = np.exp(row - row.max())
    return row / row.sum()


def test_it_agrees_with_loops_over_numpys_decomposition():
    loss, student, teacher, labels = prepared()
    adapted = [
        np.einsum("tc,bchw->bthw", loss.taps.adapters[str(i)].weight.detach().numpy(), f.numpy())
        for i, f in enumerate(student.features)
    ]
    target = [first_vectors(f.numpy()) for f in teacher.features]
    mine = [first_vectors(f, like=t) for f, t in zip(adapted, target, strict=True)]
    heads, num_heads, width = loss.heads[0], 8, (4 + 8) // 2
    expected = 0.0
    graphs = []
    for first, second in (mine, target):
        keys, queries = normed(second, heads.key, heads.key_norm), normed(first, heads.query, heads.query_norm)
        graphs.append(
            [
                [row_softmax(np.array([math.tanh(k[cut] @ q[cut]) for q in queries])) for k in keys]
                for cut in (slice(h * width, (h + 1) * width) for h in range(num_heads))
            ]
        )
    for p_head, q_head in zip(*graphs, strict=True):
        for p, q in zip(p_head, q_head, strict=True):
            expected += sum(b * math.log(b / a) for a, b in zip(p, q, strict=True)) / (num_heads * len(labels))
    assert float(loss(student, teacher, labels).detach()) == pytest.approx(expected, rel=1e-7)
    assert MultiHeadGraph.golden == pytest.approx(expected, rel=1e-7)


def test_a_value_worked_by_hand():
    # One channel, positive maps: every vector is (1). Two heads of width 1.
    ones = torch.ones(2, 1, 1, 1)
    student = Outputs(torch.zeros(2, 2), (ones, ones))
    loss = MultiHeadGraph(num_heads=2)
    loss.prepare(student, student)
    fill(loss)
    # All samples alike: the graph of each network is constant, its softmax 1/2, the divergence 0.
    assert float(loss(student, student, torch.zeros(2)).detach()) == 0
    # Sample 0 of the student is dead: its vector is 0. G = k q v' v, where k, q are the heads' scaled weights.
    dead = torch.stack([torch.zeros(1, 1, 1), torch.ones(1, 1, 1)])
    student = student._replace(features=(dead, dead))
    with torch.no_grad():
        for p in loss.parameters():
            p.fill_(1.0)
        for norm in (loss.heads[0].key_norm, loss.heads[0].query_norm):
            norm.bias.zero_()
    found = float(loss(student, Outputs(torch.zeros(2, 2), (ones, ones)), torch.zeros(2)).detach())
    # Teacher's rows (1/2, 1/2); student's row 0 the same, row 1 softmax(0, tanh 1 / (1 + 1e-5)).
    p = row_softmax(np.array([0.0, math.tanh(1 / (1 + 1e-5))]))
    assert found == pytest.approx((0 + sum(0.5 * math.log(0.5 / x) for x in p)) / 2, rel=1e-4)


def test_it_does_not_depend_on_the_signs_the_decomposition_gives(monkeypatch):
    loss, student, teacher, labels = prepared()
    plain, prepared_plain = float(loss(student, teacher, labels).detach()), []
    loss.num_prepared.zero_()
    prepared_plain = float(loss.preparation(teacher).detach())
    eigh = torch.linalg.eigh
    generator = torch.Generator().manual_seed(0)

    def flipped(matrix):
        values, vectors = eigh(matrix)
        return values, vectors * (torch.randint(2, vectors[:, :1].shape, generator=generator) * 2 - 1)

    monkeypatch.setattr(torch.linalg, "eigh", flipped)
    again = MultiHeadGraph()
    again.prepare(student, teacher)
    fill(again.double())
    assert float(again(student, teacher, labels).detach()) == pytest.approx(plain, rel=1e-10)
    assert float(again.preparation(teacher).detach()) == pytest.approx(prepared_plain, rel=1e-10)


def test_preparation_trains_the_heads_alone_and_the_transfer_the_adapter_alone():
    loss, student, teacher, labels = prepared()
    loss.preparation(teacher).backward()
    assert all((p.grad is not None) == name.startswith("heads") for name, p in loss.named_parameters())
    loss.zero_grad()
    statistics = loss.heads[0].key_norm.running_mean.clone()
    loss(student, teacher, labels).backward()
    assert all((p.grad is not None) == name.startswith("taps") for name, p in loss.named_parameters())
    assert torch.equal(statistics, loss.heads[0].key_norm.running_mean)


def test_preparation_is_one_minus_the_estimates_cosine():
    loss, _, teacher, _ = prepared(num_heads=1)  # one head is never dropped
    heads = loss.heads[0]
    first, second = (leading_vectors(f, 1)[1][..., 0].numpy() for f in teacher.features)

    def batch_normed(x, linear, norm):
        x = x @ linear.weight.detach().numpy().T
        x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
        return x * norm.weight.detach().numpy() + norm.bias.detach().numpy()

    graph = batch_normed(second, heads.key, heads.key_norm) @ batch_normed(first, heads.query, heads.query_norm).T
    values = np.maximum(batch_normed(first, heads.value, heads.value_norm), 0)
    mixed = np.array([row_softmax(row) for row in graph]) @ values
    estimate = mixed @ heads.out.weight.detach().numpy().T + heads.out.bias.detach().numpy()
    estimate /= np.linalg.norm(estimate, axis=1, keepdims=True)
    expected = 1 - np.mean([e @ v for e, v in zip(estimate, second, strict=True)])
    assert float(loss.preparation(teacher).detach()) == pytest.approx(expected, rel=1e-9)


def test_the_dropped_heads_follow_from_the_seed_and_the_step():
    def three(seed):
        loss, _, teacher, _ = prepared(seed=seed)
        return [float(loss.preparation(teacher).detach()) for _ in range(3)]

    values = three(0)
    assert len(set(values)) == 3  # each step drops others
    torch.randn(7)  # the global generator plays no part
    assert three(0) == values
    assert three(1) != values


def test_the_next_step_of_a_restored_preparation_is_the_same():
    loss, student, teacher, _ = prepared()
    loss.preparation(teacher)
    restored = MultiHeadGraph()
    restored.prepare(student, teacher)
    restored.double().load_state_dict(loss.state_dict())
    assert torch.equal(loss.preparation(teacher), restored.preparation(teacher))


def test_a_batch_of_one_prepares_nothing_but_keeps_a_graph():
    loss, _, teacher, _ = prepared()
    value = loss.preparation(teacher.map(lambda x: x[:1]))
    value.backward()
    assert float(value.detach()) == 0


def test_preparation_sees_the_maps_at_the_size_of_the_transfer():
    student, teacher, _ = example()
    loss = MultiHeadGraph()
    loss.prepare(student._replace(features=tuple(f[..., :2, :2] for f in student.features)), teacher)
    assert [tuple(size) for size in loss._sizes] == [(2, 2), (2, 2)]


def test_stages_and_errors():
    assert [(s.trains, s.uses) for s in MultiHeadGraph().stages()] == [("parts", "preparation"), ("both", "both")]
    assert len(MultiHeadGraph(staged=False).stages()) == 1
    with pytest.raises(ValueError, match="`num_heads` must be at least 1, got 0"):
        MultiHeadGraph(num_heads=0)
    maps = (wave(2, 3, 4, 4), wave(2, 3, 4, 4))
    outputs = Outputs(torch.zeros(2, 2), maps)
    with pytest.raises(ValueError, match=r"Call loss\.prepare"):
        MultiHeadGraph()(outputs, outputs, torch.zeros(2))
