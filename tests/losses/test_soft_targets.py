import math

import numpy as np
import pytest
import torch

from kdnas.losses.example import example, wave
from kdnas.losses.response.soft_targets import SoftTargets
from kdnas.outputs import Outputs

FORMS = ["kl", "soft_cross_entropy", "reverse_kl", "js"]
LABELS = torch.zeros(4, dtype=torch.long)


def reference(z_s, z_t, form, temperature):
    total = 0.0
    for a, b in zip(np.asarray(z_s) / temperature, np.asarray(z_t) / temperature, strict=True):
        p, q = np.exp(a) / np.exp(a).sum(), np.exp(b) / np.exp(b).sum()
        for p_c, q_c in zip(p, q, strict=True):
            middle = (p_c + q_c) / 2
            total += {
                "kl": q_c * math.log(q_c / p_c),
                "soft_cross_entropy": -q_c * math.log(p_c),
                "reverse_kl": p_c * math.log(p_c / q_c),
                "js": (q_c * math.log(q_c / middle) + p_c * math.log(p_c / middle)) / 2,
            }[form]
    return temperature**2 * total / len(z_s)


def test_two_classes_by_hand():
    # q = (1/2, 1/2), p = (3/4, 1/4): KL = log(2/3)/2 + log(2)/2 = log(4/3)/2.
    student, teacher = Outputs(torch.tensor([[3.0, 1.0]]).log()), Outputs(torch.zeros(1, 2))
    assert SoftTargets(temperature=1)(student, teacher, LABELS).item() == pytest.approx(math.log(4 / 3) / 2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_agrees_with_a_loop(form, temperature):
    student, teacher, labels = example()
    value = SoftTargets(form=form, temperature=temperature)(student, teacher, labels).item()
    assert value == pytest.approx(reference(student.logits, teacher.logits, form, temperature), rel=1e-12)


def test_golden():
    assert SoftTargets()(*example()).item() == pytest.approx(SoftTargets.golden, rel=1e-12)


@pytest.mark.parametrize("form, gap", [("kl", 1), ("soft_cross_entropy", 1), ("reverse_kl", 0.5), ("js", 0.5)])
@pytest.mark.parametrize("scale", [1, 2])
def test_gradient_norm_hardly_depends_on_the_temperature(form, gap, scale):
    # Ten classes; logits as far apart as they are within one network, or (the forms that average over the
    # student, whose gradient at T = 1 falls once it is confident elsewhere) half as far.
    teacher = Outputs(scale * wave(64, 10, phase=5))
    norms = []
    for temperature in (1, 2, 4, 8):
        logits = (teacher.logits + gap * wave(64, 10)).requires_grad_()
        SoftTargets(form=form, temperature=temperature)(Outputs(logits), teacher, LABELS).backward()
        norms.append(logits.grad.norm().item())
    assert max(norms) / min(norms) < 1.2


def test_soft_cross_entropy_has_the_gradient_of_kl():
    student, teacher, labels = example()
    gradients = []
    for form in ("kl", "soft_cross_entropy"):
        logits = student.logits.clone().requires_grad_()
        SoftTargets(form=form)(Outputs(logits), teacher, labels).backward()
        gradients.append(logits.grad)
    assert torch.allclose(*gradients, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("form", ["kl", "reverse_kl", "js"])
def test_equal_logits_give_zero(form):
    _, teacher, labels = example()
    assert SoftTargets(form=form)(teacher, teacher, labels).item() == pytest.approx(0, abs=1e-12)


def test_js_is_symmetric_and_kl_reverses():
    student, teacher, labels = example()
    js = SoftTargets(form="js")
    assert js(student, teacher, labels).item() == pytest.approx(js(teacher, student, labels).item(), rel=1e-12)
    kl, reverse = SoftTargets(form="kl"), SoftTargets(form="reverse_kl")
    assert kl(student, teacher, labels).item() == pytest.approx(reverse(teacher, student, labels).item(), rel=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_gaps_of_ten_thousand_are_finite_in_float32(form):
    teacher = Outputs(torch.tensor([[1e4, 0.0, -1e4], [0.0, 1e4, 0.0]]))
    logits = torch.tensor([[-1e4, 0.0, 1e4], [80.0, -80.0, 0.0]]).requires_grad_()
    loss = SoftTargets(form=form)(Outputs(logits), teacher, LABELS)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_twice_differentiable(form):
    student, teacher, labels = example(2, 3)

    def loss(logits):
        return SoftTargets(form=form)(Outputs(logits), teacher, labels)

    logits = student.logits.clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, logits) and torch.autograd.gradgradcheck(loss, logits)


def test_dense_logits_average_over_positions():
    a, b = wave(2, 3, 4, 5), wave(2, 3, 4, 5, phase=1)
    dense = SoftTargets()(Outputs(a), Outputs(b), LABELS)
    rows = [x.movedim(1, -1).reshape(-1, 3) for x in (a, b)]
    assert dense.item() == pytest.approx(SoftTargets()(Outputs(rows[0]), Outputs(rows[1]), LABELS).item())


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="`form` must be one of kl"):
        SoftTargets(form="KL")
    with pytest.raises(ValueError, match="`temperature` must be above 0"):
        SoftTargets(temperature=0)
