import numpy as np
import pytest
import torch

from kdnas.losses.example import example, wave
from kdnas.losses.feature.self_attention import SelfAttention
from kdnas.outputs import Outputs

LABELS = torch.zeros(1, dtype=torch.long)


def outputs(*features):
    return Outputs(torch.zeros(len(features[0]), 2), features)


def attention(feature, pool, p):
    size = np.abs(feature)
    return {"sum": size.sum(0), "sum_p": (size**p).sum(0), "max_p": size.max(0) ** p}[pool]


def interpolated(grid, height, width):
    """Bilinear, pixel centres at half-integers, edges repeated."""
    out = np.zeros((height, width))
    for y, x in np.ndindex(out.shape):
        place = [
            min(max((i + 0.5) * size / wanted - 0.5, 0), size - 1)
            for i, size, wanted in ((y, grid.shape[0], height), (x, grid.shape[1], width))
        ]
        (y0, x0), (fy, fx) = ([int(v) for v in place], [v - int(v) for v in place])
        y1, x1 = min(y0 + 1, grid.shape[0] - 1), min(x0 + 1, grid.shape[1] - 1)
        out[y, x] = (1 - fy) * ((1 - fx) * grid[y0, x0] + fx * grid[y0, x1]) + fy * (
            (1 - fx) * grid[y1, x0] + fx * grid[y1, x1]
        )
    return out


def reference(shallow, deep, pool, p, temperature, reduction):
    values = []
    for s, d in zip(shallow.numpy(), deep.numpy(), strict=True):
        own = attention(s, pool, p)
        maps = [np.exp(a / temperature) for a in (own, interpolated(attention(d, pool, p), *own.shape))]
        squares = (maps[0] / maps[0].sum() - maps[1] / maps[1].sum()) ** 2
        values.append(squares.mean() if reduction == "mean" else squares.sum())
    return np.mean(values)


def test_two_positions_by_hand():
    # Squares (log 3, 0) and (0, 0): softmax (3/4, 1/4) and (1/2, 1/2), squares 1/16 each.
    shallow = torch.tensor([np.log(3.0) ** 0.5, 0.0]).reshape(1, 1, 1, 2)
    student = outputs(shallow, torch.zeros(1, 5, 1, 2, dtype=torch.float64))
    for reduction, value in (("mean", 1 / 16), ("sum", 1 / 8)):
        assert SelfAttention(reduction=reduction)(student, student, LABELS).item() == pytest.approx(value)


@pytest.mark.parametrize("pool", ["sum", "sum_p", "max_p"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("p", "temperature"), [(2.0, 1.0), (3.0, 0.5)])
def test_agrees_with_a_loop(pool, reduction, p, temperature):
    student, teacher, labels = example()
    loss = SelfAttention(pool=pool, p=p, temperature=temperature, reduction=reduction)
    expected = reference(*student.features, pool, p, temperature, reduction)
    assert loss(student, teacher, labels).item() == pytest.approx(expected, rel=1e-10)


def test_adjacent_pairs_are_summed_and_pairs_can_be_named():
    maps = [wave(2, 3, size, size, phase=size) for size in (8, 4, 2)]
    student = outputs(*maps)

    def value(**arguments):
        return SelfAttention(**arguments)(student, student, LABELS).item()

    assert value() == pytest.approx(value(pairs=((0, 1),)) + value(pairs=((1, -1),)), rel=1e-12)


def test_only_the_shallower_map_gets_a_gradient_and_it_is_that_of_the_value():
    shallow, deep = wave(2, 3, 4, 6).requires_grad_(), wave(2, 5, 2, 3, phase=1).requires_grad_()
    loss = SelfAttention()
    loss(outputs(shallow, deep), outputs(shallow, deep), LABELS).backward()
    assert shallow.grad.abs().max() > 0 and deep.grad is None
    fixed = deep.detach()
    assert torch.autograd.gradcheck(lambda x: loss(outputs(x, fixed), outputs(x, fixed), LABELS), shallow)


def test_the_middle_of_three_stages_learns_as_the_shallower_only():
    first, middle, last = (wave(2, 3, 4, 4, phase=i) for i in range(3))
    loss = SelfAttention()
    gradients = []
    for student in (lambda x: outputs(first, x, last), lambda x: outputs(x, last)):
        x = middle.clone().requires_grad_()
        loss(student(x), student(x), LABELS).backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_the_teacher_is_not_read():
    student, _, labels = example()
    nothing = Outputs(student.logits)
    loss = SelfAttention()
    loss.prepare(student, nothing)
    assert loss(student, nothing, labels) == loss(student, student, labels)


def test_it_starts_late_unless_told_otherwise():
    task, joint = SelfAttention(start=0.6).stages()
    assert (task.uses, task.trains, joint.uses) == ("task", "student", "both")
    assert (task.share, joint.share) == (0.6, 0.4)
    assert len(SelfAttention(start=0).stages()) == 1


def test_arguments_are_checked():
    for arguments in (
        {"pairs": "all"},
        {"pairs": ()},
        {"pool": "mean"},
        {"p": 8},
        {"temperature": 0.0},
        {"reduction": "batch"},
        {"start": 1.0},
    ):
        with pytest.raises(ValueError, match=r"must|start is"):
            SelfAttention(**arguments)
    with pytest.raises(ValueError, match="at least 2 stages of the student, got 1"):
        SelfAttention().prepare(outputs(wave(2, 3, 4, 4)), outputs(wave(2, 3, 4, 4)))
    with pytest.raises(ValueError, match="stages 0 to 1"):
        SelfAttention(pairs=((0, 2),)).prepare(*example()[:2])
