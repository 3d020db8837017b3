"""Correlations, intervals, claims and fronts, against values by hand, SciPy and their definitions."""

import itertools

import numpy as np
import pytest
import scipy.stats

from kdnas import statistics
from kdnas.statistics import (
    compare_accuracy,
    difference_interval,
    interval,
    kendall,
    mean_interval,
    pareto_front,
    percentiles,
    points_lost,
    precision_at_top,
    regret,
    resampled_kendall,
    resampled_max,
    resampled_mean,
    resampled_spearman,
    spearman,
)


def normal(size, seed=0):
    return np.random.default_rng(seed).normal(size=size)


def test_kendall_by_hand_with_ties():
    # Of six pairs, (1, 2) is tied in x; five are concordant or discordant: 4 - 1. tau-b = 3 / sqrt(5 * 6).
    assert kendall([1, 1, 2, 3], [1, 2, 4, 3]) == pytest.approx((4 - 1) / (5 * 6) ** 0.5)
    assert kendall([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)


def test_spearman_by_hand():
    # Rank differences 0, 1, 1: 1 - 6 * 2 / (3 * 8).
    assert spearman([1, 2, 3], [10, 30, 20]) == pytest.approx(0.5)


@pytest.mark.parametrize("statistic", [kendall, spearman])
def test_rank_statistics_are_zero_where_undefined(statistic):
    assert statistic([], []) == 0
    assert statistic([1], [2]) == 0
    assert statistic([1, 1, 1], [1, 2, 3]) == 0
    assert statistic([1, 2, 3], [1, 1, 1]) == 0


@pytest.mark.parametrize("one_by_one, resampled", [(kendall, resampled_kendall), (spearman, resampled_spearman)])
def test_the_interval_is_that_of_the_statistic_on_every_resample_and_follows_its_seed(one_by_one, resampled):
    x = normal(200)
    y = x + normal(200, seed=1)
    low, high = interval(resampled, x, y, resamples=200)
    assert low < one_by_one(x, y) < high
    assert 0.05 < high - low < 0.3
    rng = np.random.default_rng(0)
    rows = [rng.integers(200, size=200) for _ in range(200)]
    assert (low, high) == pytest.approx(np.percentile([one_by_one(x[r], y[r]) for r in rows], [2.5, 97.5]), abs=1e-12)
    assert interval(resampled, x, y, resamples=200) == (low, high)
    assert interval(resampled, x, y, seed=1, resamples=200) != (low, high)


def test_the_bootstrap_resamples_pairs():
    x = np.arange(20)
    assert interval(resampled_kendall, x, 2 * x, resamples=50) == pytest.approx((1, 1))


@pytest.mark.parametrize("indices", [1, 60, 7 * 60])
def test_however_many_resamples_are_computed_at_once_the_interval_is_the_same(indices, monkeypatch):
    x = normal(60)
    whole = [interval(statistic, x, resamples=50) for statistic in (resampled_mean, resampled_max)]
    monkeypatch.setattr(statistics, "_AT_ONCE", indices)
    assert [interval(statistic, x, resamples=50) for statistic in (resampled_mean, resampled_max)] == whole


def test_no_more_indices_are_drawn_at_once_than_memory_has_room_for(monkeypatch):
    sizes = []

    def statistic(x, rows):
        sizes.append(rows.shape)
        return resampled_mean(x, rows)

    monkeypatch.setattr(statistics, "_AT_ONCE", 130)
    interval(statistic, normal(60), resamples=5)
    interval(statistic, normal(200), resamples=2)
    assert sizes == [(2, 60), (2, 60), (1, 60), (1, 200), (1, 200)]


def test_the_mean_and_the_largest_of_every_resample_by_hand():
    x, rows = np.array([3.0, -1.0, 4.0]), np.array([[0, 0, 1], [2, 1, 0], [1, 1, 1]])
    assert resampled_mean(x, rows).tolist() == pytest.approx([5 / 3, 2, -1])
    assert resampled_max(x, rows).tolist() == [3, 4, -1]


def test_a_difference_of_means_has_the_interval_of_the_normal_distribution():
    first, second = normal(2000), normal(2000, seed=1)
    value, low, high = difference_interval(first, second)
    assert value == pytest.approx(first.mean() - second.mean())
    spread = np.std(first - second) / 2000**0.5
    assert [low, high] == pytest.approx([value - 1.96 * spread, value + 1.96 * spread], abs=0.15 * spread)


def test_precision_at_the_top_by_hand():
    truths = np.array([9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0])
    scores = np.array([5.0, 9.0, 1.0, 8.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    assert precision_at_top(truths, truths, 0.3) == 1.0
    assert precision_at_top(scores, truths, 0.3) == pytest.approx(2 / 3)  # 9, 8 and 5 are picked: ranks 2, 4 and 1
    assert precision_at_top(scores, truths, 0.1) == 0.0
    assert precision_at_top(scores, truths, 0.05) == 0.0  # half a network is one network
    # All scores equal: any three of ten, three of which are right.
    assert precision_at_top(np.zeros(10), truths, 0.3) == pytest.approx(0.3)
    # Truths tie at the third place: two networks are equally third, and either is right.
    assert precision_at_top(np.array([3.0, 2.0, 0.0, 1.0]), np.array([3.0, 2.0, 1.0, 1.0]), 0.75) == 1.0


def test_regret_by_hand():
    truths, macs = np.array([90.0, 92.0, 91.0, 95.0]), np.array([10.0, 20.0, 30.0, 40.0])
    scores = np.array([1.0, 2.0, 3.0, 0.0])
    assert regret(scores, truths, macs, 30) == 1.0  # picks 91 where 92 is within the budget
    assert regret(scores, truths, macs, 40) == 4.0
    assert regret(np.array([1.0, 1.0, 1.0, 0.0]), truths, macs, 30) == pytest.approx(1.0)  # the mean of 2, 0 and 1
    assert np.isnan(regret(scores, truths, macs, 5))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_points_lost_are_the_mean_over_all_orders_of_equal_scores(count):
    rng = np.random.default_rng(count)
    scores, truths, costs = (
        rng.integers(3, size=(4, 6)).astype(float),
        rng.normal(size=(4, 6)),
        rng.uniform(size=(4, 6)),
    )
    for bound in (0.5, 1.0):
        expected = []
        for s, t, c in zip(scores, truths, costs, strict=True):
            within = np.flatnonzero(c <= bound)
            orders = [sorted(order, key=lambda i, s=s: -s[i]) for order in itertools.permutations(within)]
            expected.append(np.mean([t[within].max() - t[order[:count]].max() for order in orders]))
        assert points_lost(scores, truths, costs, bound, count) == pytest.approx(expected)


def test_points_lost_of_no_network_are_undefined_and_of_all_zero():
    three = np.arange(3.0)
    assert np.isnan(points_lost(three, three, three, -1, 2)) and points_lost(three, -three, three, 9, 3) == 0


@pytest.mark.parametrize("ties", [False, True])
def test_resampled_correlations_are_scipys_on_the_rows_drawn(ties):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=600), rng.normal(size=600)
    y += x
    if ties:
        x, y = np.round(x), np.round(2 * y)
    draws = rng.integers(600, size=(5, 600))
    tau = [scipy.stats.kendalltau(x[d], y[d]).statistic for d in draws]
    rho = [scipy.stats.spearmanr(x[d], y[d]).statistic for d in draws]
    assert resampled_kendall(x, y, draws) == pytest.approx(tau, abs=1e-6)
    assert resampled_spearman(x, y, draws) == pytest.approx(rho, abs=1e-9)
    assert not resampled_kendall(np.zeros(600), y, draws).any()
    assert not resampled_spearman(np.zeros(600), y, draws).any()


def test_regret_and_precision_of_many_resamples_are_those_of_each():
    scores, truths, costs = np.round(normal(40)), np.round(normal(40, 1), 1), normal(40, 2)
    rows = np.random.default_rng(3).integers(40, size=(30, 40))
    for share in (0.05, 0.3):
        each = [precision_at_top(scores[r], truths[r], share) for r in rows]
        assert precision_at_top(scores[rows], truths[rows], share).tolist() == each
    for bound in (-3.0, -1.5, 0.0):
        each = [float(regret(scores[r], truths[r], costs[r], bound)) for r in rows]
        assert regret(scores[rows], truths[rows], costs[rows], bound) == pytest.approx(each, nan_ok=True)


def test_the_front_by_hand():
    points = [(1, -1), (2, -3), (3, -2), (4, -5), (4, -4), (2, -3)]
    assert pareto_front(points).tolist() == [0, 1, 3, 5]
    assert pareto_front(points, distinct=True).tolist() == [0, 1, 3]
    assert pareto_front([]).tolist() == []


@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 7, 60, 200])
def test_the_front_is_what_no_other_dominates(objectives, count):
    # Small ranges: many ties in one objective and in all.
    points = np.random.default_rng((objectives, count)).integers(0, 9, (count, objectives))
    dominated = [any((q <= p).all() and (q < p).any() for q in points) for p in points]
    expected = [i for i in range(count) if not dominated[i]]
    assert pareto_front(points).tolist() == expected
    first = {tuple(points[i]): i for i in reversed(expected)}
    assert pareto_front(points, distinct=True).tolist() == sorted(first.values())


UNCLEAR = "the two are not distinguishable"


def images(both, first, second, neither):
    """Hits of two networks: right by both, by the first alone, by the second alone, by neither."""
    hits = np.array([1.0] * (both + first) + [0.0] * (second + neither))
    other = np.array([1.0] * both + [0.0] * first + [1.0] * second + [0.0] * neither)
    return hits, other


def exact_ends(difference):
    """The 2.5 and 97.5 % points of the mean of a resample of -1, 0 and 1, from its whole distribution."""
    count = len(difference)
    single = np.array([(difference == value).mean() for value in (-1, 0, 1)])
    total = np.ones(1)
    for _ in range(count):
        total = np.convolve(total, single)
    below = total.cumsum()
    return [(np.searchsorted(below, level) - count) / count for level in (0.025, 0.975)]


def test_the_gain_is_the_first_networks_accuracy_less_the_seconds():
    hits, other = images(both=50, first=20, second=5, neither=25)
    gain, low, high = difference_interval(hits, other)
    assert gain == pytest.approx(0.70 - 0.55)
    assert 0 < low < gain < high
    back, back_low, back_high = difference_interval(other, hits)
    assert back == pytest.approx(-gain)
    assert (back_low, back_high) == pytest.approx((-high, -low))


@pytest.mark.parametrize("counts", [(50, 20, 5, 25), (90, 6, 0, 4), (10, 0, 12, 78), (100, 40, 40, 20), (0, 200, 0, 0)])
def test_the_ends_are_those_of_the_whole_distribution_of_paired_resamples(counts):
    hits, other = images(*counts)
    _, low, high = difference_interval(hits, other, resamples=4000)
    expected = exact_ends(hits - other)
    # 4000 resamples tell an end within two images.
    assert [low, high] == pytest.approx(expected, abs=2.01 / len(hits))


def test_the_ends_are_those_of_all_resamples_at_once():
    hits, other = images(both=30, first=9, second=4, neither=17)
    places = np.random.default_rng(0).integers(60, size=(2000, 60))
    means = np.sort(hits[places].mean(1) - other[places].mean(1))
    # Linear between order statistics: place 0.025 * 1999 = 49.975 from either end.
    expected = [means[49] + 0.975 * (means[50] - means[49]), means[1949] + 0.025 * (means[1950] - means[1949])]
    assert list(difference_interval(hits, other)[1:]) == pytest.approx(expected, abs=1e-12)


def test_images_are_resampled_in_pairs():
    # Six wins of a hundred and no loss: resampled apart, the two accuracies would overlap.
    hits, other = images(both=47, first=6, second=0, neither=47)
    _, low, high = difference_interval(hits, other)
    assert low == pytest.approx(0.02, abs=0.011)
    assert high == pytest.approx(0.11, abs=0.011)


def test_the_same_hits_have_no_gain_and_always_hits_the_whole():
    hits, other = images(both=10, first=0, second=0, neither=5)
    assert difference_interval(hits, other) == (0.0, 0.0, 0.0)
    assert difference_interval(*images(0, 7, 0, 0)) == (1.0, 1.0, 1.0)


def test_a_mean_over_several_networks_is_a_second_network():
    hits = np.array([1.0, 1.0, 0.0, 1.0])
    several = np.array([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 1.0, 1.0]])
    assert difference_interval(hits, several.mean(0))[0] == pytest.approx(0.75 - 0.5)


def test_a_surely_better_network_has_its_gain_and_no_excuse():
    claim = compare_accuracy("student", *images(10, 30, 0, 10), "the control", "distillation did not help")
    assert claim["value"] == pytest.approx(0.6)
    low, high = claim["interval"]
    assert 0.4 < low < 0.6 < high < 0.8
    expected = f"The student's test accuracy less that of the control: +60.00 points [{100 * low:+.2f}, "
    assert claim["sentence"] == f"{expected}{100 * high:+.2f}]."


def test_a_surely_worse_network_is_said_to_be_worse():
    claim = compare_accuracy("student", *images(10, 0, 30, 10), "the control", "distillation did not help")
    assert claim["value"] == pytest.approx(-0.6)
    assert claim["interval"][0] < -0.6 < claim["interval"][1] < 0
    assert "-60.00 points [-" in claim["sentence"]
    assert claim["sentence"].endswith("]. Here distillation did not help.")
    assert UNCLEAR not in claim["sentence"]


def test_a_surely_worse_network_without_words_for_it_has_the_numbers_alone():
    claim = compare_accuracy("ensemble", *images(10, 0, 30, 10), "the teacher")
    assert claim["sentence"].startswith("The ensemble's test accuracy less that of the teacher: -60.00 points")
    assert claim["sentence"].endswith("].")


@pytest.mark.parametrize("counts", [(10, 8, 6, 6), (10, 6, 8, 6), (20, 0, 0, 10)])
def test_an_interval_that_holds_zero_is_not_distinguishable_whatever_the_sign(counts):
    claim = compare_accuracy("student", *images(*counts), "the control", "distillation did not help")
    assert claim["interval"][0] <= 0 <= claim["interval"][1]
    assert claim["sentence"].endswith("On 30 test images and one seed the two are not distinguishable.")
    assert "did not help" not in claim["sentence"]


def test_one_seed_as_a_row_is_the_same_as_without_that_axis():
    first, second = images(20, 12, 7, 9)
    assert statistics.difference_interval(first[None], second[None]) == statistics.difference_interval(first, second)


def test_over_several_seeds_the_interval_is_that_of_the_normal_distribution():
    """Accuracies that vary by seed far more than by image: the variance is the sum of both sides' s^2 / S."""
    rng = np.random.default_rng(3)
    accuracies = rng.uniform(0.2, 0.8, 12), rng.uniform(0.2, 0.8, 8)
    first, second = ((rng.random((len(side), 1000)) < side[:, None]).astype(float) for side in accuracies)
    value, low, high = statistics.difference_interval(first, second)
    means = first.mean(1), second.mean(1)
    assert value == pytest.approx(means[0].mean() - means[1].mean())
    half = 1.96 * np.sqrt(sum(side.var(ddof=1) / len(side) for side in means))
    assert (high - low) / 2 == pytest.approx(half, rel=0.08)


def test_seeds_that_agree_add_nothing_and_are_counted_in_the_sentence():
    first, second = images(30, 14, 12, 9)
    whole = compare_accuracy("student", np.stack([first] * 3), np.stack([second] * 2), "the other")
    single = compare_accuracy("student", first, second, "the other")
    assert whole["value"] == pytest.approx(single["value"])
    assert whole["interval"] == pytest.approx(single["interval"], abs=0.02)
    assert whole["sentence"].endswith("On 65 test images and 3 seeds the two are not distinguishable.")


def test_the_interval_of_a_measure_resamples_images_before_it_measures():
    grades = np.random.default_rng(0).random((200, 2))
    low, high = mean_interval(grades, quality=lambda means: means[..., 0] / means.sum(-1))
    assert low < grades[:, 0].mean() / grades.mean(0).sum() < high
    ratio = np.array([grades[rows, 0].mean() / grades[rows].mean(0).sum() for rows in _resamples(200, 2000)])
    assert (low, high) == pytest.approx(percentiles(ratio), rel=0.02)
    assert mean_interval(grades[:, 0]) == pytest.approx(interval(resampled_mean, grades[:, 0], resamples=2000))


def _resamples(count, times):
    return np.random.default_rng(1).integers(count, size=(times, count))
