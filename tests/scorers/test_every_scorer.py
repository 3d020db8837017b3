"""What must hold for every file in kdnas/scorers, found by walking: -k NAME runs one scorer's."""

import dataclasses
import inspect
import math

import pytest
import torch

from kdnas.scorers.base import OutputScorer, Scorer, score_all
from kdnas.scorers.blocks import Blocks
from kdnas.scorers.diswot import Diswot
from kdnas.scorers.loss import Loss
from kdnas.scorers.predicted import Predicted
from kdnas.scorers.reward import Reward
from kdnas.scorers.short_training import ShortTraining
from kdnas.specs import Spec, algorithms, resolve, spec
from tests.scorers.scene import SPACE, Flat, Plain, Shows, evidence, network, supernet

NAMES = sorted(algorithms("kdnas.scorers"))
every_scorer = pytest.mark.parametrize("name", NAMES)
# Blocks needs a supernet trained block-wise, latency never repeats; their own files test them.
rated = pytest.mark.parametrize("name", [name for name in NAMES if name not in ("blocks", "latency")])
NEEDS_MAPS = {"diswot", "fitted_blocks", "nwot", "short_training", "zen"}


@pytest.fixture(scope="module")
def held():
    return evidence()


def made(name):
    scorer = resolve(algorithms("kdnas.scorers")[name])
    if scorer is Diswot:
        return scorer(semantic=0.0)  # the semantic term needs students of the teacher's width
    if scorer is Reward:
        return scorer(scorer="accuracy")
    if scorer is Predicted:
        return scorer(target=spec(ShortTraining, steps=1, batch_size=12), num_fitted=4)
    return scorer(steps=2, batch_size=12) if scorer is ShortTraining else scorer()


@every_scorer
def test_it_is_final_documented_and_made_from_plain_keyword_arguments(name):
    scorer = resolve(algorithms("kdnas.scorers")[name])
    assert issubclass(scorer, Scorer) and scorer.__final__
    text = inspect.cleandoc(scorer.__doc__)
    assert text.splitlines()[0].endswith(".")
    assert any(line.startswith("Reference:") for line in text.splitlines())
    for parameter in inspect.signature(scorer).parameters.values():
        assert parameter.kind is parameter.KEYWORD_ONLY
        assert isinstance(parameter.default, str | float | int | tuple | Spec)


@rated
def test_a_subnet_and_a_network_have_a_finite_score_that_repeats_and_leaves_them_as_they_were(name, held):
    for student in (supernet().extract(SPACE.smallest), network(3)):
        before = {key: tensor.clone() for key, tensor in student.state_dict().items()}
        modes = [(module.training, getattr(module, "track_running_stats", None)) for module in student.modules()]
        first = made(name).score(student, held)
        assert math.isfinite(first.value) and all(map(math.isfinite, first.parts.values()))
        made(name).score(network(4, SPACE.largest), held)
        assert made(name).score(student, dataclasses.replace(held)) == first
        assert all(torch.equal(tensor, before[key]) for key, tensor in student.state_dict().items())
        assert modes == [(m.training, getattr(m, "track_running_stats", None)) for m in student.modules()]
        assert all(parameter.grad is None for parameter in student.parameters())


@rated
def test_the_global_generator_is_left_alone(name, held):
    before = torch.random.get_rng_state()
    made(name).score(network(3), held)
    assert torch.equal(torch.random.get_rng_state(), before)


@rated
def test_a_module_of_someone_elses_is_scored_or_refused_with_the_fix(name, held):
    scorer, module = made(name), Plain().eval()
    if name == "short_training":
        with pytest.raises(ValueError, match="a Network, got a Plain"):
            scorer.score(module, held)
        return
    found = scorer.score(module, held)
    assert math.isfinite(found.value)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in module.modules())


@rated
def test_a_module_without_maps_is_scored_by_its_logits_or_refused_with_the_reason(name, held):
    if name not in NEEDS_MAPS:
        assert math.isfinite(made(name).score(Flat(), held).value)
    else:
        with pytest.raises(ValueError, match=r"has none|a Network, got"):
            made(name).score(Flat(), held)


@rated
def test_a_population_has_the_scores_of_one_by_one_scoring(name, held):
    bank, candidates = supernet(), list(SPACE.all())[::7]
    found = score_all(bank, candidates, made(name), held)
    for architecture, score in zip(candidates, found, strict=True):
        assert score.value == pytest.approx(made(name).score(bank.extract(architecture), held).value, abs=1e-6)


@pytest.mark.parametrize("value", [0.0, 1e6, 1e-6])
@rated
def test_features_that_tell_nothing_apart_and_extreme_ones_give_no_nan(name, value, held):
    scorer = made(name)
    if not isinstance(scorer, OutputScorer):
        return
    flat = Shows(torch.full((20, 3), value), torch.full((20, 4, 8, 8), value), torch.full((20, 8, 4, 4), value))
    huge = Shows(*(value * (t + 1) for t in (held.teacher.logits, *held.teacher.features)))
    for student in (flat, huge):
        assert math.isfinite(scorer.score(student, held).value)
    dead = dataclasses.replace(held, teacher=flat.outputs)
    assert math.isfinite(scorer.score(network(3), dead).value)


def test_what_is_derived_from_evidence_is_computed_once_and_not_taken_over_by_a_changed_copy(held):
    own, values = dataclasses.replace(held, seed=7), iter(range(9))
    assert [own.once("key", lambda: next(values)) for _ in range(3)] == [0, 0, 0]
    assert dataclasses.replace(own, seed=8).once("key", lambda: next(values)) == 1
    assert own.once("key", lambda: next(values)) == 0


def test_blocks_says_what_it_needs(held):
    with pytest.raises(ValueError, match="block-wise"):
        Blocks().score(network(3), held)


@pytest.mark.parametrize(
    "loss", ["alpha_divergence", "dist", "soft_targets", "representational", "similarity_preserving"]
)
def test_any_loss_without_learnable_parts_prefers_the_teacher_itself(loss, held):
    scorer = Loss(loss=loss)
    own = scorer.score(network(), held).value
    assert own == pytest.approx(0, abs=1e-4)
    assert all(scorer.score(network(seed), held).value < own for seed in (1, 2, 3))
