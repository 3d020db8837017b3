import random
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from kdnas.costs.count import cost
from kdnas.distillers.attentive import Attentive, CostPrior
from kdnas.distillers.base import Step
from kdnas.distillers.sandwich import Sandwich
from kdnas.distillers.single_path import SinglePath
from kdnas.settings import Recipe
from kdnas.specs import spec
from kdnas.training.loop import Training
from tests.distillers.spaces import DATA, TOY, batch, supernet, watched

INNER = spec(Sandwich, terms=())
MACS = [cost(TOY.blueprint(one)).macs for one in TOY.all()]
BIN = (max(MACS) - min(MACS)) / 5


def made(**arguments):
    found = Attentive(inner=INNER, bin_macs=BIN, num_sampled=500, **arguments)
    found.prepare(supernet(), batch())
    return found


def test_the_prior_is_the_share_of_random_networks_per_bin():
    prior = CostPrior(TOY, BIN, 400)
    rng = random.Random(0)
    places = Counter(round(cost(TOY.blueprint(TOY.sample(rng))).macs / BIN) for _ in range(400))
    assert prior.share == {place: places[place] / 400 for place in sorted(places)}
    assert sum(prior.share.values()) == pytest.approx(1)
    for place in prior.bins:
        assert sum(prior.options[place, "stage0.depth"].values()) == places[place]


def test_sampled_costs_follow_the_prior_and_lie_in_their_bin():
    prior, rng = CostPrior(TOY, BIN, 500), random.Random(3)
    drawn, hits = Counter(), 0
    for _ in range(600):
        place = prior.sample_bin(rng)
        drawn[place] += 1
        hits += prior.bin(prior.sample(place, rng)) == place
    assert hits == 600
    for place, share in prior.share.items():
        assert abs(drawn[place] / 600 - share) < 0.07, place


def test_options_follow_their_share_in_the_bin():
    prior, rng = CostPrior(TOY, BIN, 500), random.Random(1)
    low, high = prior.bins[0], prior.bins[-1]
    assert all(prior.sample(low, rng)["stage0.depth"] == 1 for _ in range(20))
    assert sum(prior.sample(high, rng)["stage0.depth"] == 2 for _ in range(20)) > 10


@pytest.mark.parametrize(("pick", "best"), [("best", min), ("worst", max)])
def test_the_candidate_with_the_lowest_or_the_highest_loss_is_taken(pick, best):
    model, one, found = supernet(), batch(), made(pick=pick, num_candidates=5)
    distinct = 0
    for seed in range(5):
        rng = random.Random(seed)
        place = found.prior.sample_bin(rng)
        candidates = [found.prior.sample(place, rng) for _ in range(5)]
        losses = {
            a: F.cross_entropy(model(one.images, a, batch_statistics=True).logits, one.labels).item()
            for a in candidates
        }
        distinct += len(losses) > 1
        assert found.child(model, one, random.Random(seed)) == best(losses, key=losses.get)
    assert distinct > 1


def test_scoring_touches_neither_gradients_nor_buffers():
    model, one, found = supernet(), batch(), made()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen = watched(model)
    for seed in range(3):
        found.child(model, one, random.Random(seed))
    assert len(seen) == 9
    assert not any(grad for _, _, grad in seen)
    assert all(p.grad is None for p in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not model.uses


def test_one_candidate_is_the_sandwich_with_a_prior_on_cost():
    model, found, step = supernet(), made(num_candidates=1), Step(2, 10, 0)
    seen = watched(model)
    names = [name for name, _ in found.losses(model, batch(), step)]
    assert names == ["largest", "smallest", "random", "random"]
    rng = step.rng("attentive")
    expected = [found.prior.sample(found.prior.sample_bin(rng), rng) for _ in range(2)]
    assert [one for one, _, _ in seen] == [TOY.largest, TOY.smallest, *expected]


def test_a_resumed_training_is_an_uninterrupted_one():
    def training():
        return Training(supernet(), made(), DATA, None, Recipe(steps=4, batch_size=12, learning_rate=0.05))

    whole, first, resumed = training(), training(), training()
    for _ in range(4):
        whole.step()
    for _ in range(2):
        first.step()
    resumed.load(first.state())
    while not resumed.done:
        resumed.step()
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def test_settings_without_sense_are_refused():
    with pytest.raises(ValueError, match="`pick` must be one of best, worst"):
        Attentive(pick="middle")
    with pytest.raises(ValueError, match="num_candidates"):
        Attentive(num_candidates=0)
    with pytest.raises(ValueError, match="sandwich"):
        Attentive(inner=spec(SinglePath))
