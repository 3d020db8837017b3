import math

import numpy as np
import pytest
import torch

from kdnas.losses.example import example, fill, wave
from kdnas.losses.feature.variational import Variational
from kdnas.outputs import Outputs

LABELS = torch.zeros(2, dtype=torch.long)


def outputs(feature):
    return Outputs(torch.zeros(len(feature), 2), (feature,))


def prepared(student, teacher):
    loss = Variational()
    loss.prepare(student, teacher)
    return loss.double()


def reference(student, teacher, prediction):
    first, second, third = (
        p.detach().numpy().reshape(len(p), -1) for n, p in prediction.named_parameters() if "mean" in n
    )
    raw = prediction.variance.detach().numpy()
    total = 0.0
    for b, y, x in np.ndindex(len(teacher), *teacher.shape[2:]):
        hidden = np.maximum(first[:, : student.shape[1]] @ student[b, :, y, x], 0)
        mean = third @ np.maximum(second @ hidden, 0)
        for c in range(teacher.shape[1]):
            variance = math.log1p(math.exp(raw[c])) + 1e-5
            total += ((mean[c] - teacher[b, c, y, x]) ** 2 / variance + math.log(variance)) / 2
    return total / teacher.size


def test_one_element_by_hand():
    # The mean is 2 (identities), the teacher 5, the variance at first 5: (9 / 5 + log 5) / 2.
    student, teacher = (outputs(torch.full((1, 1, 1, 1), v, dtype=torch.float64)) for v in (2, 5))
    loss = prepared(student, teacher)
    for name, parameter in loss.named_parameters():
        if "mean" in name:
            parameter.data.fill_(1)
    assert loss(student, teacher, LABELS[:1]).item() == pytest.approx((9 / 5 + math.log(5)) / 2, rel=1e-6)


def test_agrees_with_a_loop():
    student, teacher, labels = example()
    loss = fill(prepared(student, teacher))
    expected = sum(
        reference(s.numpy(), t.numpy(), p)
        for s, t, p in zip(student.features, teacher.features, loss.predictions, strict=True)
    )
    assert loss(student, teacher, labels).item() == pytest.approx(expected, rel=1e-11)
    narrow = student._replace(features=tuple(f[:, :2] for f in student.features))
    expected = sum(
        reference(s.numpy(), t.numpy(), p)
        for s, t, p in zip(narrow.features, teacher.features, loss.predictions, strict=True)
    )
    assert loss(narrow, teacher, labels).item() == pytest.approx(expected, rel=1e-11)


def test_the_variance_learns_what_the_student_cannot_know():
    # An optimal variance is the mean squared error of its channel; gradient descent finds it.
    scale = torch.tensor([0.5, 3.0])[:, None, None]
    student, teacher = outputs(torch.zeros(2, 1, 3, 3, dtype=torch.float64)), outputs(wave(2, 2, 3, 3) * scale)
    loss = prepared(student, teacher)
    optimizer = torch.optim.Adam(loss.parameters(), 0.3)
    for _ in range(150):
        optimizer.zero_grad()
        loss(student, teacher, LABELS).backward()
        optimizer.step()
    found = torch.nn.functional.softplus(loss.predictions[0].variance) + 1e-5
    assert torch.allclose(found, teacher.features[0].square().mean((0, 2, 3)), rtol=1e-2)


def test_a_large_raw_variance_does_not_overflow():
    student, teacher, labels = example()
    loss = Variational()
    loss.prepare(student, teacher)
    for prediction in loss.predictions:
        prediction.variance.data.fill_(1e4)
    assert loss(*(o.map(torch.Tensor.float) for o in (student, teacher)), labels).isfinite()


def test_it_must_be_prepared():
    with pytest.raises(ValueError, match="prepare"):
        Variational()(*example())
