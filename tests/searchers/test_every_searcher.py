"""What holds for every searcher, on a table."""

import random
import statistics

import pytest

from kdnas.costs.budget import Budget
from kdnas.ranking.loop import entry_of
from kdnas.scorers.base import Score
from kdnas.searchers.base import Searcher
from kdnas.searchers.evolution import Evolution
from kdnas.specs import find_spec
from kdnas.tables import load_space
from kdnas.testing.searchers import SearcherContract
from tests.contracts import contracts
from tests.searchers.table import MACRO, SMALL, cost_of, searched, value

CONTRACTS = contracts(
    "kdnas.searchers",
    SearcherContract,
    {
        "controller": {"repeats": True, "coverage": 0.6},
        # Populations small enough to breed: by default the whole space would be drawn before the first child.
        "evolution": {"arguments": {"population": 6, "tournament": 3, "batch": 4}},
        "nsga2": {"arguments": {"population": 6, "batch": 4}},
        "exhaustive": {"draws": False, "coverage": 1.0},
        "gaussian_process": {"coverage": 1.0, "arguments": {"num_initial": 6}},
    },
)
globals().update({contract.__name__: contract for contract in CONTRACTS.values()})

TIGHT = Budget(macs=30e6, params=1_000_000)
every_searcher = pytest.mark.parametrize("name", sorted(CONTRACTS))


@pytest.fixture(scope="module")
def within():
    return {a for a in SMALL.all() if TIGHT.admits(cost_of(a))}


@every_searcher
def test_never_over_budget_never_twice_and_says_why_it_stops(name, within):
    assert 10 < len(within) < 70
    entries, why = searched(name, 0, 1000, TIGHT, SMALL)
    codes = [e.code for e in entries]
    assert len(set(codes)) == len(codes)
    assert all(e.architecture in within for e in entries)
    assert ("no new architecture" if name == "controller" else "architecture was") in why
    # A space this small within the budget is nearly seen whole before a searcher gives up.
    assert len(entries) >= CONTRACTS[name].coverage * len(within)


@every_searcher
def test_the_same_seed_takes_the_same_path_and_another_another(name):
    first = [e.code for e in searched(name, 3, 40)[0]]
    assert [e.code for e in searched(name, 3, 40)[0]] == first
    assert len(first) == 40
    if CONTRACTS[name].draws:
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
