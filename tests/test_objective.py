import pytest
import torch

from kdnas.losses.example import example
from kdnas.objective import Objective
from kdnas.spec import algorithms, named

STUDENT, TEACHER, LABELS = example()
STUDENT, TEACHER = STUDENT.map(torch.Tensor.float), TEACHER.map(torch.Tensor.float)


def objective(*terms):
    made = Objective(tuple((weight, named("kdnas.losses", name, **more)) for weight, name, more in terms))
    made.prepare(STUDENT, TEACHER)
    return made


def test_the_sum_is_weighted_and_its_parts_are_not():
    made = objective((0.25, "cross_entropy", {}), (2.0, "soft_targets", {}))
    total, parts = made(STUDENT, TEACHER, LABELS)
    assert total == pytest.approx(0.25 * parts["cross_entropy"] + 2 * parts["soft_targets"])


def test_a_staged_loss_is_alone_first_and_silent_then():
    made = objective((1.0, "cross_entropy", {}), (100.0, "hint", {"staged": True}))
    assert set(made(STUDENT, TEACHER, LABELS, 0.0)[1]) == {"hint"}
    assert set(made(STUDENT, TEACHER, LABELS, 0.9)[1]) == {"cross_entropy"}
    assert made.restarts(300) == frozenset({100})


def test_a_preparation_teaches_the_parts_and_not_the_student():
    made = objective((1.0, "cross_entropy", {}), (1.0, "factor_transfer", {}))
    logits = STUDENT.logits.clone().requires_grad_()
    total, parts = made(STUDENT._replace(logits=logits), TEACHER, LABELS, 0.0)
    total.backward()
    assert set(parts) == {"factor_transfer"}
    assert logits.grad is None
    assert any(p.grad is not None for p in made.parameters())


def test_the_same_loss_twice_keeps_two_names():
    made = objective((1.0, "soft_targets", {"temperature": 1.0}), (1.0, "soft_targets", {"temperature": 4.0}))
    assert len(made(STUDENT, TEACHER, LABELS)[1]) == 2


def test_every_loss_hears_how_far_the_run_is():
    made = objective((1.0, "soft_targets", {}))
    made(STUDENT, TEACHER, LABELS, 0.7)
    assert made.losses["soft_targets"].progress == 0.7


def test_an_empty_objective_is_refused():
    with pytest.raises(ValueError, match="at least one term"):
        Objective(())


@pytest.mark.parametrize("name", sorted(n for n in algorithms("kdnas.losses") if n != "scale_factors"))
def test_every_loss_goes_into_an_objective_beside_the_labels(name):
    from kdnas.spec import resolve

    dense = resolve(algorithms("kdnas.losses")[name]).dense
    student, teacher, labels = example(dense=dense)
    student, teacher = student.map(torch.Tensor.float), teacher.map(torch.Tensor.float)
    terms = ((1.0, named("kdnas.losses", "cross_entropy")), (1.0, named("kdnas.losses", name)))
    made = Objective(terms)
    made.prepare(student, teacher)
    for progress in (0.0, 0.99):
        leaf = student.logits.clone().requires_grad_()
        total, _ = made(student._replace(logits=leaf), teacher, labels, progress)
        for _, value in made.adversaries(student, teacher, labels):
            total = total + value
        assert torch.isfinite(total)
        total.backward()
