import pytest
import torch

from kdnas.losses.example import example
from kdnas.losses.feature.leading_channels import LeadingChannels
from kdnas.outputs import Moment, Outputs

LABELS = torch.zeros(4, dtype=torch.long)


def outputs(*features):
    return Outputs(torch.zeros(len(features[0]), 2), features)


def test_agrees_with_a_loop():
    student, teacher, labels = example()
    expected = 0.0
    for s, t in zip(student.features, teacher.features, strict=True):
        t = t[:, : s.shape[1]]
        deviation = t.transpose(0, 1).flatten(1).numpy().std(1)
        least = 0.1 * deviation.mean()
        squares = [((s[:, c] - t[:, c]).numpy() / max(deviation[c], least)) ** 2 for c in range(s.shape[1])]
        expected += sum(square.sum() for square in squares) / s.numel() / 2
    loss = LeadingChannels()
    loss.prepare(student, teacher)
    assert loss(student, teacher, labels).item() == pytest.approx(expected, rel=1e-12)


def test_only_the_teachers_first_channels_count():
    teacher = torch.randn(4, 6, 3, 3, generator=torch.Generator().manual_seed(0))
    loss = LeadingChannels()
    assert loss(outputs(teacher[:, :2]), outputs(teacher), LABELS) == 0
    assert loss(outputs(teacher[:, 2:4]), outputs(teacher), LABELS) > 0.5


def test_the_unit_is_the_channels_own_deviation():
    teacher = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    student = teacher + 0.5
    loss, scale = LeadingChannels(), torch.tensor([1.0, 3.0]).reshape(1, 2, 1, 1)
    first, second = (loss(outputs(k * student), outputs(k * teacher), LABELS) for k in (1.0, scale))
    assert second.item() == pytest.approx(first.item(), rel=1e-5)


def test_the_weight_falls_to_zero_unless_it_is_constant():
    student, teacher, labels = example()
    start, middle, end = (LeadingChannels()(student, teacher, labels, Moment(p)).item() for p in (0.0, 0.25, 1.0))
    assert middle == pytest.approx(0.75 * start) and end == 0
    constant, early = LeadingChannels(until=None), LeadingChannels(until=0.5)
    assert constant(student, teacher, labels, Moment(0.9)).item() == pytest.approx(start)
    assert early(student, teacher, labels, Moment(0.25)).item() == pytest.approx(0.5 * start)
    assert early(student, teacher, labels, Moment(0.7)).item() == 0


@pytest.mark.parametrize("until", [0.0, -0.5, 1.5, float("nan")])
def test_the_share_of_the_training_is_checked(until):
    with pytest.raises(ValueError, match=r"`until` must be .*in \(0, 1\]"):
        LeadingChannels(until=until)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-12])
def test_a_stage_that_hardly_varies_counts_like_any_other(scale):
    student = torch.randn(4, 2, 3, 3, requires_grad=True)
    value = LeadingChannels()(outputs(student), outputs(scale * torch.randn(4, 3, 3, 3)), LABELS)
    value.backward()
    assert value.item() == pytest.approx(1, rel=1e-5) and 0 < float(student.grad.norm()) < 1


def test_two_stages_of_zeros_give_zero():
    student = torch.zeros(4, 2, 3, 3, requires_grad=True)
    value = LeadingChannels()(outputs(student), outputs(torch.zeros(4, 3, 3, 3)), LABELS)
    value.backward()
    assert value.item() == 0 and student.grad.isfinite().all()


def test_a_narrower_teacher_is_refused():
    student, teacher, _ = example()
    with pytest.raises(ValueError, match="at least as wide as the student, got student"):
        LeadingChannels().prepare(teacher, student)
