"""What a later phase would refuse is refused before anything is written or trained."""

import dataclasses
import re

import pytest
import torch
from safetensors.torch import save_file

from kdnas.costs.budget import Budget
from kdnas.jobs import train as job
from kdnas.jobs._checks import check_experiment, open_run
from kdnas.settings import Retrain, Search
from kdnas.specs import parse_spec, spec
from kdnas.supernet import Supernet
from tests.toy import data, experiment


def changed(**changes):
    """The small experiment with changes of its training, its search or the search's own fields."""
    base = experiment()
    train = {name: value for name, value in changes.items() if hasattr(base.train, name)}
    search = {name: value for name, value in changes.items() if name not in train}
    return dataclasses.replace(
        base, train=dataclasses.replace(base.train, **train), search=dataclasses.replace(base.search, **search)
    )


def scorer(text):
    return parse_spec("kdnas.scorers", text)


WRONG = {
    "an option of the scorer": ({"scorer": scorer("short_training,steps=0")}, "steps"),
    "an option of the contrast": ({"contrast": scorer("short_training,steps=0")}, "steps"),
    "an option of the searcher": ({"searcher": parse_spec("kdnas.searchers", "evolution,population=0")}, "population"),
    "an option of the distiller": ({"distiller": parse_spec("kdnas.distillers", "sandwich,num_random=-1")}, "random"),
    "a pruner without rungs": ({"pruner": spec("optuna.pruners:MedianPruner")}, "a pruner needs a scorer with"),
    "an option of the pruner": (
        {"pruner": spec("optuna.pruners:MedianPruner", startups=3), "scorer": scorer("short_training,num_rungs=3")},
        "startups",
    ),
    "no weights for the scorer": ({"distiller": None}, "the scorer rank_ensemble needs trained supernet weights"),
    "no weights for the contrast": (
        {"distiller": None, "scorer": scorer("params"), "contrast": scorer("accuracy")},
        "the scorer accuracy needs trained supernet weights",
    ),
    "no blocks for an exact search": ({"exact": True}, "an exact search needs a supernet trained by block_wise"),
    "no weights file": ({"weights": "none.safetensors"}, "no weights file"),
}


@pytest.mark.parametrize("name", WRONG)
def test_it_is_refused_before_anything_is_written_or_trained(name, tmp_path, monkeypatch):
    changes, message = WRONG[name]
    monkeypatch.setattr(job, "fit_teacher", lambda *_: pytest.fail("a teacher is fitted"))
    with pytest.raises(ValueError, match=message):
        job.train(changed(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_second_search_is_checked_too(tmp_path):
    second = Search(searcher=parse_spec("kdnas.searchers", "evolution,population=0"))
    with pytest.raises(ValueError, match="population"):
        job.train(dataclasses.replace(experiment(), second=second), tmp_path / "run")


def test_weights_of_another_network_are_described(tmp_path):
    space = experiment().train.space.fitted(classes=3, image_channels=3)
    state = Supernet(space).state_dict()
    names = list(state)
    del state[names[0]]
    state[names[1]] = torch.zeros(5)
    save_file({**state, "more": torch.zeros(1)}, tmp_path / "w.safetensors")
    settings = changed(weights=str(tmp_path / "w.safetensors"))
    with pytest.raises(ValueError, match="does not fit the network: ") as refused:
        job.train(settings, tmp_path / "run")
    assert f"1 tensor of the network missing, such as {names[0]}" in str(refused.value)
    assert "1 tensor that the network does not have, such as more" in str(refused.value)
    assert f"1 of another shape, such as {names[1]} with (5,) instead of (" in str(refused.value)


def test_what_is_right_passes():
    check_experiment(experiment(), experiment().train.space.fitted(classes=3, image_channels=data().channels))


def test_initial_candidates_are_at_most_as_many_as_evaluations():
    with pytest.raises(ValueError, match=r"`initial` must be at most 5 \(`num_evaluations`\), got 6"):
        Search(num_evaluations=5, initial=6)


@pytest.fixture
def begun(tmp_path):
    """A run in which the supernet was trained, by its manifest."""
    folder = tmp_path / "my run"
    open_run(folder, experiment()).finish("train", steps=1)
    return folder


def test_where_only_the_budget_differs_the_command_that_goes_on_is_named(begun):
    other = changed(budget=Budget(macs="90k", latency="5ms"))
    with pytest.raises(ValueError, match=r"search.budget.macs is 70000 there and 90000 here") as refused:
        open_run(begun, other)
    command = f"kdnas search '{begun}' --budget macs=90000.0 --budget latency=0.005s"
    assert f"Only the budget differs: `{command}` searches what is trained there." in str(refused.value)
    assert Budget.parse(["macs=90000.0", "latency=0.005s"]) == other.search.budget


@pytest.mark.parametrize("changes", [{"budget": Budget()}, {"budget": Budget(macs=1e5), "num_evaluations": 3}])
def test_other_differences_have_no_such_command(begun, changes):
    with pytest.raises(ValueError, match="with other settings") as refused:
        open_run(begun, changed(**changes))
    assert "kdnas search" not in str(refused.value)


def test_a_run_that_is_not_trained_is_trained_first(tmp_path):
    open_run(tmp_path / "run", experiment()).finish("teacher", steps=1)
    with pytest.raises(ValueError, match="Train it to its end with the settings of the run, then `kdnas search"):
        open_run(tmp_path / "run", changed(budget=Budget(macs="90k")))


def test_the_corrected_command_of_a_failed_run_is_taken_and_checked_again(tmp_path, monkeypatch):
    monkeypatch.setattr(job, "fit_teacher", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        job.train(experiment(), tmp_path / "run")
    with pytest.raises(ValueError, match="infeasible"):
        job.train(changed(budget=Budget(macs=10)), tmp_path / "run")
    with pytest.raises(ZeroDivisionError):
        job.train(changed(num_evaluations=5), tmp_path / "run")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Search(scorer="rdm"), "`scorer` must be a Spec, got 'rdm'. Make one with kdnas.spec."),
        (lambda: changed(space="toy"), "`space` must be a SearchSpace, got 'toy'. Make one with kdnas.load_space."),
        (lambda: changed(teacher=torch.nn.Identity()), "`teacher` must be a Spec or FitTeacher, got Identity()"),
        (lambda: changed(data=[1, 2]), "`data` must be a Spec, got [1, 2]"),
        (lambda: Retrain(distiller="mutual"), "`distiller` must be a Spec, got 'mutual'"),
    ],
)
def test_a_setting_of_another_kind_is_refused_where_it_is_made(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
