import logging
import random
import statistics

import optuna
import pytest

from kdnas.costs.budget import Budget
from kdnas.searchers._optuna import quiet
from kdnas.searchers.optuna_sampler import OptunaSampler
from kdnas.specs import spec
from kdnas.tables import load_space
from tests.searchers.table import searched


def made(**arguments):
    return OptunaSampler(space=load_space("toy"), admits=lambda a: True, rng=random.Random(0), **arguments)


def test_tpe_learns_what_random_search_does_not():
    def best(name, seed):
        return max(e.score for e in searched(name, seed, 80)[0])

    tpe = [best("optuna_sampler", seed) for seed in range(3)]
    drawn = [best("random_search", seed) for seed in range(3)]
    assert statistics.mean(tpe) > statistics.mean(drawn)


@pytest.mark.parametrize("sampler", ["tpe", "nsgaii", "nsgaiii", "random", "RandomSampler", "bruteforce", "qmc"])
def test_samplers_of_optuna_are_known_by_name(sampler):
    entries, _ = searched("optuna_sampler", 0, 24, Budget(macs=60e6), sampler=sampler)
    assert len(entries) == 24
    assert all(e.macs <= 60e6 for e in entries)


class OnlyTheSmallest(optuna.samplers.BaseSampler):
    """A sampler that never proposes anything else."""

    def __init__(self, seed=None):
        del seed

    def infer_relative_search_space(self, study, trial):
        return {}

    def sample_relative(self, study, trial, search_space):
        return {}

    def sample_independent(self, study, trial, name, distribution):
        return distribution.choices[0]


def test_a_sampler_of_ones_own_that_repeats_itself_ends_in_random_search():
    path = "tests.searchers.test_optuna_sampler:OnlyTheSmallest"
    entries, _ = searched("optuna_sampler", 0, 30, sampler=path)
    assert len({e.code for e in entries}) == 30


def test_choices_that_do_not_exist_are_not_suggested():
    searcher = made(batch=20)
    asked = searcher.ask(20)
    shallow = [a for a in asked if a["stage0.depth"] == 1]
    assert shallow
    for trial in searcher.study.trials:
        deep = trial.params["stage0.depth"] == 2
        assert ("stage0.layer1.width" in trial.params) == deep


def test_every_draw_is_told_back_with_its_score_or_as_a_violation():
    space = load_space("toy")
    searcher = OptunaSampler(space=space, admits=lambda a: a["stage0.depth"] == 1, rng=random.Random(0), batch=6)
    from kdnas.ranking.loop import entry_of
    from kdnas.scorers.base import Score

    for value in (1.0, 2.0):
        asked = searcher.ask(6)
        searcher.tell([entry_of(space, a, Score(value, {}), 0.0, ("", "", 0)) for a in asked])
    trials = searcher.study.trials
    assert all(t.state is optuna.trial.TrialState.COMPLETE for t in trials)
    for trial in trials:
        violated = trial.constraints["budget"] > 0
        assert violated == (trial.params["stage0.depth"] == 2)
        assert trial.value in ((1.0,) if violated else (1.0, 2.0))
    assert searcher.study.best_trial.params["stage0.depth"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sampler": "tpee"}, "Did you mean 'tpe'"),
        ({"sampler": "grid"}, "`seed` alone"),
        ({"sampler": "collections:Counter"}, "BaseSampler"),
        ({"batch": 0}, "at least 1"),
    ],
)
def test_wrong_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        made(**arguments)


def test_it_is_quiet_and_leaves_optunas_logging_as_it_was(capfd):
    before = optuna.logging.get_verbosity()
    made().ask(3)
    assert optuna.logging.get_verbosity() == before == logging.INFO
    assert capfd.readouterr() == ("", "")


def test_whoever_leaves_first_optunas_logging_is_as_it_was_in_the_end():
    """As of two threads: the second found the log silenced by the first."""
    first, second = quiet(), quiet()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert optuna.logging.get_verbosity() == logging.ERROR
    second.__exit__(None, None, None)
    assert optuna.logging.get_verbosity() == logging.INFO


def test_its_arguments_are_plain():
    made = spec(OptunaSampler, sampler="nsgaii", batch=4)
    assert made.to_json()["arguments"] == {"sampler": "nsgaii", "batch": 4}
