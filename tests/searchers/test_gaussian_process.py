"""The Gaussian process: its mean, what it asks, and what it finds."""

import dataclasses
import random
import statistics

import numpy as np
import pytest

from kdnas.costs.budget import Budget
from kdnas.searchers.gaussian_process import GaussianProcess
from tests.searchers.table import MACRO, SMALL, cost_of, entries_of, searched, value


def made(seed=0, space=SMALL, **arguments):
    return GaussianProcess(space=space, admits=lambda _: True, rng=random.Random(seed), **arguments)


def played(searcher, evaluations):
    asked = []
    while len(asked) < evaluations:
        batch = searcher.ask(evaluations - len(asked))
        if not batch:
            break
        searcher.tell(entries_of(batch))
        asked += batch
    return asked


def test_the_mean_at_what_was_scored_is_the_score_within_the_noise():
    searcher = made()
    asked = played(searcher, 40)
    model = searcher.model()
    gaps = model.predict(searcher.encoded(asked)) - np.array([value(a) for a in asked])
    assert np.abs(gaps).max() < 3 * model.noise + 1e-3


def test_nothing_is_asked_twice_and_the_whole_space_ends_the_search():
    searcher = made(batch=16)
    asked = played(searcher, 1000)
    assert len(set(asked)) == len(asked) == len(list(SMALL.all()))
    assert "every admitted architecture" in searcher.stopped


def test_the_first_prediction_is_the_argmax_of_the_mean_over_the_whole_space():
    for seed, known in enumerate((20, 4, 6)):
        searcher = made(seed, num_initial=known, batch=1)
        played(searcher, known)
        (chosen,) = searcher.ask(1)
        left = [a for a in SMALL.all() if a not in searcher._scores]
        means = searcher.model().predict(searcher.encoded(left))
        assert chosen == left[int(means.argmax())]


def test_the_mean_alone_decides_however_uncertain_it_is(monkeypatch):
    class Doubting:
        def predict(self, x, return_std=False):
            means = x @ np.arange(x.shape[1])
            return (means, -2 * means) if return_std else means

    searcher = made(num_initial=10, batch=1)
    played(searcher, 10)
    monkeypatch.setattr(searcher, "model", Doubting)
    left = [a for a in SMALL.all() if a not in searcher._scores]
    best = left[int(Doubting().predict(searcher.encoded(left)).argmax())]
    assert searcher.ask(1) == [best]


def test_a_scores_unit_and_offset_do_not_matter():
    def path(scale, offset):
        searcher, asked = made(1, num_initial=8, batch=4), []
        while len(asked) < 32:
            batch = searcher.ask(100)
            asked += batch
            searcher.tell([dataclasses.replace(e, score=scale * e.score + offset) for e in entries_of(batch)])
        return asked

    assert path(1.0, 0.0) == path(1000.0, -70_000.0)


def test_it_finds_better_networks_than_random_search_for_as_many_evaluations():
    def best(name, seed, **arguments):
        return max(e.score for e in searched(name, seed, 45, Budget(macs=40e6), MACRO, **arguments)[0])

    ours = [best("gaussian_process", seed, num_initial=20) for seed in range(5)]
    random_ones = [best("random_search", seed) for seed in range(5)]
    assert statistics.median(ours) > max(random_ones)


def test_a_space_too_large_to_enumerate_is_drawn_from_and_climbed(monkeypatch):
    monkeypatch.setattr("kdnas.searchers.gaussian_process._ENUMERABLE", 10)
    searcher = made(3, MACRO, num_initial=15, pool=200)
    asked = played(searcher, 40)
    assert len(set(asked)) == len(asked) == 40
    assert max(map(value, asked[15:])) > max(map(value, asked[:15]))


def test_only_what_the_budget_admits_is_asked():
    entries, _ = searched("gaussian_process", 1, 40, Budget(macs=30e6), SMALL, num_initial=5)
    assert entries and all(cost_of(e.architecture).macs <= 30e6 for e in entries)


def test_the_same_seed_takes_the_same_path():
    assert played(made(4), 50) == played(made(4), 50) != played(made(5), 50)


@pytest.mark.parametrize("wrong", [{"num_initial": 2}, {"batch": 0}, {"pool": 0}])
def test_what_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        made(**wrong)
