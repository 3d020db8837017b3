"""Evaluations stopped early, and the second phase of a multi-fidelity search."""

import dataclasses
import json
import math
import random
import shutil

import pytest
import torch

from kdnas.cli.commands import main
from kdnas.jobs._run import Run
from kdnas.jobs.search import search
from kdnas.ranking.early_stopping import EarlyStopping, parse_pruner, survivors
from kdnas.ranking.order import ranked
from kdnas.runs.entry import RANDOM, Entry
from kdnas.runs.folder import RANKING, RunFolder
from kdnas.scorers.base import Score, Scorer
from kdnas.scorers.macs import Macs
from kdnas.scorers.reward import Reward
from kdnas.scorers.short_training import ShortTraining
from kdnas.searchers.gaussian_process import GaussianProcess
from kdnas.settings import Experiment
from kdnas.specs import spec
from kdnas.tables import load_space
from tests.scorers.scene import evidence, network
from tests.toy import experiment, two_phases

HALVING = spec("optuna.pruners:SuccessiveHalvingPruner")


class Rungs(Scorer):
    """Shows the numbers it is given, and remembers how many were asked for."""

    def __init__(self, resources):
        self.resources, self.asked = resources, 0

    def score(self, student, evidence):
        *_, last = self.rungs(student, evidence)
        return last

    def rungs(self, student, evidence):
        for value in student:
            self.asked += 1
            yield Score(value, {})


def judged(stopping, scorer, curves):
    return [stopping.judge(scorer.rungs(curve, None)) for curve in curves]


def test_successive_halving_by_hand():
    scorer = Rungs((1, 3, 9))
    stopping = EarlyStopping(HALVING, scorer)
    curves = [
        (0.5, 0.6, 0.7),  # the first goes on unopposed
        (0.4, 0.9, 0.9),  # of two, the best third is the best one: stopped, whatever it would have become
        (0.6, 0.5, 0.9),  # best so far at the first rung, not at the second
        (0.6, 0.6, 0.65),  # ties go on; the last rung stops nobody
        (0.55, 0.9, 0.9),
        (0.6, 0.7, 0.1),  # of six the best two go on
    ]
    found = judged(stopping, scorer, curves)
    assert [(s.value, s.share) for s in found] == [
        (0.7, 1.0),
        (0.4, 1 / 9),
        (0.5, 3 / 9),
        (0.65, 1.0),
        (0.55, 1 / 9),
        (0.1, 1.0),
    ]
    assert found[2].parts == {"at 1": 0.6, "at 3": 0.5}
    assert scorer.asked == 3 + 1 + 2 + 3 + 1 + 3  # what is stopped is not computed any further


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ([0.5], [0]),
        ([0.4, 0.6], [1]),
        ([0.4, 0.6, 0.5], [1]),
        ([0.4, 0.6, 0.5, 0.7, 0.1], [1, 3]),
        ([0.5] * 3, [0, 1, 2]),
    ],
)
def test_of_all_at_one_rung_halving_keeps_the_best_half_rounded_down(values, kept):
    assert survivors(HALVING, (50, 100), [(value,) for value in values]) == kept
    worse_before = [(value,) for value in values]
    assert survivors(HALVING, (25, 50, 100), [(0.9, v) for (v,) in worse_before] + [(0.1,)] * 2) == kept


@pytest.mark.parametrize("name", ["successive_halving", "median,n_startup_trials=3", "percentile,percentile=30", "nop"])
def test_who_survives_does_not_depend_on_the_order(name):
    rng = random.Random(0)
    for _ in range(5):
        curves = [tuple(rng.random() for _ in range(2)) for _ in range(6)] + [(rng.random(),) for _ in range(3)]
        order = rng.sample(range(9), 9)
        kept = survivors(parse_pruner(name), (25, 50, 100), curves)
        again = survivors(parse_pruner(name), (25, 50, 100), [curves[i] for i in order])
        assert sorted(order[i] for i in again) == kept and kept
        assert max(range(6), key=lambda i: curves[i][1]) in kept


@pytest.mark.parametrize(
    "name", ["successive_halving", "hyperband", "median,n_startup_trials=3", "percentile,percentile=30"]
)
def test_what_was_judged_before_is_replayed_and_the_rest_is_judged_as_ever(name):
    rng = random.Random(0)
    curves = [[rng.random() + k for k in range(3)] for _ in range(40)]
    scorer = Rungs((1, 2, 4))
    whole = judged(EarlyStopping(parse_pruner(name), scorer), scorer, curves)
    assert {s.share for s in whole} > {1.0}
    for known in (1, 7, 39):
        again = EarlyStopping(parse_pruner(name), scorer)
        for score in whole[:known]:
            again.replay(score)
        assert judged(again, scorer, curves[known:]) == whole[known:]


def test_the_pruner_s_resources_are_the_scorer_s_unless_they_are_told():
    scorer = Rungs((10, 40, 160))
    assert vars(EarlyStopping(HALVING, scorer).study.pruner) | {"_min_resource": 10, "_reduction_factor": 4} == vars(
        EarlyStopping(HALVING, scorer).study.pruner
    )
    told = EarlyStopping(HALVING.replace(min_resource=40, reduction_factor=2), scorer).study.pruner
    assert (vars(told)["_min_resource"], vars(told)["_reduction_factor"]) == (40, 2)


def test_mistakes_are_said():
    with pytest.raises(ValueError, match="intermediate scores; Macs has none"):
        EarlyStopping(HALVING, Macs())
    with pytest.raises(ValueError, match="successive_halving"):
        parse_pruner("sucessive_halving")
    with pytest.raises(ValueError, match="min_resource"):
        parse_pruner("successive_halving,min_resourse=2")
    with pytest.raises(ValueError, match="num_rungs=3, reduction=3 and steps=8"):
        ShortTraining(steps=8, num_rungs=3)
    with pytest.raises(ValueError, match="no earlier search"):
        Experiment(train=experiment().train, search=dataclasses.replace(experiment().search, initial=2))


def test_rungs_of_a_short_training_are_the_scores_of_one_training():
    held, student = evidence(), network(1)
    given = {"steps": 4, "batch_size": 12}
    staged = ShortTraining(**given, num_rungs=3, reduction=2)
    shown = list(staged.rungs(student, held))
    assert staged.resources == (1, 2, 4)
    assert shown[-1] == staged.score(student, held) == ShortTraining(**given).score(student, held)
    assert len({s.value for s in shown}) == 3


def test_a_reward_weighs_every_rung():
    held, student = evidence(), network(1)
    short = spec(ShortTraining, steps=4, batch_size=12, num_rungs=2, reduction=2)
    reward = Reward(scorer=short, target=1e5)
    assert reward.resources == (2, 4)
    shown = list(reward.rungs(student, held))
    assert shown[-1] == reward.score(student, held)
    inner = list(short.build(Scorer).rungs(student, held))
    factor = reward.score(student, held).value / inner[-1].value
    assert [s.value for s in shown] == pytest.approx([s.value * factor for s in inner])


@pytest.fixture(scope="module")
def chained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "two"
    main(["run", "--experiment", "tests/toy.py:two_phases", "--out", str(folder)])
    return RunFolder(folder)


def test_stopped_networks_are_recorded_with_their_rung_and_come_last(chained):
    entries = [e for e in chained.ranking(1) if not e.is_control]
    assert len(entries) == 10
    early = [e for e in entries if e.share < 1]
    assert early
    assert {e.share for e in early} <= {0.25, 0.5}
    assert all(set(e.parts) >= {"at 1"} and "at 4" not in e.parts for e in early)
    assert [e.share for e in ranked(entries)] == sorted((e.share for e in entries), reverse=True)


def test_the_cost_is_accounted_and_the_random_control_costs_as_much(chained):
    # The controls of the first search are the second's by now; the ranking remembers.
    entries = chained.ranking(1)
    paid = sum(e.share for e in entries if not e.is_control)
    drawn = [e for e in entries if e.searcher == RANDOM]
    assert len(drawn) == math.ceil(paid) < 10
    assert all(e.share == 1 for e in drawn)


def test_the_second_phase_begins_with_the_best_of_the_first_and_its_best_is_exported(chained):
    first, second = ([e for e in chained.ranking(n) if not e.is_control] for n in (1, 2))
    assert [e.architecture for e in second[:2]] == [e.architecture for e in ranked(first)[:2]]
    assert len({e.architecture for e in second}) == 6
    assert all(e.share == 1 and "at 1" not in e.parts for e in second)
    card = json.loads(chained.path("students", "place-1", "student.json").read_text())
    assert card["architecture"] == dict(ranked(second)[0].architecture)


@pytest.mark.parametrize("kept", [1, 4, 9, 12])
def test_a_search_with_a_pruner_goes_on_where_it_was_interrupted(tmp_path, chained, kept):
    folder = tmp_path / "run"
    shutil.copytree(chained.folder, folder)
    lines = (folder / RANKING).read_text().splitlines(keepends=True)
    (folder / RANKING).write_text("".join(lines[:kept]))
    run = RunFolder(folder)
    run.manifest["searches"] = [{**run.manifest["searches"][0], "state": "running"}]
    run.save()
    search(Run(folder), two_phases().search)

    def told(run):
        return [(e.code, e.score, e.share, e.searcher) for e in run.ranking(1)]

    assert told(RunFolder(folder)) == told(chained)
    stopped = RunFolder(folder).results()["controls"]["stopping"]
    entries = [e for e in chained.ranking(1) if not e.is_control]
    assert stopped["value"] == pytest.approx(sum(e.share for e in entries))
    assert stopped["stopped"] == sum(e.share < 1 for e in entries)


def test_a_command_line_names_pruner_and_begins_from_the_search_before(tmp_path, chained, capsys):
    folder = tmp_path / "run"
    shutil.copytree(chained.folder, folder)
    scorer = "short_training,steps=4,batch_size=16,num_rungs=2,reduction=2"
    main(["search", str(folder), "--scorer", scorer, "--pruner", "median,n_startup_trials=2", "--initial", "3"])
    assert "evaluations were stopped early" in capsys.readouterr().out
    third, second = ([e for e in RunFolder(folder).ranking(n) if not e.is_control] for n in (3, 2))
    assert [e.architecture for e in third[:3]] == [e.architecture for e in ranked(second)[:3]]


def test_the_first_search_of_a_run_has_none_to_begin_from(tmp_path, capsys):
    folder = tmp_path / "run"
    main(["train", "tests/toy.py:alone", "--out", str(folder)])
    with pytest.raises(SystemExit):
        main(["search", str(folder), "--initial", "2"])
    assert "first search" in capsys.readouterr().err
    assert not (folder / RANKING).exists()


def test_a_gaussian_process_predicts_whole_evaluations():
    space = load_space("toy")
    searcher = GaussianProcess(space=space, admits=lambda a: True, rng=random.Random(0))
    drawn = list(space.all())[:40]
    worth = {a: sum(float(v) for v in dict(a).values()) for a in drawn}

    def entry(a, share):
        # A tenth of the whole evaluation shows 5 less than the whole.
        return Entry(a, space.code(a), worth[a] - 5 * (1 - share), {}, 0, 0, 0, 0.0, share=share)

    searcher.begin([entry(a, 0.1 if i % 2 else 1.0) for i, a in enumerate(drawn)])
    early = drawn[1::2]
    found = searcher.model().predict(searcher.encoded(early))
    error = torch.tensor([f - worth[a] for f, a in zip(found, early, strict=True)])
    assert error.abs().mean() < 1.5
