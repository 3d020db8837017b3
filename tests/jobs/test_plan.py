"""What is predicted of a run, from numbers by hand and from one that is rehearsed."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

import kdnas
from kdnas.cli.commands import main
from kdnas.jobs import plan as job
from kdnas.jobs._plan_pruning import RehearsedPruning
from kdnas.jobs.plan import Meter, More, Pace, Phase, Plan, Searching, likely_finalists, slower_half, text_of
from kdnas.ranking.loop import Uninformative
from kdnas.settings import Finals, Recipe, Search
from kdnas.specs import spec
from kdnas.training.driver import Cadence
from tests.teachers.test_unlabelled import narrow
from tests.toy import experiment, pruned

PACE = Pace(step=1.0, watched=2.0, evaluation=10.0, saving=0.5, epoch=50, guarded=False)
PHASE = Phase("", 5.0, 100, 1000)


def test_a_training_takes_its_steps_evaluations_comparisons_and_checkpoints():
    # 400 steps of an epoch of 50: measured every 50, so 8 times.
    assert PACE.seconds(400) == 400 + 80 + (480 // 10 + 1) * 0.5
    # A guarded one is also compared: every 8th step, and where it is measured (50, 100, 150, 250, ...).
    guarded = PACE._replace(guarded=True, saving=0.0)
    assert guarded.seconds(400) == 400 + 80 + (50 + 6) * 2
    counted = sum(Cadence.of(400, 50, guarded=True).compares(step) for step in range(1, 401))
    assert counted == 56


def test_steps_in_which_the_loss_terms_are_weighed_take_longer():
    # Every 50th of 400 steps.
    assert PACE._replace(weighed=3.0, saving=0.0).seconds(400) == PACE._replace(saving=0.0).seconds(400) + 8 * 3.0


def test_the_slower_half_of_networks_is_expected():
    paces = [PACE._replace(step=step, evaluation=10 * step) for step in (1.0, 4.0, 2.0, 6.0, 3.0)]
    assert slower_half(paces) == PACE._replace(step=13 / 3, evaluation=130 / 3)
    assert slower_half(paces[:1]) == paces[0]


def test_what_a_training_writes_grows_by_a_line_of_metrics():
    # 400 steps have a line every second one, and no other where accuracies are measured.
    assert PACE._replace(line=300).disk(400) == 200 * 300
    assert PACE._replace(line=300).beyond(400, 6) == More(PACE.seconds(400) - PACE.seconds(6), (200 - 6) * 300)


def test_likely_finalists_are_of_the_quarter_with_most_macs():
    ranking = [SimpleNamespace(macs=(7 * number) % 64) for number in range(64)]
    assert [entry.macs for entry in likely_finalists(ranking)] == [63, 61, 59, 57, 55, 53, 51, 49]
    assert [entry.macs for entry in likely_finalists(ranking[:8])] == [49, 42]
    assert [entry.macs for entry in likely_finalists(ranking[:3])] == [14]


def _rehearsed(**changes):
    whole = experiment()
    whole = dataclasses.replace(
        whole, search=Search(num_evaluations=80), finals=Finals(finalists=1, controls=("labels",), seeds=2)
    )
    short = dataclasses.replace(whole, search=Search(num_evaluations=4))
    short = job.shortened(short, 2, 4, cheap=False)
    flat = PACE._replace(watched=0.0, evaluation=0.0, saving=0.0)
    made = {
        "experiment": whole,
        "short": short,
        "measured": {
            name: dataclasses.replace(PHASE, name=name, seconds=seconds)
            for name, seconds in {
                "teacher": 5.0, "supernet": 6.0, "search": 7.0, "finals": 9.0, "other": 10.0
            }.items()
        },
        "paces": {
            "teacher": flat,
            "supernet": flat._replace(step=3.0),
            "student": flat._replace(step=2.0),
            "labels": flat._replace(step=0.5),
        },
        "search": Searching(3.0, (4, 8), (4.0, 4.4), 0.06),
        "line": 300,
        "candidates": 1000,
    }  # fmt: skip
    return job.RehearsedRun(**(made | changes))


def test_what_a_run_has_more_of_is_added_to_what_its_rehearsal_took():
    # Steps of the run: teacher 3, supernet 12, students 3; of the rehearsal 2 each.
    phases = {phase.name: phase for phase in _rehearsed().phases(1.0, 80)}
    assert phases["teacher"].seconds == 5 + 1
    assert phases["supernet"].seconds == 6 + 3 * 10
    # Of 72 candidates beyond the longest search that was timed, 30 are not among the first 50.
    assert phases["search"].seconds == pytest.approx(3 + 4.4 + 42 * 0.1 + 30 * 0.06)
    assert phases["search"].disk == 1000 + 2 * 76 * 300
    # One finalist and its second seed under the teacher, and two of the control.
    assert phases["finals"].seconds == 9 + 2 * 2 + 2 * 0.5
    assert phases["other"].seconds == 10
    assert {phase.name: phase for phase in _rehearsed().phases(2.0, 80)}["supernet"].seconds == 6 + 3 * 22


def test_larger_finalists_than_those_of_the_rehearsal_write_larger_files():
    paces = {name: pace._replace(line=100) for name, pace in _rehearsed().paces.items()}
    phases = {phase.name: phase.disk for phase in _rehearsed(size=1.5, paces=paces).phases(1.0, 80)}
    # A line per step beyond the rehearsal: 10 of the supernet; 1 of the teacher, and of each of four students.
    assert phases == {
        "teacher": 1100, "supernet": 2000, "search": 1000 + 2 * 76 * 300, "finals": 1900, "other": 1500
    }  # fmt: skip


def test_a_second_search_is_added_to_the_first():
    whole = _rehearsed()
    second = dataclasses.replace(whole.experiment, second=Search(num_evaluations=6))
    both = dataclasses.replace(whole, experiment=second)
    assert both.searching(8).seconds == pytest.approx(whole.searching(8).seconds + 4.2) == pytest.approx(3 + 4.4 + 4.2)


@pytest.mark.parametrize(
    ("most", "uninformative_from", "counts"),
    [(100, 1000, (4, 8, 16, 32, 64)), (12, 1000, (4, 8, 12)), (100, 16, (4, 8))],
)
def test_a_search_is_predicted_from_ones_twice_as_long_up_to_one_that_takes_a_while(
    monkeypatch, most, uninformative_from, counts
):
    asked = []

    def search(run, settings):
        asked.append(settings.num_evaluations)
        if asked[-1] >= uninformative_from:
            raise Uninformative("equal scores")

    monkeypatch.setattr(job, "search", search)
    monkeypatch.setattr(job, "_timed", lambda action: action() or 1.0 + 0.05 * asked[-1])
    # A random search is beside it; the first candidate also takes what is made ready for all.
    entries = lambda number: [SimpleNamespace(seconds=s) for s in (0.9, *[0.02] * (2 * asked[-1] - 1))]  # noqa: E731
    run = SimpleNamespace(storage=SimpleNamespace(manifest={"searches": [1]}, ranking=entries))
    searching = job._searching(run, _rehearsed().short, 7.2, most)
    assert searching.counts == counts and searching.times == pytest.approx([1 + 0.05 * count for count in counts])
    assert searching.starting == pytest.approx(6.0) and searching.scoring == pytest.approx(0.04)


def test_a_first_search_that_was_not_slower_has_no_start():
    measured = {"search": dataclasses.replace(PHASE, name="search", seconds=7.0)}
    whole = _rehearsed(measured=_rehearsed().measured | measured, search=Searching(0.0, (4,), (4.0,), 0.5))
    assert whole.searching(4).seconds == 4.0 and whole.searching(6).seconds == 5.0


def test_there_are_no_more_candidates_than_the_space_has():
    few, many = (_rehearsed(candidates=36).phases(1.0, count)[2] for count in (36, 5000))
    assert few == many


@pytest.mark.parametrize("seconds", [80.0, 100.0, 1000.0])
def test_the_settings_that_are_proposed_fit_the_time_and_nearly_fill_it(seconds):
    rehearsed = _rehearsed()
    proposal = job._fitting(rehearsed, seconds)
    assert proposal["fitted"] <= seconds
    steps = proposal["proposal"]
    assert abs(steps["steps of supernet"] - 4 * steps["steps of teacher"]) < 4  # 12 and 3 of the run
    if seconds == 1000.0:
        assert proposal["fitted"] > 0.97 * seconds
    assert 1 <= proposal["proposal"]["num_evaluations"] <= 80


def test_a_time_that_is_too_short_is_refused_with_the_least():
    rehearsed = _rehearsed()
    with pytest.raises(ValueError, match=r"`time` must be at least \d+ s for 10 steps of every training, got 5 s"):
        job._fitting(rehearsed, 5.0)


def test_a_row_per_phase_the_sum_and_a_full_disk():
    whole = Plan((Phase("search", 7200.0, 2 * 10**9, 5 * 10**6), Phase("finals", 30.0, 10**9, 10**6)), free=100)
    text = text_of(whole)
    assert "search           2.0 h      2.0 GB      5.0 MB" in text
    assert "whole run        2.0 h      2.0 GB      6.0 MB" in text
    assert "the disk has 0.0 MB left, less than the run needs. Use another --out." in text
    fitted = dataclasses.replace(whole, free=10**9, proposal={"steps": 500, "num_evaluations": 50}, fitted=60.0)
    assert text_of(fitted).endswith("within the time that there is: --steps 500 --num-evaluations 50 (60 s)")


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """The plan of a small run, and the folder where the run would be."""
    folder = tmp_path_factory.mktemp("plans") / "run"
    options = {"scorer": "params", "steps": 300, "batch_size": 16, "num_evaluations": 12, "deploy": False}
    options |= {"data": "tests.toy:data", "teacher": "fit,width=4", "space": "toy", "finalists": 1}
    return kdnas.plan(**options, out=folder, time="1h"), folder


def test_a_small_run_is_planned_and_nothing_is_written(planned):
    plan, folder = planned
    assert [phase.name for phase in plan.phases] == ["teacher", "supernet", "search", "finals", "other"]
    assert all(phase.seconds > 0 and phase.memory > 10**6 for phase in plan.phases)
    supernet, search = plan.phases[1], plan.phases[2]
    assert supernet.seconds > search.seconds and supernet.disk > 10_000
    assert not folder.exists() and list(plan.proposal) == ["steps", "num_evaluations"] and plan.fitted <= 3600
    assert json.loads(json.dumps(plan.to_json()))["seconds"] == pytest.approx(plan.seconds)


def test_a_run_without_labels_is_planned_too(tmp_path):
    options = {"steps": 20, "batch_size": 8, "num_evaluations": 4, "finalists": 1, "deploy": False, "size": 8}
    plan = kdnas.plan(
        data=list(torch.rand(40, 3, 8, 8)),
        teacher=narrow(),
        unlabelled=True,
        space="toy",
        **options,
        out=tmp_path / "run",
    )
    # The teacher is not trained here, and no control learns from labels.
    assert [phase.name for phase in plan.phases] == ["supernet", "search", "finals", "other"]
    assert all(phase.seconds > 0 for phase in plan.phases) and not any(tmp_path.iterdir())


def test_disk_is_what_a_phase_adds(tmp_path):
    meter = Meter(tmp_path)
    for size in (1000, 3000):
        (tmp_path / "file").write_bytes(b"x" * size)
        phase = meter.phase("search", 1.0)
    assert phase.disk == 2000


@pytest.mark.parametrize("kind", ["run", "pruning"])
def test_layers_that_are_compiled_are_not_planned(tmp_path, kind):
    recipe = Recipe(steps=3, execution="compiled")
    whole = experiment()
    settings = {
        "run": dataclasses.replace(whole, retrain=dataclasses.replace(whole.retrain, recipe=recipe)),
        "pruning": dataclasses.replace(pruned(), retrain=recipe),
    }[kind]
    with pytest.raises(ValueError, match="`execution` must be eager in a plan, got compiled"):
        job.plan(settings, tmp_path / "run", deploy=False)


def test_the_command_prints_the_plan(monkeypatch, capsys, tmp_path):
    seen = {}

    def plan(settings, folder, **options):
        seen.update(options, steps=settings.train.recipe.steps)
        return Plan((Phase("search", 60.0, 10**6, 10**6),), free=10**9)

    monkeypatch.setattr(job, "plan", plan)
    arguments = ["plan", "--data", "digits", "--space", "toy", "--steps", "7", "--no-deploy", "--time", "1h30m"]
    main([*arguments, "--out", str(tmp_path / "run")])
    assert "whole run         60 s" in capsys.readouterr().out
    assert seen == {"deploy": False, "seconds": 5400.0, "steps": 7}
    main(["plan", "demo", "--json"])
    assert json.loads(capsys.readouterr().out)["phases"][0]["name"] == "search"


@pytest.mark.parametrize(
    ("teacher", "unlabelled"),
    [("fit,width=4", False), ("tests.toy:steady_cnn", False), ("tests.teachers.test_unlabelled:narrow", True)],
)
def test_a_run_without_a_space_is_planned_too(teacher, unlabelled, tmp_path):
    options = {"data": "tests.toy:data", "teacher": teacher, "budget": "macs=50%", "steps": 400, "batch_size": 16}
    options["unlabelled"] = unlabelled
    plan = kdnas.plan(**options, num_evaluations=30, finalists=1, deploy=False, out=tmp_path / "run", time="1h")
    names = ["search", "trials", "finals", "other"]
    assert [phase.name for phase in plan.phases] == ["teacher"] * (teacher == "fit,width=4") + names
    assert all(phase.seconds > 0 and phase.memory > 10**6 for phase in plan.phases)
    assert list(plan.proposal) == ["steps", "num_evaluations"] and not any(tmp_path.iterdir())


def test_a_pruning_has_more_steps_candidates_and_trials_than_its_rehearsal():
    whole = dataclasses.replace(pruned(), retrain=Recipe(steps=206), num_candidates=54, teacher=spec("a:b"))
    flat = PACE._replace(watched=0.0, evaluation=0.0, saving=0.0)
    names = ("teacher", "search", "trials", "finals", "other")
    rehearsed = RehearsedPruning(
        settings=whole,
        short=dataclasses.replace(whole, retrain=Recipe(steps=6), num_candidates=4),
        measured={name: dataclasses.replace(PHASE, name=name) for name in names},
        paces={"student": flat, "labels": flat._replace(step=0.5)},
        trials=6,
        trainings=3,
        candidate=0.1,
        line=80,
    )
    phases = {phase.name: phase for phase in rehearsed.phases(1.0, 54)}
    assert phases["search"].seconds == pytest.approx(5 + 50 * 0.1) and phases["search"].disk == 1000 + 50 * 80
    limited = dataclasses.replace(rehearsed, settings=dataclasses.replace(whole, max_time=7.0))
    assert limited.searching(54).seconds == 7 and limited.searching(8).seconds == pytest.approx(5 + 4 * 0.1)
    assert phases["trials"].seconds == 5 + 6 * (20 - 1)  # a tenth of the steps
    assert phases["finals"].seconds == 5 + 3 * 200 + 0.5 * 200
    assert phases["teacher"].seconds == phases["other"].seconds == 5


def test_a_rehearsal_takes_few_steps_at_the_highest_rate_and_leaves_the_rest():
    whole = experiment()
    short = job.shortened(whole, 2, 4, cheap=False)
    assert short.train.recipe.steps == 2 and short.train.recipe.rate(0) == whole.train.recipe.learning_rate
    assert short.search.num_evaluations == 4 and short.search.scorer == whole.search.scorer
    cheap = job.shortened(whole, 2, 4, cheap=True)
    assert cheap.search.scorer["num_reference"] == 8 and cheap.finals.finalists == 1
