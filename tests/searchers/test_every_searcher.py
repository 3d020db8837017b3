"""What holds for every searcher, on a table."""

import random
import statistics

import pytest

from kdnas.costs.budget import Budget
from kdnas.ranking.loop import entry_of
from kdnas.scorers.base import Score
from kdnas.searchers.base import Searcher
from kdnas.searchers.evolution import Evolution
from kdnas.specs import algorithms, find_spec
from kdnas.tables import load_space
from tests.searchers.table import MACRO, SMALL, cost_of, searched, value

SEARCHERS = [
    name
    for name in sorted(algorithms("kdnas.searchers"))
    if name in ("evolution", "exhaustive", "nsga2", "optuna_sampler", "random_search")
]
TIGHT = Budget(macs=30e6, params=1_000_000)


@pytest.fixture(scope="module")
def within():
    return {a for a in SMALL.all() if TIGHT.admits(cost_of(a))}


@pytest.mark.parametrize("name", SEARCHERS)
def test_never_over_budget_never_twice_and_says_why_it_stops(name, within):
    assert 10 < len(within) < 70
    entries, why = searched(name, 0, 1000, TIGHT, SMALL)
    codes = [e.code for e in entries]
    assert len(set(codes)) == len(codes)
    assert all(e.architecture in within for e in entries)
    assert "architecture was" in why
    # A space this small within the budget is nearly seen whole before a searcher gives up.
    assert len(entries) >= 0.9 * len(within)


@pytest.mark.parametrize("name", SEARCHERS)
def test_the_same_seed_takes_the_same_path_and_another_another(name):
    first = [e.code for e in searched(name, 3, 40)[0]]
    assert [e.code for e in searched(name, 3, 40)[0]] == first
    assert len(first) == 40
    if name != "exhaustive":
        assert [e.code for e in searched(name, 4, 40)[0]] != first


@pytest.mark.parametrize("name", ["evolution", "nsga2"])
def test_a_population_smaller_than_a_batch_is_drawn_first(name):
    space = load_space("toy")
    made = find_spec("kdnas.searchers", name).build(
        Searcher, space=space, admits=lambda a: True, rng=random.Random(0), population=3, batch=8
    )
    asked = made.ask(100)
    assert len(set(asked)) == 8
    made.tell([entry_of(space, a, Score(i / 8, {}), 0.0, ("", "", 1)) for i, a in enumerate(asked)])
    assert len(set(made.ask(100)) - set(asked)) > 0


@pytest.mark.parametrize(
    "wrong", [{"population": 0}, {"tournament": 0}, {"batch": 0}, {"rate": 1.5}, {"crossover": -0.1}]
)
def test_settings_of_evolution_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Evolution(space=load_space("toy"), admits=lambda a: True, rng=random.Random(0), **wrong)


def ranks(name, evaluations=100, seeds=20):
    """Per seed, how many of all networks are better than the best found."""
    every = sorted((value(a) for a in MACRO.all()), reverse=True)
    return [every.index(max(e.score for e in searched(name, seed, evaluations)[0])) for seed in range(seeds)]


def test_a_hundred_evaluations_of_evolution_find_better_networks_than_random_ones():
    evolved, drawn = ranks("evolution"), ranks("random_search")
    assert statistics.median(evolved) * 3 <= statistics.median(drawn)
