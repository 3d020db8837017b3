"""Combined scorers, outputs of any module, and the walk that shares prefixes, against their definitions."""

import dataclasses

import pytest
import torch
from torch import nn

from kdnas.costs.count import layer_inputs
from kdnas.outputs import Outputs
from kdnas.randomness import initialised, python_rng
from kdnas.scorers.base import (
    CombinedScorer,
    Evidence,
    LayerCount,
    OutputScorer,
    Score,
    Scorer,
    outputs_of,
    score_all,
    score_by_all,
)
from kdnas.scorers.params import Params
from kdnas.spaces.toy import Toy
from kdnas.specs import spec
from kdnas.supernet import Supernet
from tests.scorers.scene import SPACE, Flat, Plain, evidence, network, supernet

ALL = list(SPACE.all())


@pytest.fixture(scope="module")
def scene():
    return evidence()


class Rungs(Scorer):
    """Scores on its way: its number, times the resource."""

    def __init__(self, number=1.0, resources=(1, 3)):
        self.number, self.resources = number, tuple(resources)
        self.reads_weights = False

    def score(self, student, evidence):
        return Score(self.number * self.resources[-1], {})

    def rungs(self, student, evidence):
        for resource in self.resources:
            yield Score(self.number * resource, {})


class Once(Scorer):
    """A number, and how often it was scored."""

    scored = 0

    def __init__(self, number=1.0, reads_weights=True):
        self.number, self.reads_weights = number, reads_weights

    def score(self, student, evidence):
        Once.scored += 1
        assert isinstance(student, nn.Module) and isinstance(evidence, Evidence)
        return Score(self.number, {"once": self.number})


class Digits(CombinedScorer):
    """Members' scores as digits of a number, first the largest."""

    def combine(self, scores, evidence):
        return Score(sum(score.value * 100**-i for i, score in enumerate(scores)), {})


RUNGS, ONCE = "tests.scorers.test_base:Rungs", "tests.scorers.test_base:Once"


def test_a_combined_scorer_shows_the_rungs_of_its_member_and_asks_the_others_once(scene):
    scorer = Digits([spec(ONCE, number=5), spec(RUNGS, number=2, resources=(1, 2, 4)), spec(ONCE, number=7)])
    assert scorer.resources == (1, 2, 4)
    Once.scored = 0
    values = [score.value for score in scorer.rungs(network(), scene)]
    assert values == pytest.approx([5.0207, 5.0407, 5.0807]) and Once.scored == 2
    assert scorer.score(network(), scene).value == pytest.approx(values[-1])


def test_without_rungs_a_combined_scorer_has_one():
    assert Digits([spec(ONCE)]).resources == (1,)
    assert Digits([spec(RUNGS, resources=(9,))]).resources == (1,)


def test_two_members_with_rungs_are_refused():
    with pytest.raises(ValueError, match="at most one of `members` may have several rungs, got 2"):
        Digits([spec(RUNGS), spec(RUNGS)])
    with pytest.raises(ValueError, match="`members` must name at least one scorer"):
        Digits([])


def test_weights_matter_where_they_do_to_any_member():
    assert not Digits([spec(RUNGS), spec(ONCE, reads_weights=False)]).reads_weights
    assert Digits([spec(RUNGS), spec(ONCE)]).reads_weights


def test_one_rung_is_the_score(scene):
    assert Scorer.resources == (1,) and Scorer.reads_weights
    (only,) = Once(3.0).rungs(network(), scene)
    assert only == Once(3.0).score(network(), scene)


def test_members_may_be_joined_in_one_text():
    scorer = Digits("params+macs")
    assert [type(member).__name__ for member in scorer.members] == ["Params", "Macs"]


def test_the_reference_is_drawn_by_the_seed_without_repetition(scene):
    own = dataclasses.replace(scene, seed=4)
    scorer = Digits([spec(ONCE, number=5), "params"])
    architectures, columns = scorer.reference(own, 30)
    rng = python_rng(4, "reference")
    assert architectures == list(dict.fromkeys(SPACE.sample(rng) for _ in range(30)))
    assert 1 < len(architectures) < 30
    params = score_all(own.supernet, architectures, Params(), own)
    assert columns == [[Score(5, {"once": 5})] * len(architectures), params]


def test_the_outputs_of_a_module_that_returns_logits_are_its_stages(scene):
    plain = Plain().eval()
    outputs = outputs_of(plain, scene.images)
    first = plain.one(scene.images)
    expected = (first, plain.two(first))
    assert torch.equal(outputs.logits, plain(scene.images))
    assert len(outputs.features) == 2 and all(map(torch.equal, outputs.features, expected))
    assert outputs.images is scene.images


def test_the_outputs_of_a_module_without_maps_are_its_logits(scene):
    flat = Flat()
    outputs = outputs_of(flat, scene.images)
    assert torch.equal(outputs.logits, flat(scene.images)) and outputs.features == ()
    assert outputs.images is scene.images


def test_outputs_stay_as_they_are(scene):
    own = Outputs(torch.zeros(1))

    class Own(nn.Module):
        def forward(self, images):
            return own

    assert outputs_of(Own(), scene.images) is own


class Record(OutputScorer):
    """A score that depends on everything it is given, in its order; it notes how often it digests a stage."""

    def __init__(self, base=1.0):
        self.base, self.digests = base, []

    def digest(self, stage, feature, evidence):
        assert not torch.is_grad_enabled()
        self.digests.append(stage)
        return stage, float(feature.double().mean())

    def judge(self, logits, digests, evidence):
        assert [stage for stage, _ in digests] == [0, 1]
        parts = {f"stage {stage}": mean for stage, mean in digests} | {"logits": float(logits.double().mean())}
        return Score(self.base * sum(parts.values()), parts)


def alone(bank, architecture, scorer, scene):
    return scorer.score(bank.extract(architecture), scene)


def test_by_default_a_stage_is_remembered_by_its_map(scene):
    class Keeps(OutputScorer):
        def judge(self, logits, digests, evidence):
            return Score(float(digests[1].mean()), {"shape": digests[0].shape})

    (score,) = score_all(supernet(), [ALL[0]], Keeps(), scene)
    assert score.parts["shape"] == (20, 4, 8, 8)
    assert score.value == pytest.approx(alone(supernet(), ALL[0], Keeps(), scene).value, abs=1e-6)


def test_every_prefix_is_run_and_digested_once_and_scores_keep_their_order(scene):
    bank, architectures = supernet().train(), [*ALL[::-2], *ALL[::2]]
    scorer, count = Record(), LayerCount()
    scores = score_all(bank, architectures, scorer, scene, count)
    assert all(m.training for m in bank.modules())
    for architecture, score in zip(architectures, scores, strict=True):
        expected = alone(bank.eval(), architecture, Record(), scene)
        assert score.value == pytest.approx(expected.value, abs=1e-5)
        assert score.parts == pytest.approx(expected.parts, abs=1e-5)
    paths = []
    for architecture in ALL:
        blueprint = SPACE.blueprint(architecture)
        layers = [layer for _, layer, _ in layer_inputs(blueprint)]
        depths = [len(stage) for stage in blueprint.stages]
        # A layer that ends its stage is another step than the same layer in the middle.
        ends = [0, *(int(j == depth - 1) for depth in depths for j in range(depth)), 0]
        paths.append(tuple(zip(layers, ends, strict=True)))
    prefixes = {path[:length] for path in paths for length in range(1, len(path) + 1)}
    assert count.evaluated == len(prefixes)
    assert count.one_by_one == sum(map(len, paths))
    assert len(scorer.digests) == len({path[: i + 1] for path in paths for i in range(len(path)) if path[i][1]})


def test_another_resolution_begins_another_walk(scene):
    space = Toy(widths=(4,), depths=(1,), resolutions=(6, 8), classes=3, image_channels=3)
    bank = initialised(lambda: Supernet(space), 0).eval()
    architectures, count = list(space.all()), LayerCount()
    assert len(architectures) == 2
    scores = score_all(bank, architectures, Record(), scene, count)
    for architecture, score in zip(architectures, scores, strict=True):
        assert score.value == pytest.approx(alone(bank, architecture, Record(), scene).value, abs=1e-5)
    assert scores[0].value != scores[1].value
    assert count.evaluated == count.one_by_one == 8


def test_the_same_architecture_twice_is_run_once(scene):
    count = LayerCount()
    first, second = score_all(supernet(), [ALL[3], ALL[3]], Record(), scene, count)
    assert first == second and count.one_by_one == 2 * count.evaluated
    assert score_all(supernet(), [], Record(), scene) == []
    assert score_all(supernet(), [], Once(), scene) == []


def test_each_scorer_has_its_own_digests_and_place(scene):
    scorers = [Once(4.0), Record(2.0), Digits([spec(ONCE, number=9), "params"]), Record(3.0), Params()]
    columns = score_by_all(supernet(), ALL[:5], scorers, scene)
    params = score_all(supernet(), ALL[:5], Params(), scene)
    double, triple = (score_all(supernet(), ALL[:5], Record(base), scene) for base in (2.0, 3.0))
    assert columns[0] == [Score(4.0, {"once": 4.0})] * 5
    assert columns[1] == double and columns[3] == triple and columns[4] == params
    assert [s.value for s in columns[2]] == pytest.approx([9 + p.value / 100 for p in params])


def test_layers_of_scorers_that_share_nothing_are_counted_whole(scene):
    count = LayerCount()
    score_by_all(supernet(), ALL[:4], [Once(), Params()], scene, count)
    layers = sum(len(list(SPACE.blueprint(a).named_layers())) for a in ALL[:4])
    assert (count.evaluated, count.one_by_one) == (2 * layers, 2 * layers)


def test_the_count_says_how_many_times_fewer():
    assert str(LayerCount(1000, 5500)) == "1,000 layer evaluations instead of 5,500 (5.5 times fewer)"
    assert str(LayerCount(1, 5)) == "1 layer evaluations instead of 5 (5.0 times fewer)"
    assert str(LayerCount()) == "no layer evaluations"


def test_what_is_derived_from_evidence_is_computed_once_and_not_taken_over_by_a_changed_copy(scene):
    own, values = dataclasses.replace(scene, seed=7), iter(range(9))
    assert [own.once("key", lambda: next(values)) for _ in range(3)] == [0, 0, 0]
    assert scene.seed == 0
    assert dataclasses.replace(own, seed=8).once("key", lambda: next(values)) == 1
    assert own.once("key", lambda: next(values)) == 0


def test_evidence_without_a_supernet_names_the_scorer(scene):
    assert scene.subnets(Once()) is scene.supernet
    with pytest.raises(ValueError, match="Once compares students with other subnets, but the evidence has no"):
        dataclasses.replace(scene, supernet=None).subnets(Once())
