import numpy as np
import pytest
import torch

from kdnas.losses.dense.holistic import Holistic
from kdnas.losses.example import example, fill, wave
from kdnas.outputs import Moment, Outputs


def prepared(images=True, **arguments):
    student, teacher, labels = example(dense=True)
    if not images:
        student, teacher = student._replace(images=None), teacher._replace(images=None)
    loss = Holistic(**arguments)
    loss.prepare(student, teacher)
    return fill(loss.double()), student, teacher, labels


def softmax(x, axis):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def convolve(x, layer, stride, padding):
    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    size = weight.shape[2]
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    rows, columns = ((n - size) // stride + 1 for n in x.shape[2:])
    out = np.empty((len(x), len(weight), rows, columns))
    for i in range(rows):
        for j in range(columns):
            patch = x[:, :, i * stride : i * stride + size, j * stride : j * stride + size]
            out[:, :, i, j] = np.tensordot(patch, weight, ((1, 2, 3), (1, 2, 3))) + bias
    return out


def judge(loss, x):
    parts = list(loss.discriminator)
    for index in (0, 2, 4):
        x = convolve(x, parts[index], 2, 1)
        x = np.where(x > 0, x, 0.1 * x)
    attention = parts[6]
    query, key, value = (
        convolve(x, layer, 1, 0).reshape(len(x), layer.weight.shape[0], -1)
        for layer in (attention.query, attention.key, attention.value)
    )
    weights = softmax(query.transpose(0, 2, 1) @ key, 2)
    x = x + attention.scale.item() * (value @ weights.transpose(0, 2, 1)).reshape(x.shape)
    return convolve(x, parts[7], 1, 0).mean((1, 2, 3))


def seen(logits, images):
    parts = [softmax(logits.numpy(), 1)]
    if images is not None:
        # 16x12 to 4x3: means over blocks of 4x4.
        parts.append(images.numpy().reshape(len(images), 3, 4, 4, 3, 4).mean((3, 5)))
    return np.concatenate(parts, 1)


@pytest.mark.parametrize("images", [True, False])
def test_the_student_minimises_its_negative_score(images):
    loss, student, teacher, labels = prepared(images, width=4)
    expected = -judge(loss, seen(student.logits, student.images)).mean()
    assert loss(student, teacher, labels).item() == pytest.approx(expected, rel=1e-10)


def test_golden():
    loss, student, _, _ = prepared()
    assert Holistic.golden == pytest.approx(-judge(loss, seen(student.logits, student.images)).mean(), rel=1e-10)


def test_the_discriminator_minimises_the_difference_and_the_penalty():
    loss, student, teacher, labels = prepared(width=3, penalty=3.0, seed=7)
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter *= 3  # far from linear, so that it matters where the slope is taken
    p, q = seen(student.logits, student.images), seen(teacher.logits, teacher.images)
    difference = judge(loss, p).mean() - judge(loss, q).mean()
    generator = torch.Generator().manual_seed(7)
    share = torch.rand(4, 1, 1, 1, generator=generator, dtype=torch.float64).numpy()
    between = share * q + (1 - share) * p
    penalty = 0.0
    for b in range(4):
        squares = 0.0
        for index in np.ndindex(5, 4, 3):  # the class probabilities, not the image
            moved = np.repeat(between[b : b + 1], 2, 0)
            moved[(0, *index)] += 1e-5
            moved[(1, *index)] -= 1e-5
            up, down = judge(loss, moved)
            squares += ((up - down) / 2e-5) ** 2
        penalty += (squares**0.5 - 1) ** 2 / 4
    expected = difference + 3.0 * penalty
    assert loss.adversary(student, teacher, labels).item() == pytest.approx(expected, rel=1e-7)


def test_a_discriminator_of_zeros_by_hand():
    # It scores 0 everywhere, with slope 0: the penalty is (0 - 1)^2 times its weight.
    loss, student, teacher, labels = prepared(penalty=10.0, width=2)
    for parameter in loss.parameters():
        torch.nn.init.zeros_(parameter)
    assert loss(student, teacher, labels).item() == 0
    against = loss.adversary(student, teacher, labels)
    against.backward()
    assert against.item() == 10 and all(p.grad is None or p.grad.isfinite().all() for p in loss.parameters())


def test_the_penalty_is_drawn_from_the_seed_and_the_progress():
    loss, student, teacher, labels = prepared(width=4)
    first = loss.adversary(student, teacher, labels)
    assert torch.equal(first, loss.adversary(student, teacher, labels))
    assert not torch.equal(first, loss.adversary(student, teacher, labels, Moment(0.5)))
    other, *_ = prepared(width=4, seed=1)
    assert not torch.equal(first, other.adversary(student, teacher, labels))


def test_what_helps_the_student_hurts_the_discriminator():
    loss, student, teacher, labels = prepared(width=4, penalty=0.0)
    logits = student.logits.clone().requires_grad_()
    loss(student._replace(logits=logits), teacher, labels).backward()
    moved = student._replace(logits=logits.detach() - 0.1 * logits.grad / logits.grad.abs().max())
    assert loss(moved, teacher, labels) < loss(student, teacher, labels)
    assert loss.adversary(moved, teacher, labels) > loss.adversary(student, teacher, labels)


def test_logits_without_positions_missing_images_and_unprepared_calls_are_refused():
    flat, labels = Outputs(wave(4, 5)), torch.zeros(4)
    for call in (Holistic().prepare, lambda s, t: Holistic()(s, t, labels)):
        with pytest.raises(ValueError, match=r"student \(4, 5\) and teacher \(4, 5\)"):
            call(flat, flat)
    loss, student, teacher, labels = prepared(width=2)
    with pytest.raises(ValueError, match="prepared with images"):
        loss(student._replace(images=None), teacher._replace(images=None), labels)
    with pytest.raises(ValueError, match="Call prepare"):
        Holistic()(student, teacher, labels)
    with pytest.raises(ValueError, match="`width` must be at least 1"):
        Holistic(width=0)
