"""What must hold for every file in kdnas/scorers, found by walking: -k NAME runs one scorer's."""

import dataclasses
import math

import pytest
import torch

from kdnas.scorers.base import OutputScorer
from kdnas.scorers.blocks import Blocks
from kdnas.scorers.diswot import Diswot
from kdnas.scorers.loss import Loss
from kdnas.scorers.predicted import Predicted
from kdnas.scorers.reward import Reward
from kdnas.scorers.short_training import ShortTraining
from kdnas.specs import algorithms, resolve, spec
from kdnas.testing.scorers import ScorerContract
from tests.contracts import contracts
from tests.scorers.scene import Flat, Plain, Shows, evidence, network

SHORT = {"steps": 2, "batch_size": 6, "num_rungs": 2, "reduction": 2}
CONTRACTS = contracts(
    "kdnas.scorers",
    ScorerContract,
    {
        "accuracy": {"prefers": "labels"},
        "cka": {"prefers": "teacher"},
        "depth": {"prefers": "size"},
        # The semantic term needs students of the teacher's width; fresh weights have no best.
        "diswot": {"prefers": "teacher", "arguments": {"semantic": 0.0, "weights": "inherited"}},
        "fitted_blocks": {"prefers": "teacher"},
        "in_place": {"prefers": "largest"},
        "latency": {"repeats": False},
        "loss": {"prefers": "teacher"},
        "macs": {"prefers": "size"},
        "nwot": {"prefers": "size"},
        "params": {"prefers": "size"},
        "predicted": {"arguments": {"members": "macs+params", "target": "accuracy", "num_fitted": 4}},
        "rank_ensemble": {"prefers": "largest", "arguments": {"num_reference": 6}},
        "rdm": {"prefers": "teacher"},
        "reward": {"prefers": "labels", "arguments": {"scorer": "accuracy"}},
        "short_training": {"arguments": SHORT},
        "synflow": {"prefers": "size"},
        "zen": {"prefers": "size"},
    },
)
globals().update({contract.__name__: contract for contract in CONTRACTS.values()})
NAMES = sorted(algorithms("kdnas.scorers"))
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
