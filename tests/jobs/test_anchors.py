"""Greedy anchors on a teacher's route: which comes next, what it costs, and that nothing is trained twice."""

import dataclasses
import json
import math

import pytest
import torch

from kdnas.cli.commands import main
from kdnas.jobs import _anchors as anchors
from kdnas.jobs._anchors import divergences, next_anchor, retrain_along
from kdnas.jobs._run import Run
from kdnas.jobs.export import export
from kdnas.jobs.retrain import settings_of
from kdnas.jobs.search import search
from kdnas.jobs.train import train
from kdnas.network import Network
from kdnas.settings import Experiment, FitTeacher, Recipe
from kdnas.students.folder import read_student
from kdnas.teachers.base import Frozen
from tests.toy import data, experiment


@pytest.mark.parametrize(
    ("divergence", "threshold", "expected"),
    [
        ([1.0, 1.2, 1.4, 1.6], 1.5, 2),
        ([1.0, 2.0, 3.0], 1.5, 1),  # none is near enough: the one right after
        ([1.0, 9.0, 1.1], 1.5, 2),  # a harder one between is skipped
        ([1.0, 0.5, 1.0, 1.01], 1.0, 2),
        ([1.0, 1.1], 5.0, 1),
        ([0.0, 0.0, 1.0], 1.5, 1),
    ],
)
def test_the_next_anchor_by_hand(divergence, threshold, expected):
    assert next_anchor(divergence, threshold) == expected


def test_divergences_by_hand():
    loaded = data()
    torch.manual_seed(0)
    space = experiment().train.space.fitted(classes=3, image_channels=3)
    networks = [Network(space.blueprint(space.largest)).eval() for _ in range(3)]
    images = loaded.normalise(loaded.search.take(torch.arange(len(loaded.search))))
    with torch.no_grad():
        p = [n(images).logits.double().softmax(1) for n in networks]
    expected = [float((t * (t / p[0]).log()).sum(1).mean()) for t in p]
    found = divergences(networks[0], [Frozen(n, preprocessing=loaded.preprocessing) for n in networks], loaded)
    assert found == pytest.approx(expected, abs=1e-6)
    assert found[0] == pytest.approx(0, abs=1e-7) and min(found[1:]) > 1e-5


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A student of a run whose teacher was kept five times."""
    made = experiment()
    teacher = FitTeacher(recipe=dataclasses.replace(made.train.teacher.recipe, steps=10), snapshots=5)
    settings = dataclasses.replace(made.train, teacher=teacher)
    folder = tmp_path_factory.mktemp("runs") / "run"
    run = train(Experiment(train=settings, search=made.search, retrain=made.retrain), folder)
    search(run, dataclasses.replace(made.search, num_evaluations=3))
    export(Run(folder), deploy=False)
    return folder / "students" / "place-1"


def along(student, name, **options):
    settings = settings_of(student)
    settings = dataclasses.replace(settings, recipe=Recipe(steps=10, batch_size=16, learning_rate=0.05))
    return retrain_along(student, settings, student.parent / name, **options)


def watched(monkeypatch):
    calls, original = [], anchors.retrain

    def retrain(source, settings, out, **options):
        calls.append((source.name, out.name, settings.recipe.steps, settings.weights, options["teacher"]["path"][-1]))
        return original(source, settings, out, **options | {"deploy": False})

    monkeypatch.setattr(anchors, "retrain", retrain)
    return calls


def test_stages_follow_each_other_and_cost_what_one_training_does(student, monkeypatch):
    calls = watched(monkeypatch)
    found = along(student, "stepwise", threshold=1.0)
    assert sum(steps for _, _, steps, _, _ in calls) == 10
    assert [c[0] for c in calls] == ["place-1", *(f"stage-{k}" for k in range(1, len(calls)))]
    assert [c[1] for c in calls][-1] == "stepwise"
    assert [c[3] for c in calls] == ["fresh", *["inherited"] * (len(calls) - 1)]
    numbers = [int(a) for a in found["anchors"].split(",")]
    assert numbers[0] == 1 and numbers[-1] == 5 and numbers == sorted(set(numbers))
    assert [c[4] for c in calls] == [str(n) if n < 5 else "r" for n in numbers]  # the last is the run's teacher


def test_each_choice_looks_from_the_anchor_just_learnt_on(student, monkeypatch):
    calls, lengths = watched(monkeypatch), []

    def harder_and_harder(network, teachers, data):
        lengths.append(len(teachers))
        return [1.0, 1.5, 1.4, 9.0, 9.0][: len(teachers)]

    monkeypatch.setattr(anchors, "divergences", harder_and_harder)
    found = along(student, "looking", threshold=1.45)
    assert found["anchors"] == "1,3,5" and lengths == [5, 3]
    assert [c[4] for c in calls] == ["1", "3", "r"]


def test_a_far_threshold_goes_to_the_end_and_gives_it_what_is_left(student, monkeypatch):
    calls = watched(monkeypatch)
    found = along(student, "far", threshold=math.inf)
    assert found["anchors"] == "1,5"
    assert [c[2] for c in calls] == [2, 8]


def test_an_interrupted_one_trains_no_stage_twice_and_ends_alike(student, monkeypatch):
    calls = watched(monkeypatch)
    along(student, "whole", threshold=1.0)
    whole = list(calls)
    original = anchors.retrain

    def killed(source, settings, out, **options):
        if len(calls) == len(whole) + 2:
            raise KeyboardInterrupt
        return original(source, settings, out, **options)

    monkeypatch.setattr(anchors, "retrain", killed)
    with pytest.raises(KeyboardInterrupt):
        along(student, "killed", threshold=1.0)
    monkeypatch.setattr(anchors, "retrain", original)
    along(student, "killed", threshold=1.0)
    assert [c[2:] for c in calls[len(whole) :]] == [c[2:] for c in whole]
    first, second = (read_student(student.parent / name)[0].state_dict() for name in ("whole", "killed"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    held = json.loads((student.parent / "killed-anchors" / "anchors.json").read_text())
    assert held == json.loads((student.parent / "whole-anchors" / "anchors.json").read_text())


def test_mistakes_are_said(student, capsys):
    with pytest.raises(ValueError, match="at least 1"):
        along(student, "no", threshold=0.5)
    teacher = str(student.parent.parent / "teacher")
    with pytest.raises(SystemExit):
        main(["retrain", str(student), "--greedy-anchors", "1.5", "--teacher", f"checkpoint:{teacher}"])
    assert "route" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["retrain", str(student), "--greedy-anchors", "1.5", "--assistants", "auto"])
    assert "Drop one" in capsys.readouterr().err
    for how in (["--teacher", "none"], ["--distiller", "mutual"]):
        with pytest.raises(SystemExit):
            main(["retrain", str(student), "--greedy-anchors", "1.5", *how])
        assert "needs a distiller that uses a teacher" in capsys.readouterr().err


def test_one_command(student, capsys, monkeypatch):
    watched(monkeypatch)
    main(["retrain", str(student), "--greedy-anchors", "1.5", "--steps", "5", "--batch-size", "16"])
    assert "anchors" in capsys.readouterr().out
