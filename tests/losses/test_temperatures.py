"""One rule for every divergence of softened distributions: its gradient hardly depends on the temperature."""

import inspect

import pytest
import torch

from kdnas.losses.dense.pixel_wise import PixelWise
from kdnas.losses.feature.route_constrained import RouteConstrained
from kdnas.losses.response.decoupled import Decoupled
from kdnas.losses.response.logit_standardization import LogitStandardization
from kdnas.losses.response.oracle import Oracle
from kdnas.losses.response.soft_targets import SoftTargets
from kdnas.outputs import Outputs
from kdnas.specs import algorithms, resolve, spec

GENERATOR = torch.Generator().manual_seed(0)
STUDENT, TEACHER = (torch.randn(6, 5, generator=GENERATOR, dtype=torch.float64) for _ in range(2))
LABELS = torch.arange(6) % 5
FORMS = {
    **{form: lambda t, form=form: SoftTargets(form=form, temperature=t) for form in ("kl", "soft_cross_entropy")},
    **{form: lambda t, form=form: SoftTargets(form=form, temperature=t) for form in ("reverse_kl", "js")},
    "decoupled": lambda t: Decoupled(temperature=t),
    "oracle": lambda t: Oracle(temperature=t),
    "pixel_wise": lambda t: PixelWise(temperature=t),
    "logit_standardization": lambda t: LogitStandardization(of=spec(SoftTargets, temperature=t)),
    "route_constrained": lambda t: RouteConstrained(loss=spec(SoftTargets, temperature=t)),
}
# Attention over layers and graphs, distributions over positions or samples; DIST compares correlations, which do not
# flatten with the distributions; OFA-KD's authors have no factor T^2.
OTHERS = {"cross_layer", "self_attention", "teacher_graph", "dist", "channel_wise", "contrastive", "one_for_all"}


def gradient(loss, dense):
    student = STUDENT.clone().requires_grad_()

    def shown(logits):
        maps = logits[:, :, None, None].expand(-1, -1, 2, 2) if dense else logits
        return Outputs(maps, members=(Outputs(maps), Outputs(maps.flip(0))))

    labels = LABELS[:, None, None].expand(-1, 2, 2) if dense else LABELS
    loss(shown(student), shown(TEACHER), labels).backward()
    return student.grad


@pytest.mark.parametrize("name", FORMS)
def test_a_divergence_s_gradient_hardly_depends_on_the_temperature(name):
    cool, hot, hotter = (gradient(FORMS[name](t), name == "pixel_wise") for t in (10.0, 40.0, 160.0))
    assert hot.norm() > 0
    assert torch.allclose(hot, hotter, atol=0.05 * float(hotter.norm()))
    assert 0.8 < float(cool.norm() / hotter.norm()) < 1.25


def test_the_limit_is_the_difference_of_centred_logits():
    """Hinton et al., section 2.1: (z - v) / (batch * classes) for logits of mean 0."""
    centred = [z - z.mean(1, keepdim=True) for z in (STUDENT, TEACHER)]
    limit = (centred[0] - centred[1]) / STUDENT.numel()
    assert torch.allclose(gradient(SoftTargets(temperature=1e4), False), limit, rtol=1e-3, atol=1e-6)


def test_no_loss_with_a_temperature_is_left_out():
    found = {name: resolve(path) for name, path in algorithms("kdnas.losses").items()}
    having = {n for n, made in found.items() if "temperature" in inspect.signature(made).parameters}
    assert having - OTHERS == {"soft_targets", "decoupled", "oracle", "pixel_wise"}
