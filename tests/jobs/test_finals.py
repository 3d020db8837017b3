"""The finals of a search: who is trained, who is chosen, by which images, and what is never done twice."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import kdnas
from kdnas.cli.commands import main
from kdnas.costs.count import cost
from kdnas.data.base import Data
from kdnas.jobs import _trainings
from kdnas.jobs import finals as job
from kdnas.jobs._run import Run, insisting
from kdnas.jobs._trainings import TrainingRow, Trainings, marks
from kdnas.jobs.export import export
from kdnas.jobs.finals import finals
from kdnas.jobs.retrain import retrain
from kdnas.jobs.search import search
from kdnas.jobs.train import train
from kdnas.network import default_device
from kdnas.ranking.order import difference
from kdnas.runs.folder import RunFolder
from kdnas.settings import Finals
from kdnas.students.folder import read_student
from tests import toy
from tests.toy import SealedImages, by_params

ALL = ("labels", "random", "largest", "longer", "contrast")


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "searched"
    with insisting(True):  # the teacher has random weights
        run = train(by_params(), folder)
    search(run, run.experiment.search)
    return folder


@pytest.fixture
def run(tmp_path, searched, monkeypatch):
    """A run whose search is done; its test part may be read once the choice is recorded."""
    shutil.copytree(searched, tmp_path / "run")
    monkeypatch.setattr(SealedImages, "run", tmp_path / "run")
    monkeypatch.setattr(SealedImages, "reads", 0)
    return Run(tmp_path / "run")


def of(run, settings, **options):
    return finals(Run(run.folder), settings, by_params().retrain, deploy=False, **options)


def steps_taken(monkeypatch):
    """A list that grows by the name of the phase at every training step from now on."""
    steps, step = [], _trainings.Training.step
    monkeypatch.setattr(
        _trainings.Training, "step", lambda self, **options: steps.append(self.index) or step(self, **options)
    )
    return steps


def test_the_best_on_the_search_part_is_the_student_and_the_test_part_is_read_once_after_that(run, monkeypatch):
    steps = steps_taken(monkeypatch)
    result = of(run, Finals(controls=ALL, seeds=2))
    places = Run(run.folder).ranking()
    first = [places[row["place"] - 1].architecture for row in result["finalists"]]
    assert first[0] == places[0].architecture and len(first) == 3
    assert all(difference(a, b) >= 0.2 for i, a in enumerate(first) for b in first[:i])
    whole = [row for row in result["finalists"] if row["step"] == 8]
    best = max(whole, key=lambda row: row["accuracy"])
    assert result["code"] == best["code"] and 0 < len(whole)
    data = by_params().train.data.build(Data)
    network, card = read_student(run.folder / "students" / "student")
    network = network.to(default_device())
    measured = _trainings.accuracy(network, data.search, data)
    assert measured == best["accuracy"] == card.origin["search_accuracy"]
    rows = {row["name"]: row for row in run.storage.results()["rows"]}
    assert {"teacher", "student", "control", "random networks", "largest"} <= set(rows)
    assert (
        card.origin["test_accuracy"] == rows["student"]["accuracy"] == pytest.approx(np.mean(rows["student"]["seeds"]))
    )
    distinct = len(RunFolder(run.folder).lines("test_hits.jsonl"))
    assert SealedImages.reads == 1 + distinct  # the teacher, and every network once
    names = {line["training"] for line in RunFolder(run.folder).lines("test_hits.jsonl")}
    losers = {row["name"] for row in result["finalists"]} - {best["name"]}
    assert not (losers - {rows["largest"]["training"]}) & names
    before, taken = (run.folder / "results.json").read_bytes(), len(steps)
    of(run, Finals(controls=ALL, seeds=2))
    assert len(steps) == taken and SealedImages.reads == 1 + distinct
    assert (run.folder / "results.json").read_bytes() == before


def test_the_last_of_three_finalists_is_the_largest_within_the_budget(run):
    ranking = sorted(run.ranking(), key=lambda entry: entry.params)  # the smallest are the best
    own = lambda **options: job._Finals(run, Finals(**options), by_params().retrain, Trainings(run))  # noqa: E731
    plain = [*own(largest=False).finalists(ranking)]
    *first, last = own().finalists(ranking)
    assert first == plain[:2] and len(plain) == 3
    macs = lambda architecture: cost(run.space.blueprint(architecture)).macs  # noqa: E731
    assert macs(last) == max(macs(entry.architecture) for entry in ranking) and last != plain[2]
    standing = own().finalists(ranking)[last]
    assert standing == (len(ranking), ranking[-1].score) or standing == (None, None)
    assert [*own(finalists=2).finalists(ranking)] == plain[:2]
    by_size = ranking[::-1]
    assert [*own().finalists(by_size)] == [*own(largest=False).finalists(by_size)]  # it is place 1


def test_a_finalist_that_is_chosen_on_test_images_is_caught(run, monkeypatch):
    measure = _trainings.accuracy
    monkeypatch.setattr(_trainings, "accuracy", lambda network, part, data: measure(network, data.test, data))
    with pytest.raises(AssertionError, match="before the choice"):
        of(run, Finals())


def test_more_finalists_later_train_only_what_is_new_and_as_they_would_have_alone(run, tmp_path, monkeypatch):
    of(run, Finals(finalists=2))
    before = {row["name"] for row in RunFolder(run.folder).lines("trainings.jsonl")}
    more = of(run, Finals(finalists=4))
    assert sum(row["name"] in before for row in more["finalists"]) == 2
    shutil.copytree(run.folder, tmp_path / "alone", ignore=shutil.ignore_patterns("students", "trainings*", "res*"))
    monkeypatch.setattr(SealedImages, "run", tmp_path / "alone")
    of(Run(tmp_path / "alone"), Finals(finalists=4))

    def marked(folder):
        lines = RunFolder(folder).lines("trainings.jsonl")
        keys = [(line["code"], line["seed"], line["settings"], line["step"]) for line in lines]
        assert len(set(keys)) == len(keys)  # nothing is trained twice
        return dict(zip(keys, (line["accuracy"] for line in lines), strict=True))

    both, alone = marked(run.folder), marked(tmp_path / "alone")
    assert all(both[key] == accuracy for key, accuracy in alone.items())


@pytest.mark.parametrize(("workers", "last"), [(1, ["finalist"]), (2, ["finalist", "finalist", "control"])])
def test_controls_are_trained_beside_the_last_finalist_where_a_worker_is_free(run, workers, last):
    batches = []

    def train_all(jobs):
        batches.append([each.role for each in jobs])
        codes = [run.space.code(each.architecture) for each in jobs]
        return [
            TrainingRow(code, code, "", 0, each.step or 8, 8, accuracy=1 / (1 + order.index(code)))
            for code, each in zip(codes, jobs, strict=True)
        ]

    trainings = SimpleNamespace(train_all=train_all, workers=SimpleNamespace(count=workers))
    own = job._Finals(run, Finals(finalists=4, controls=("labels",)), by_params().retrain, trainings)
    architectures = [entry.architecture for entry in run.ranking()[:4]]
    order = [run.space.code(architecture) for architecture in architectures]
    contests = own.contests(architectures)
    assert batches == [["finalist"] * 4, ["finalist"] * 2, last]
    contest = contests["finalist"]
    assert contest.index == 0 and contest.steps == 2 * 2 + 4 + 8
    assert [network.name for network in own.networks(contests)] == ["student", "control"]


def test_the_first_network_that_is_built_does_not_change_the_data(run):
    """It is built without weights, on the meta device, on which data that are read only then would be garbage."""
    first, architecture = Run(run.folder), run.ranking()[0].architecture
    Trainings(first).training(architecture, by_params().retrain)
    assert first.data.train.digest() == run.data.train.digest()
    assert first.data.preprocessing == run.data.preprocessing and first.data.train.labels.device.type == "cpu"


def test_a_finalist_s_training_is_a_retraining(run):
    exported = export(run, 1, deploy=False)
    settings, out = by_params().retrain, run.folder / "students" / "retrained"
    row = Trainings(run).train("finalist", run.ranking()[0].architecture, settings)
    SealedImages.reads = 0
    run.storage.finish("finals", winner=row.name)  # so that the other one may read the test part
    retrain(run.folder / "students" / "place-1", settings, out, deploy=False)
    assert exported["place"] == 1
    own, other = (load_file(run.folder / "students" / name / "weights.safetensors") for name in (row.name, "retrained"))
    assert own.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in own.items())


def test_a_training_whose_loss_is_not_finite_is_out_and_the_others_go_on(run, monkeypatch):
    first = Run(run.folder).ranking()[0]
    drive = _trainings.train_with_checkpoints

    def diverges(training, phase, *rest, **options):
        if phase == "finalist-1":
            raise FloatingPointError("the loss 'student' became nan at step 0.")
        return drive(training, phase, *rest, **options)

    monkeypatch.setattr(_trainings, "train_with_checkpoints", diverges)
    result = of(run, Finals(controls=()))
    assert result["finalists"][0]["problem"].startswith("the loss") and result["code"] != first.code
    monkeypatch.setattr(_trainings, "train_with_checkpoints", lambda *_, **__: diverges(None, "finalist-1"))
    with pytest.raises(ValueError, match="no finalist could be trained: the loss 'student' became nan"):
        finals(
            Run(run.folder),
            Finals(),
            dataclasses.replace(by_params().retrain, weights="fresh", recipe=toy.Recipe(steps=9)),
        )


def row(step, steps, seconds):
    return TrainingRow("finalist-1", "0", "0", 0, step, steps, 0.5, seconds)


@pytest.mark.parametrize(
    ("limit", "count"),
    [(1e9, 8), (40.0, 8), (39.9, 7), (20.0, 4), (10.0, 1)],
)
def test_there_are_as_many_finalists_as_there_is_time_for(run, limit, count):
    """A training takes 10 s; eight cost 8/4 + 4/4 + 2/2 of it, seven 7/4 + 3/4 + 1/2, four 4/4 + 2/4 + 1/2."""
    own = job._Finals(run, Finals(finalists=8, max_time=limit), by_params().retrain, Trainings(run))
    assert own.affordable(8, row(100, 400, 2.5)) == count


def test_less_time_than_one_training_takes_is_refused_with_that_time(run):
    own = job._Finals(run, Finals(max_time=9.0), by_params().retrain, Trainings(run))
    with pytest.raises(ValueError, match="`max_time` must be at least 10 s, the time of one training, got 9 s"):
        own.affordable(3, row(100, 400, 2.5))


def test_what_finals_cost_by_hand():
    # Three seeds: two more of the student, three without a teacher, the random contest and two more of its best.
    assert Finals(seeds=3, controls=("labels", "random")).trainings == (2.0, 2 + 3 + (2 + 2))
    assert Finals(seeds=3, controls=("longer",)).trainings == (2.0, 2 + 3 * 2.0)
    assert Finals(finalists=1, controls=()).trainings == (1.0, 0.0)
    assert marks(400) == (100, 200, 400) and marks(3) == (1, 3) and marks(1) == (1,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"finalists": 0}, "`finalists` must be at least 1, got 0"),
        ({"seeds": 0}, "`seeds` must be at least 1, got 0"),
        ({"distance": 1.5}, "`distance` must be at most 1, got 1.5"),
        ({"max_time": 0.0}, "`max_time` must be above 0, got 0"),
        (
            {"controls": ("larges",)},
            "`controls` must be one of labels, random, largest, longer, contrast, got",
        ),
        ({"pruner": "median"}, "`pruner` must be a Spec, got 'median'"),
    ],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        Finals(**options)


def test_the_command_and_the_function_are_one(run, capsys):
    main(["finals", str(run.folder), "--finalists", "2", "--no-deploy", "--json", "--pruner", "nop"])
    result = json.loads(capsys.readouterr().out)
    assert [row["step"] for row in result["finalists"]] == [8, 8]
    assert kdnas.finals(run.folder, finalists=2, pruner="nop", deploy=False) == result
    main(["finals", str(run.folder), "--finalists", "2", "--no-deploy", "--pruner", "nop"])
    assert "without a teacher" in capsys.readouterr().out
    with pytest.raises(ValueError, match="Optuna has no pruner"):
        kdnas.finals(run.folder, pruner="medain")


def test_without_a_search_there_is_nothing_to_train(tmp_path, capsys):
    with insisting(True):
        train(by_params(), tmp_path / "run")
    with pytest.raises(SystemExit) as stopped:
        main(["finals", str(tmp_path / "run")])
    assert stopped.value.code == 2
    assert "has no finished phase 'search' yet. Run: kdnas search" in capsys.readouterr().err
