"""Shares within a budget: what is tried, in which order, and that nothing is over it."""

import random

import pytest
import torch

from kdnas.conversion.removal import ResidualBlock
from kdnas.conversion.shares import ShareSearch, agreement, leading
from kdnas.costs.count import cost
from kdnas.network import batch_statistics
from tests.conversion.test_reconstruction import IMAGES, Mixed, lived, parts

NETWORK, REMOVAL = parts(lived(Mixed()))
WHOLE = cost(NETWORK.blueprint).macs


def search(budget, score=lambda counts: 0.0, **options):
    return ShareSearch(REMOVAL, lambda blueprint: cost(blueprint).macs <= budget, score, **options)


def groups():
    return [unit for unit in REMOVAL.units if not isinstance(unit, ResidualBlock)]


@pytest.mark.parametrize("share", [0.75, 0.5, 0.25])
def test_every_candidate_is_within_the_budget_and_near_it(share):
    found = search(share * WHOLE)
    found.run(30, random.Random(0))
    costs = [cost(REMOVAL.blueprint(candidate.counts)).macs for candidate in found.candidates]
    assert len(costs) == 30 and max(costs) <= share * WHOLE
    assert sorted(costs)[15] > 0.85 * share * WHOLE


def test_the_first_candidate_has_equal_shares_and_the_next_miss_a_block_each():
    found = search(0.5 * WHOLE)
    found.run(4, random.Random(0))
    first = found.candidates[0].counts
    shares = [first[group.key] / group.size for group in groups()]
    assert max(shares) - min(shares) < 0.05 and found.equal_shares() == first
    blocks = [unit.key for unit in REMOVAL.units if isinstance(unit, ResidualBlock)]
    assert [first[key] for key in blocks] == [1] * len(blocks)
    for key, candidate in zip(blocks, found.candidates[1:], strict=False):
        assert [k for k in blocks if not candidate.counts[k]] == [key]


def test_the_search_finds_more_than_equal_shares_where_the_score_has_a_direction():
    key = groups()[-1].key
    found = search(0.5 * WHOLE, lambda counts: counts[key])
    found.run(60, random.Random(0))
    assert found.best.counts[key] > found.candidates[0].counts[key]
    later = sum(candidate.score for candidate in found.candidates[40:]) / 20
    assert later > sum(candidate.score for candidate in found.candidates[4:20]) / 16


def test_widths_have_a_floor_and_a_divisor():
    found = search(0.3 * WHOLE, divisor=8)
    found.run(20, random.Random(0))
    for candidate in found.candidates:
        for group in groups():
            assert candidate.counts[group.key] % 8 == 0 and candidate.counts[group.key] >= 8
    free = search(0.08 * WHOLE)
    free.run(40, random.Random(0))
    least = {group.key: min(candidate.counts[group.key] for candidate in free.candidates) for group in groups()}
    assert all(least[group.key] >= max(1, -(-group.size // 16)) for group in groups())
    assert any(least[group.key] == max(1, -(-group.size // 16)) for group in groups())


def test_finalists_are_the_best_that_differ():
    found = search(0.5 * WHOLE, lambda counts: counts[groups()[0].key] + counts[groups()[1].key] / 100)
    found.run(40, random.Random(0))
    finalists = found.finalists(3)
    assert finalists[0] == found.best and len(finalists) == 3
    scores = [candidate.score for candidate in finalists]
    assert scores == sorted(scores, reverse=True)
    for i, first in enumerate(finalists):
        for second in finalists[i + 1 :]:
            assert any(abs(first.counts[k] - second.counts[k]) >= 0.05 * n for k, n in REMOVAL.sizes.items())
    assert len(found.finalists(1000)) < len(found.candidates)  # repetitions are left out


def _slow(blueprint):
    """A prediction that is the further below the truth the smaller the network is."""
    return 1.0 + 0.3 * (1 - cost(blueprint).macs / WHOLE)


def test_the_best_candidates_and_equal_shares_are_as_large_as_their_measured_cost_admits():
    budget = 0.5 * WHOLE
    predicted = lambda blueprint, times=1.0: times * cost(blueprint).macs <= budget  # noqa: E731
    key = groups()[-1].key
    found = ShareSearch(REMOVAL, predicted, lambda counts: counts[key], measured=_slow)
    found.run(40, random.Random(0), keep=3)
    assert 2 <= len(found.candidates) <= 4
    tilts = [candidate.tilts for candidate in found.candidates]
    assert dict.fromkeys((group.key for group in groups()), 1.0) in tilts
    for candidate in found.candidates:
        blueprint = REMOVAL.blueprint(candidate.counts)
        real = _slow(blueprint) * cost(blueprint).macs
        assert 0.85 * budget < real <= budget and candidate.score == candidate.counts[key]
    equal = REMOVAL.blueprint(found.equal_shares())
    assert 0.9 * budget < _slow(equal) * cost(equal).macs <= budget and cost(equal).macs < 0.9 * budget


def test_a_prediction_that_is_too_high_leaves_no_capacity_unused():
    predicted = lambda blueprint, times=1.0: times * cost(blueprint).macs <= 0.5 * WHOLE  # noqa: E731
    found = ShareSearch(REMOVAL, predicted, lambda counts: 0.0, measured=lambda blueprint: 0.7)
    found.run(10, random.Random(0))
    for candidate in found.candidates:
        macs = cost(REMOVAL.blueprint(candidate.counts)).macs
        whole_widths = all(candidate.counts[group.key] == group.size for group in groups())  # without a block
        assert macs <= 0.5 / 0.7 * WHOLE and (whole_widths or macs > 0.62 * WHOLE)
    equal = REMOVAL.blueprint(found.equal_shares())
    assert 0.62 * WHOLE < cost(equal).macs


def test_networks_that_are_all_measured_over_the_budget_are_refused():
    predicted = lambda blueprint, times=1.0: times * cost(blueprint).macs <= 0.5 * WHOLE  # noqa: E731
    found = ShareSearch(REMOVAL, predicted, lambda counts: 0.0, measured=lambda blueprint: 1e3)
    with pytest.raises(ValueError, match="no share of the channels is within the budget"):
        found.run(5, random.Random(0))


def test_a_search_that_has_no_time_tries_one_candidate():
    found = search(0.5 * WHOLE)
    found.run(20, random.Random(0), seconds=0.0)
    assert len(found.candidates) == 1
    found.run(20, random.Random(0), seconds=1e9)
    assert len(found.candidates) == 20


def test_a_budget_below_every_floor_is_refused():
    found = search(10)
    assert found.equal_shares() is None
    with pytest.raises(ValueError, match="no share of the channels is within the budget"):
        found.run(3, random.Random(0))


def test_a_budget_that_only_networks_without_several_blocks_meet_is_met():
    keys = frozenset(unit.key for unit in REMOVAL.units if isinstance(unit, ResidualBlock))
    tilts = dict.fromkeys((group.key for group in groups()), 1.0)
    without = search(10)._counts(0.0, tilts, keys)
    found = search(cost(REMOVAL.blueprint(without)).macs)
    assert len(keys) > 1 and all(found.fit(tilts, keys - {key}) is None for key in keys)
    found.run(9, random.Random(0))
    assert found.candidates and not any(candidate.counts[key] for candidate in found.candidates for key in keys)


def test_the_same_seed_tries_the_same():
    first, second, third = (search(0.5 * WHOLE) for _ in range(3))
    for found, seed in ((first, 0), (second, 0), (third, 1)):
        found.run(12, random.Random(seed))
    assert first.candidates == second.candidates != third.candidates


def test_agreement_is_zero_with_itself_and_the_mean_divergence_else():
    with torch.no_grad():
        with batch_statistics(NETWORK):
            target = NETWORK(IMAGES).logits.log_softmax(1)
        assert agreement(NETWORK, IMAGES, target) == pytest.approx(0, abs=1e-6)
        wanted = torch.full_like(target, 1 / target.shape[1]).log()
        own = target.double()
        expected = float((wanted.exp() * (wanted - own)).sum(1).mean())
        assert agreement(NETWORK, IMAGES, wanted) == pytest.approx(-expected, rel=1e-5)
        # One batch or several of equal content: the same statistics.
        double = IMAGES.repeat(2, 1, 1, 1)
        assert agreement(NETWORK, double, wanted.repeat(2, 1), batch=len(IMAGES)) == pytest.approx(-expected, rel=1e-4)


def test_leading_channels_are_kept():
    counts = search(0.5 * WHOLE).equal_shares()
    masks = leading(REMOVAL, counts)
    for unit in REMOVAL.units:
        assert int(masks[unit.key].sum()) == counts[unit.key] and masks[unit.key][: counts[unit.key]].all()
