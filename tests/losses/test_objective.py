import pytest
import torch
from torch import nn

from kdnas.losses.example import example
from kdnas.losses.objective import Objective
from kdnas.losses.response.soft_targets import SoftTargets
from kdnas.outputs import START, Moment
from kdnas.specs import algorithms, find_spec, spec

STUDENT, TEACHER, LABELS = example()
STUDENT, TEACHER = STUDENT.map(torch.Tensor.float), TEACHER.map(torch.Tensor.float)


def objective(*terms):
    made = Objective(tuple((weight, find_spec("kdnas.losses", name, **more)) for weight, name, more in terms))
    made.prepare(STUDENT, TEACHER)
    return made


def test_the_sum_is_weighted_and_its_parts_are_not():
    made = objective((0.25, "cross_entropy", {}), (2.0, "soft_targets", {}))
    total, parts = made(STUDENT, TEACHER, LABELS)
    assert total == pytest.approx(0.25 * parts["cross_entropy"] + 2 * parts["soft_targets"])


def test_a_staged_loss_is_alone_first_and_silent_then():
    made = objective((1.0, "cross_entropy", {}), (100.0, "hint", {"staged": True}))
    assert set(made(STUDENT, TEACHER, LABELS, START)[1]) == {"hint"}
    assert set(made(STUDENT, TEACHER, LABELS, Moment(0.9))[1]) == {"cross_entropy"}
    assert made.restarts(300) == frozenset({100})


def test_a_preparation_teaches_the_parts_and_not_the_student():
    made = objective((1.0, "cross_entropy", {}), (1.0, "factor_transfer", {}))
    logits = STUDENT.logits.clone().requires_grad_()
    total, parts = made(STUDENT._replace(logits=logits), TEACHER, LABELS, START)
    total.backward()
    assert set(parts) == {"factor_transfer"}
    assert logits.grad is None
    assert any(p.grad is not None for p in made.parameters())


def test_the_same_loss_twice_keeps_two_names():
    made = objective((1.0, "soft_targets", {"temperature": 1.0}), (1.0, "soft_targets", {"temperature": 4.0}))
    assert len(made(STUDENT, TEACHER, LABELS)[1]) == 2


def watched(made, name):
    """The moments that a loss gets from now on."""
    moments, compute = [], made.losses[name].compute

    def watch(student, teacher, labels, at):
        moments.append(at)
        return compute(student, teacher, labels, at)

    made.losses[name].compute = watch
    return moments


def test_every_loss_gets_the_progress_and_the_ids():
    made = objective((1.0, "soft_targets", {}))
    moments, ids = watched(made, "soft_targets"), torch.arange(4)
    made(STUDENT, TEACHER, LABELS, Moment(0.7, ids=ids))
    assert [(at.progress, at.remaining) for at in moments] == [(0.7, None)] and moments[0].ids is ids


def test_an_empty_objective_is_refused():
    with pytest.raises(ValueError, match="`terms` of an objective must be at least one pair"):
        Objective(())


@pytest.mark.parametrize("name", sorted(n for n in algorithms("kdnas.losses") if n != "scale_factors"))
def test_every_loss_goes_into_an_objective_beside_the_labels(name):
    from kdnas.specs import resolve

    dense = resolve(algorithms("kdnas.losses")[name]).dense
    student, teacher, labels = example(dense=dense)
    student, teacher = student.map(torch.Tensor.float), teacher.map(torch.Tensor.float)
    terms = ((1.0, find_spec("kdnas.losses", "cross_entropy")), (1.0, find_spec("kdnas.losses", name)))
    made = Objective(terms)
    made.prepare(student, teacher)
    for progress in (0.0, 0.99):
        leaf = student.logits.clone().requires_grad_()
        total, _ = made(student._replace(logits=leaf), teacher, labels, Moment(progress))
        for _, value in made.adversaries(student, teacher, labels):
            total = total + value
        assert torch.isfinite(total)
        total.backward()


class Learner(torch.nn.Module):
    """Logits and maps that are parameters: their gradients are what a loss says of them."""

    def __init__(self):
        super().__init__()
        self.logits = torch.nn.Parameter(STUDENT.logits.clone())
        self.maps = torch.nn.ParameterList(f.clone() for f in STUDENT.features)

    def forward(self):
        # Every map has a task gradient too.
        shift = sum(f.mean((1, 2, 3)) for f in self.maps)[:, None]
        return STUDENT._replace(logits=self.logits * (1 + shift), features=tuple(self.maps))


def gradients(weight):
    learner = Learner()
    made = objective((1.0, "cross_entropy", {}), (weight, "singular_value", {}))
    yielded, found = made.teach("student", learner(), TEACHER, LABELS, Moment(0.5), learner=learner), []
    for name, loss in yielded:
        loss.backward()
        found.append(
            (
                name,
                float(loss.detach()),
                {n: None if p.grad is None else p.grad.clone() for n, p in learner.named_parameters()},
            )
        )
    return found, made


def test_a_clipped_loss_gives_no_parameter_more_than_the_task_does():
    found, made = gradients(1e6)
    (_, _, task), (name, value, both) = found
    assert name == "singular_value"
    _, parts = made(STUDENT, TEACHER, LABELS, Moment(0.5))
    assert value == pytest.approx(1e6 * float(parts["singular_value"]), rel=1e-5)
    for parameter, gradient in task.items():
        distilled = both[parameter] - gradient
        if distilled.abs().sum() > 0:
            assert distilled.norm() == pytest.approx(float(gradient.norm()), rel=1e-3), parameter
    assert any((both[p] - g).abs().sum() > 0 for p, g in task.items())


def test_a_gradient_shorter_than_the_tasks_is_left_as_it_is():
    found, made = gradients(1e-9)
    (_, _, task), (_, _, both) = found
    learner = Learner()
    loss = made.losses["singular_value"](learner(), TEACHER, LABELS)
    loss.backward()
    for parameter, expected in learner.named_parameters():
        if expected.grad is not None:
            # Added to a gradient of order 1e-2, what is left of 1e-9 times this is compared in that precision.
            torch.testing.assert_close(both[parameter], task[parameter] + 1e-9 * expected.grad, rtol=1e-5, atol=1e-9)


def test_where_nothing_else_is_minimised_nothing_is_clipped():
    learner, made = Learner(), objective((1.0, "singular_value", {}))
    assert [name for name, _ in made.teach("student", learner(), TEACHER, LABELS, START, learner=learner)] == [
        "student"
    ]


def test_the_remaining_layers_reach_a_loss_only_in_the_stages_that_ask_for_them():
    made = objective((1.0, "cross_entropy", {}), (1.0, "aggregation", {}))
    moments = watched(made, "aggregation")

    def remaining(stage, feature):
        return feature.mean((2, 3)) @ torch.ones(feature.shape[1], STUDENT.logits.shape[1])

    made(STUDENT, TEACHER, LABELS, Moment(0.0, remaining))
    made(STUDENT, TEACHER, LABELS, Moment(0.9, remaining))
    assert [at.remaining for at in moments] == [remaining, None]


def test_a_term_is_a_spec_a_loss_or_a_name_with_options():
    by_name = Objective(((2.0, "soft_targets,temperature=3"), (1.0, SoftTargets(temperature=3.0))))
    by_spec = Objective(((3.0, spec(SoftTargets, temperature=3.0)),))
    assert list(by_name.losses) == ["soft_targets", "soft_targets_again"]
    assert by_name(STUDENT, TEACHER, LABELS)[0] == pytest.approx(by_spec(STUDENT, TEACHER, LABELS)[0])


@pytest.mark.parametrize(
    "terms, sentence",
    [
        ((), "must be at least one pair"),
        ((1.0, SoftTargets()), "must be a pair"),
        (((1.0, 2.0, SoftTargets()),), "must be a pair"),
        (((float("nan"), "soft_targets"),), "must be a finite number, got nan"),
        ((("1", "soft_targets"),), "must be a finite number, got '1'"),
        (((1.0, "hnt"),), "Did you mean 'hint'"),
        (((1.0, SoftTargets),), "must be a Spec, a Loss or its name"),
        (((1.0, spec("kdnas.losses.objective:Objective", terms=())),), "not a subclass of Loss"),
    ],
)
def test_other_terms_are_refused(terms, sentence):
    with pytest.raises(ValueError, match=sentence):
        Objective(terms)


@pytest.mark.parametrize("weights", [(1.0, 3.0), (0.0, 1.0), (0.0, 0.0)])
def test_the_shares_are_those_of_each_terms_own_gradient_and_change_no_loss(weights):
    made = objective((weights[0], "cross_entropy", {}), (weights[1], "soft_targets", {}))
    layer = nn.Linear(5, STUDENT.logits.shape[1])
    images = torch.randn(len(LABELS), 5, generator=torch.Generator().manual_seed(0))

    def taught(weigh):
        student = STUDENT._replace(logits=layer(images))
        losses = dict(made.teach("sum", student, TEACHER, LABELS, START, learner=layer, weigh=weigh))
        return losses["sum"], torch.autograd.grad(losses["sum"], layer.weight)[0]

    plain, gradient = taught(False)
    assert made.shares == {}
    weighed, again = taught(True)
    assert torch.equal(plain, weighed) and torch.equal(gradient, again)
    norms = []
    for weight, loss in zip(made.weights, made.losses.values(), strict=True):
        value = weight * loss(STUDENT._replace(logits=layer(images)), TEACHER, LABELS)
        gradients = torch.autograd.grad(value, list(layer.parameters()))
        norms.append(float(torch.cat([g.flatten() for g in gradients]).norm()))
        assert made.shares[["cross_entropy", "soft_targets"][len(norms) - 1]].value == pytest.approx(
            float(value.detach())
        )
    expected = [norm / sum(norms) if sum(norms) else 0.0 for norm in norms]
    assert [share.gradient for share in made.shares.values()] == pytest.approx(expected, rel=1e-5)
