import numpy as np
import pytest
import torch

from kdnas.losses.example import example, fill, wave
from kdnas.losses.feature.hint import Hint
from kdnas.outputs import Outputs

LABELS = torch.zeros(2, dtype=torch.long)


def outputs(*features):
    return Outputs(torch.zeros(len(features[0]), 2), features)


def prepared(student, teacher, **arguments):
    loss = Hint(**arguments)
    loss.prepare(student, teacher)
    return fill(loss.double())


def reference(predicted, teacher, difference):
    u, t = np.asarray(predicted), np.asarray(teacher)
    if difference == "cosine":
        values = []
        for b in range(len(u)):
            for y in range(u.shape[2]):
                for x in range(u.shape[3]):
                    one, two = u[b, :, y, x], t[b, :, y, x]
                    values.append(1 - one @ two / np.sqrt(one @ one) / np.sqrt(two @ two))
        return np.mean(values)
    if difference == "normalised":
        rows = [(a / np.sqrt((a**2).sum()), b / np.sqrt((b**2).sum())) for a, b in zip(u, t, strict=True)]
        return np.mean([((a - b) ** 2).sum() for a, b in rows])
    terms = []
    for d in np.abs(u - t).flatten():
        terms.append({"mse": d**2, "l1": d, "smooth_l1": d**2 / 2 if d < 1 else d - 0.5}[difference])
    return np.mean(terms)


def by_loop(student, weight):
    """A convolution without padding."""
    height, width = (student.shape[d] - weight.shape[d] + 1 for d in (2, 3))
    out = np.zeros((len(student), len(weight), height, width))
    for b, c, y, x in np.ndindex(out.shape):
        patch = student[b, :, y : y + weight.shape[2], x : x + weight.shape[3]]
        out[b, c, y, x] = (patch * weight[c]).sum()
    return out


def test_two_maps_by_hand():
    # One position, channels (3, 4) against (0, 5): squares 9 and 1; cosine 20 / 25; lengths 5 and 5.
    s, t = outputs(torch.tensor([3.0, 4.0]).reshape(1, 2, 1, 1)), outputs(torch.tensor([0.0, 5.0]).reshape(1, 2, 1, 1))
    expected = {"mse": 5.0, "l1": 2.0, "smooth_l1": (2.5 + 0.5) / 2, "cosine": 0.2, "normalised": 0.36 + 0.04}
    for difference, value in expected.items():
        loss = Hint(regressor="none", difference=difference)
        loss.prepare(s, t)
        assert loss(s, t, LABELS[:1]).item() == pytest.approx(value), difference


@pytest.mark.parametrize("difference", ["mse", "smooth_l1", "l1", "cosine", "normalised"])
def test_agrees_with_a_loop(difference):
    student, teacher, labels = example()
    loss = prepared(student, teacher, difference=difference)
    weight = loss.regressors[0].weight.detach().numpy()[:, :, None, None]
    predicted = by_loop(student.features[0].numpy(), weight)
    expected = reference(predicted, teacher.features[0], difference)
    assert loss(student, teacher, labels).item() == pytest.approx(expected, rel=1e-12)


def test_the_papers_regressor_is_a_convolution_without_padding():
    student, teacher = outputs(wave(2, 3, 6, 5)), outputs(wave(2, 4, 4, 5, phase=1))
    loss = prepared(student, teacher, regressor="conv")
    weight = loss.regressors[0].weight.detach().numpy()
    assert weight.shape == (4, 3, 3, 1)
    expected = reference(by_loop(student.features[0].numpy(), weight), teacher.features[0], "mse")
    assert loss(student, teacher, LABELS).item() == pytest.approx(expected, rel=1e-12)
    narrow = outputs(wave(2, 2, 6, 5))
    expected = reference(by_loop(narrow.features[0].numpy(), weight[:, :2]), teacher.features[0], "mse")
    assert loss(narrow, teacher, LABELS).item() == pytest.approx(expected, rel=1e-12)


def test_the_normalised_regressor_has_unit_variance_at_first():
    student, teacher = outputs(5 + wave(2, 3, 6, 5)), outputs(torch.zeros(2, 4, 6, 5, dtype=torch.float64))
    loss = Hint(regressor="conv1x1_norm")
    loss.prepare(student, teacher)
    assert loss.double()(student, teacher, LABELS).item() == pytest.approx(1, abs=1e-3)


def test_the_middle_pair_is_taken_unless_pairs_are_named():
    maps = [wave(2, 3, size, size) for size in (8, 4, 2, 1)]
    network = outputs(*maps)
    loss = Hint()
    loss.prepare(network, network)
    assert loss.taps.pairs == ((1, 1),)
    loss.prepare(outputs(*maps[:3]), outputs(*maps[:3]))
    assert loss.taps.pairs == ((1, 1),)
    every = Hint(layers="all")
    every.prepare(network, network)
    assert len(every.taps.pairs) == 4
    named = Hint(taps=((0, 0), (3, 3)))
    named.prepare(network, network)
    assert named.taps.pairs == ((0, 0), (3, 3))


def test_alone_it_moves_nothing_beyond_the_guided_layer():
    lower, upper = torch.nn.Conv2d(3, 4, 1), torch.nn.Conv2d(4, 4, 1)
    first = lower(wave(2, 3, 4, 4).float())
    second = upper(first)
    teacher = outputs(wave(2, 4, 4, 4).float(), wave(2, 4, 4, 4).float())
    student = Outputs(second.mean((2, 3)), (first, second))
    loss = Hint(taps=((0, 0),))
    loss.prepare(student, teacher)
    loss(student, teacher, LABELS).backward()
    assert lower.weight.grad.abs().sum() > 0 and upper.weight.grad is None
    assert loss.regressors[0].weight.grad.abs().sum() > 0


def test_two_stages_hint_then_student():
    assert [(s.name, s.uses, s.trains) for s in Hint().stages()] == [
        ("hint", "loss", "both"),
        ("student", "task", "student"),
    ]
    assert len(Hint(staged=False).stages()) == 1


def test_names_are_checked():
    for arguments in ({"regressor": "linear"}, {"difference": "mae"}, {"layers": "first"}):
        with pytest.raises(ValueError, match="must be"):
            Hint(**arguments)


def test_what_cannot_be_matched_is_refused_with_both_shapes():
    student, teacher, labels = example()
    with pytest.raises(ValueError, match=r"\(3, 8, 6\).*\(4, 8, 6\).*conv1x1"):
        Hint(regressor="none").prepare(student, teacher)
    with pytest.raises(ValueError, match="elastic student widths"):
        Hint(regressor="none").prepare(student, student, elastic=True)
    with pytest.raises(ValueError, match=r"\(6, 4, 3\).*\(4, 8, 6\)"):
        Hint(regressor="conv", taps=((1, 0),)).prepare(student, teacher)
    with pytest.raises(ValueError, match="prepare"):
        Hint()(student, teacher, labels)
    odd = outputs(torch.zeros(4, 3, 4, 4, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"student must be \[batch, channels.*got shape \(4, 3, 4, 4, 4\)"):
        Hint(taps=((0, 0),)).prepare(odd, teacher)
