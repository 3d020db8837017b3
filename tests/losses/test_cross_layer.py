import numpy as np
import pytest
import torch

from kdnas.losses.example import example, fill
from kdnas.losses.feature.cross_layer import CrossLayer
from kdnas.outputs import Outputs


def prepared(student, teacher, **arguments):
    loss = CrossLayer(**arguments)
    loss.prepare(student, teacher)
    return fill(loss.double())


def array(parameter):
    return parameter.detach().numpy()


def pooled(maps, size):
    """Average pooling to `size`, which divides the maps'."""
    height, width = maps.shape[2] // size[0], maps.shape[3] // size[1]
    return maps.reshape(*maps.shape[:2], size[0], height, size[1], width).mean((3, 5))


def normalised(maps, norm):
    mean, variance = maps.mean((0, 2, 3), keepdims=True), maps.var((0, 2, 3), keepdims=True)
    gain, bias = (array(p)[None, :, None, None] for p in (norm.weight, norm.bias))
    return np.maximum(gain * (maps - mean) / np.sqrt(variance + 1e-5) + bias, 0)


def regressed(maps, regressor):
    (adapter, norm), _, middle, norm2, _, last = regressor
    out = normalised(np.einsum("oc,bchw->bohw", array(adapter.weight)[:, : maps.shape[1]], maps), norm)
    padded, kernel = np.pad(out, ((0, 0), (0, 0), (1, 1), (1, 1))), array(middle.weight)
    height, width = out.shape[2:]
    out = sum(
        np.einsum("oc,bchw->bohw", kernel[:, :, y, x], padded[:, :, y : y + height, x : x + width])
        for y in range(3)
        for x in range(3)
    )
    return np.einsum("oc,bchw->bohw", array(last.weight)[:, :, 0, 0], normalised(out, norm2))


def embedded(maps, mlp, descriptor):
    if descriptor == "pooled":
        rows = maps.mean((2, 3))
    else:
        rows = maps.reshape(len(maps), -1) @ maps.reshape(len(maps), -1).T
    first, _, second = mlp
    out = []
    for row in rows:
        hidden = np.maximum(array(first.weight)[:, : len(row), 0, 0] @ row + array(first.bias), 0)
        made = array(second.weight)[:, :, 0, 0] @ hidden + array(second.bias)
        out.append(made / np.sqrt((made**2).sum()))
    return out


def reference(loss, student, teacher, descriptor, temperature):
    student, teacher = ([f.numpy() for f in o.features] for o in (student, teacher))
    queries = [embedded(s, mlp, descriptor) for s, mlp in zip(student, loss.queries, strict=True)]
    keys = [embedded(t, mlp, descriptor) for t, mlp in zip(teacher, loss.keys, strict=True)]
    batch, total = len(student[0]), 0.0
    for i, s in enumerate(student):
        errors = []
        for k, t in enumerate(teacher):
            size = tuple(np.minimum(s.shape[2:], t.shape[2:]))
            predicted = regressed(pooled(s, size), loss.regressors[i * len(teacher) + k])
            errors.append(((predicted - pooled(t, size)) ** 2).mean((1, 2, 3)))
        for b in range(batch):
            energies = np.exp([queries[i][b] @ key[b] / temperature for key in keys])
            total += sum(e / energies.sum() * errors[k][b] for k, e in enumerate(energies))
    return total / batch / len(student)


@pytest.mark.parametrize("temperature", [1.0, 0.1])
@pytest.mark.parametrize("arguments", [{}, {"descriptor": "gram_row", "batch_size": 4}], ids=str)
def test_agrees_with_a_loop(arguments, temperature):
    student, teacher, labels = example()
    loss = prepared(student, teacher, temperature=temperature, **arguments)
    expected = reference(loss, student, teacher, arguments.get("descriptor", "pooled"), temperature)
    assert loss(student, teacher, labels).item() == pytest.approx(expected, rel=1e-10)


def test_a_narrower_student_agrees_with_a_loop():
    student, teacher, labels = example()
    loss = prepared(student, teacher)
    narrow = student._replace(features=tuple(f[:, :2] for f in student.features))
    expected = reference(loss, narrow, teacher, "pooled", 1.0)
    assert loss(narrow, teacher, labels).item() == pytest.approx(expected, rel=1e-10)


def test_one_layer_each_by_hand():
    # The regressor's last convolution is 0, so it predicts 0; attention to the only layer is 1.
    student = Outputs(torch.zeros(2, 2), (torch.ones(2, 3, 2, 2),))
    teacher = Outputs(torch.zeros(2, 2), (torch.tensor([1.0, 3.0]).reshape(2, 1, 1, 1).expand(2, 4, 2, 2),))
    loss = CrossLayer()
    loss.prepare(student, teacher)
    loss.regressors[0][-1].weight.data.zero_()
    assert loss(student, teacher, torch.zeros(2)).item() == pytest.approx((1 + 9) / 2)
    assert loss.attention(student, teacher).tolist() == [[[1.0]], [[1.0]]]


def test_attention_sums_to_one_and_the_temperature_bounds_or_frees_it():
    student, teacher, _ = example()
    for temperature, bound in ((1.0, np.e**2), (0.5, np.e**4)):
        shares = prepared(student, teacher, temperature=temperature).attention(student, teacher)
        assert shares.shape == (4, 2, 2)
        assert torch.allclose(shares.sum(2), torch.ones(4, 2, dtype=shares.dtype))
        assert (shares.amax(2) / shares.amin(2)).max() <= bound


def test_attention_and_queries_learn():
    student, teacher, labels = example()
    loss = prepared(student, teacher)
    loss(student, teacher, labels).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in loss.parameters())


def test_what_does_not_fit_is_refused():
    student, teacher, labels = example()
    with pytest.raises(ValueError, match="prepare"):
        CrossLayer()(student, teacher, labels)
    loss = prepared(student, teacher, descriptor="gram_row", batch_size=4)
    with pytest.raises(ValueError, match="batches of batch_size=4 samples, got 3"):
        loss(student.map(lambda x: x[:3]), teacher.map(lambda x: x[:3]), labels[:3])
    for arguments in ({"descriptor": "gram"}, {"descriptor": "gram_row"}, {"batch_size": 4}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match=r"must be|belongs to"):
            CrossLayer(**arguments)
