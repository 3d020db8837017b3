import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kdnas.losses.example import example, fill, wave
from kdnas.losses.relation.flow import Flow
from kdnas.outputs import Outputs

LABELS = torch.zeros(1, dtype=torch.int64)


def outputs(*maps):
    return Outputs(torch.zeros(len(maps[0]), 2, dtype=maps[0].dtype), maps)


def by_hand(pool="max", reduction="mean"):
    # f has channels (1 2) and (0 1), g is (1 0; 3 1): G = ((1 * 1 + 2 * 3) / 2, ...)
    f = torch.tensor([[[[1.0, 2.0]], [[0.0, 1.0]]]])
    g = torch.tensor([[[[1.0, 3.0]], [[0.0, 1.0]]]])
    student = outputs(f, g)  # G = ((3.5, 1), (1.5, 0.5))
    teacher = outputs(torch.zeros_like(f), g)  # G = 0
    return float(Flow(pool=pool, reduction=reduction)(student, teacher, LABELS))


def test_a_value_worked_by_hand():
    assert by_hand() == pytest.approx((3.5**2 + 1 + 1.5**2 + 0.5**2) / 4)


def test_the_papers_norm_sums_over_channels():
    assert by_hand(reduction="frobenius") == pytest.approx(3.5**2 + 1 + 1.5**2 + 0.5**2)


def gram(f, g, pool):
    (channels, h, w), (other, *_) = f.shape, g.shape
    window = {"max": np.max, "average": np.mean}[pool]
    step = (h // g.shape[1], w // g.shape[2])
    f = np.array(
        [
            [
                [
                    window(f[c, y * step[0] : (y + 1) * step[0], x * step[1] : (x + 1) * step[1]])
                    for x in range(g.shape[2])
                ]
                for y in range(g.shape[1])
            ]
            for c in range(channels)
        ]
    )
    result = np.zeros((channels, other))
    for i in range(channels):
        for j in range(other):
            for y in range(g.shape[1]):
                for x in range(g.shape[2]):
                    result[i, j] += f[i, y, x] * g[j, y, x] / (g.shape[1] * g.shape[2])
    return result


@pytest.mark.parametrize("pool", ["max", "average"])
def test_it_agrees_with_loops(pool):
    student, teacher, labels = example()
    loss = Flow(pool=pool)
    loss.prepare(student, teacher)
    fill(loss.double())
    adapted = [
        np.einsum("tc,bchw->bthw", loss.taps.adapters[str(i)].weight.detach().numpy(), f.numpy())
        for i, f in enumerate(student.features)
    ]
    target = [f.numpy() for f in teacher.features]
    expected = np.mean(
        [
            (gram(adapted[0][b], adapted[1][b], pool) - gram(target[0][b], target[1][b], pool)) ** 2
            for b in range(len(labels))
        ]
    )
    found = float(loss(student, teacher, labels).detach())
    assert found == pytest.approx(expected, rel=1e-12)
    if pool == "max":
        assert Flow.golden == pytest.approx(expected, rel=1e-12)


class Largest(TorchDispatchMode):
    """The most numbers any operation returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor):
            self.numel = max(self.numel, found.numel())
        return found


def test_its_peak_is_the_gram_matrix_not_a_cube_over_positions():
    maps = outputs(wave(2, 24, 10, 10).float(), wave(2, 24, 10, 10, phase=1).float())
    with Largest() as seen:
        Flow()(maps, maps, LABELS)
    assert seen.numel == max(2 * 24 * 24, 2 * 24 * 100)


def test_each_relation_has_its_weight():
    maps = [wave(2, 3, 4, 4, phase=p) for p in range(6)]
    student, teacher = outputs(*maps[:3]), outputs(*maps[3:])
    taps = ((0, 0), (1, 1), (2, 2))
    parts = [float(Flow(taps=taps[i : i + 2])(student, teacher, LABELS)) for i in range(2)]
    both = float(Flow(taps=taps, weights=(2.0, 3.0))(student, teacher, LABELS))
    assert both == pytest.approx(2 * parts[0] + 3 * parts[1])


def test_the_flow_comes_first_and_alone_then_the_task_alone():
    assert [(s.uses, s.trains) for s in Flow().stages()] == [("loss", "both"), ("task", "student")]
    assert [s.name for s in Flow(staged=False).stages()] == ["joint"]


def test_one_pair_of_stages_is_refused():
    one = outputs(wave(2, 3, 4, 4))
    with pytest.raises(ValueError, match="at least 2 pairs of stages, got 1"):
        Flow()(one, one, LABELS)
    with pytest.raises(ValueError, match="at least 2 pairs of stages, got 1"):
        Flow().prepare(one, one)


def test_wrong_options_are_refused():
    student, teacher, _ = example()
    with pytest.raises(ValueError, match=r"1 relations, got 2"):
        Flow(weights=(1.0, 2.0)).prepare(student, teacher)
    with pytest.raises(ValueError, match="`pool` must be one of max, average, got 'min'"):
        Flow(pool="min")
    with pytest.raises(ValueError, match="`reduction` must be one of mean, frobenius, got 'sum'"):
        Flow(reduction="sum")
