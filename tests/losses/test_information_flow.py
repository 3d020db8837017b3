import math

import numpy as np
import pytest
import torch
from torch import nn

from kdnas.losses.example import example, wave
from kdnas.losses.relation.information_flow import InformationFlow
from kdnas.outputs import Moment, Outputs
from kdnas.specs import spec

LABELS = torch.zeros(4, dtype=torch.int64)


def outputs(*maps):
    return Outputs(torch.zeros(len(maps[0]), 2, dtype=maps[0].dtype), maps, images=wave(len(maps[0]), 3, 8, 8))


def probabilities(rows, kernel):
    n = len(rows)
    result = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            if kernel == "cosine":
                cosine = rows[i] @ rows[j] / (np.linalg.norm(rows[i]) * np.linalg.norm(rows[j]))
                result[i, j] = (cosine + 1) / 2
            else:
                result[i, j] = 1 / (1 + np.linalg.norm(rows[i] - rows[j]))
    result /= result.sum(1, keepdims=True)
    return result


def divergence(student, teacher):
    total = 0.0
    for kernel, epsilon in (("cosine", 1e-7), ("student t", 0.0)):
        p, q = (probabilities(x, kernel) + epsilon for x in (teacher, student))
        total += ((p - q) * (np.log(p) - np.log(q))).sum() / len(p)
    return total


@pytest.mark.parametrize("embedding", ["flat", "pooled"])
def test_it_agrees_with_loops(embedding):
    student, teacher, labels = example()
    change = {"flat": lambda f: f.flatten(1), "pooled": lambda f: f.mean((2, 3))}[embedding]
    parts = [
        divergence(change(s).numpy(), change(t).numpy())
        for s, t in zip(student.features, teacher.features, strict=True)
    ]
    expected = parts[1] + 100 * parts[0]
    found = float(InformationFlow(embedding=embedding)(student, teacher, labels))
    assert found == pytest.approx(expected, rel=1e-9)
    if embedding == "flat":
        assert InformationFlow.golden == pytest.approx(expected, rel=1e-9)


def test_a_value_worked_by_hand():
    # Two samples. Teacher: orthogonal, sqrt 2 apart. Student: parallel, 1 apart.
    teacher = outputs(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    student = outputs(torch.tensor([[1.0, 0.0], [2.0, 0.0]]))

    def jeffreys(p, q):
        return 2 * (p - q) * (math.log(p / (1 - p)) - math.log(q / (1 - q))) / 2

    # A row is (p, 1 - p), p the share of the sample itself: cosine 1/(1 + 1/2) and 1/2, t 1/(1 + 1/(1 + d)).
    expected = jeffreys(2 / 3, 1 / 2) + jeffreys(1 / (1 + 1 / (1 + 2**0.5)), 1 / (1 + 1 / 2))
    found = float(InformationFlow()(student, teacher, torch.zeros(2)))
    assert found == pytest.approx(expected, rel=1e-5)


def test_intermediate_layers_fade_with_progress_and_the_last_one_stays():
    student, teacher, labels = example()
    loss = InformationFlow(epochs=10)
    assert loss.intermediate_weight(0.0) == 100
    assert loss.intermediate_weight(0.1) == pytest.approx(70)  # one of ten epochs
    assert loss.intermediate_weight(1.0) == pytest.approx(100 * 0.7**10)
    last = float(InformationFlow(first_weight=0.0)(student, teacher, labels))
    at_start = float(loss(student, teacher, labels))
    half = float(loss(student, teacher, labels, Moment(0.5)))
    assert half - last == pytest.approx((at_start - last) * 0.7**5)


def test_opposite_and_equal_samples_have_finite_gradients():
    student = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [0.0, 0.0]], requires_grad=True)
    teacher = outputs(wave(4, 2).float())
    value = InformationFlow()(Outputs(torch.zeros(4, 2), (student,)), teacher, LABELS)
    value.backward()
    assert torch.isfinite(value) and student.grad.abs().max() < 10


class Small(nn.Module):
    """A network of the student's family."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3)

    def forward(self, images):
        first = self.norm(self.first(images))
        second = self.second(first.relu())
        return Outputs(second.mean((2, 3)), (first, second), images=images)


def with_auxiliary():
    torch.manual_seed(0)
    loss = spec(InformationFlow, auxiliary=spec(Small)).build()
    images = wave(4, 3, 8, 8).float()
    student, teacher = Small()(images), outputs(wave(4, 7, 2, 2).float())._replace(images=images)
    loss.prepare(student, teacher)
    return loss, student, teacher


def test_an_auxiliary_teacher_is_trained_on_the_teachers_deepest_layer_first():
    loss, _, teacher = with_auxiliary()
    assert [(s.trains, s.uses) for s in loss.stages()] == [("parts", "preparation"), ("student", "both")]
    with torch.no_grad():
        mine = loss.auxiliary.train()(teacher.images).features[-1].flatten(1).double().numpy()
    value = loss.preparation(teacher)
    assert float(value.detach()) == pytest.approx(
        divergence(mine, teacher.features[-1].flatten(1).double().numpy()), rel=1e-4
    )
    value.backward()
    assert all(p.grad is not None for p in loss.auxiliary.parameters())


def test_the_trained_auxiliary_teacher_stands_in_the_teachers_place_and_rests():
    loss, student, teacher = with_auxiliary()
    loss.mark_trained()
    statistics = loss.auxiliary.norm.running_mean.clone()
    student = student.map(lambda x: x.detach().requires_grad_())
    value = loss(student, teacher, LABELS)
    with torch.no_grad():
        auxiliary = loss.auxiliary.eval()(teacher.images)
    assert float(value.detach()) == pytest.approx(float(InformationFlow()(student, auxiliary, LABELS).detach()))
    value.backward()
    assert all(p.grad is None for p in loss.auxiliary.parameters())
    assert torch.equal(statistics, loss.auxiliary.norm.running_mean)


def test_an_auxiliary_teacher_without_images_is_an_error():
    loss, student, teacher = with_auxiliary()
    loss.mark_trained()
    with pytest.raises(ValueError, match=r"auxiliary teacher needs images, but these outputs have none"):
        loss(student._replace(images=None), teacher, LABELS)


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match="`embedding` must be one of flat, pooled, got 'mean'"):
        InformationFlow(embedding="mean")
    with pytest.raises(ValueError, match="`decay` must be in"):
        InformationFlow(decay=0.0)
