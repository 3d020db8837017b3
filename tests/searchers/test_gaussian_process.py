"""The Gaussian process: its mean, what it asks, and what it finds."""

import random
import statistics

import numpy as np
import pytest

from kdnas.cost import Budget
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
    noise = np.sqrt(model.kernel_.k2.noise_level) * np.std([value(a) for a in asked])
    gaps = model.predict(searcher.encoded(asked)) - np.array([value(a) for a in asked])
    assert np.abs(gaps).max() < 3 * noise + 1e-3


def test_nothing_is_asked_twice_and_the_whole_space_ends_the_search():
    searcher = made(batch=16)
    asked = played(searcher, 1000)
    assert len(set(asked)) == len(asked) == len(list(SMALL.all()))
    assert "every admitted architecture" in searcher.stopped


def test_the_first_prediction_is_the_argmax_of_the_mean_over_the_whole_space():
    searcher = made(num_initial=20, batch=1)
    played(searcher, 20)
    (chosen,) = searcher.ask(1)
    left = [a for a in SMALL.all() if a not in searcher._scores]
    means = searcher.model().predict(searcher.encoded(left))
    assert chosen == left[int(means.argmax())]


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
