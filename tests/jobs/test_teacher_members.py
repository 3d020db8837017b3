"""One command trains several teachers, and their ensemble teaches."""

import dataclasses
from pathlib import Path

import pytest
import torch

from kdnas.cli.commands import main
from kdnas.jobs._run import Run
from kdnas.runs.checkpoint import load_state
from kdnas.runs.folder import RunFolder
from kdnas.settings import Experiment, FitTeacher
from kdnas.students.folder import read_student
from kdnas.teachers.combined import Ensemble
from kdnas.teachers.fitted import fitted_teacher
from tests.killing import CHECKPOINT, killed
from tests.toy import experiment, oracle

ROOT = Path(__file__).parents[2]
MEMBERS = ("teacher-members/1", "teacher-members/2", "teacher")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("members") / "run"
    main(["train", "tests/toy.py:oracle", "--out", str(folder)])
    return folder


def test_the_members_differ_in_their_seed_and_teach_as_an_ensemble(trained):
    run = Run(trained)
    assert isinstance(run.teacher, Ensemble) and len(run.teacher.teachers) == 3
    cards = [read_student(trained / name)[1] for name in MEMBERS]
    assert [card.origin["seed"] for card in cards] == [0, 1, 2]
    pixels = run.data.test.take(torch.arange(8))
    members = run.teacher(pixels).members
    assert len({tuple(m.logits.flatten().tolist()) for m in members}) == 3
    storage = RunFolder(trained)
    assert storage.phase("teacher")["params"] == sum(card.cost.params for card in cards)
    right = run.teacher(run.data.search.take(torch.arange(30))).logits.argmax(1) == run.data.search.labels
    assert storage.phase("teacher")["search_accuracy"] == pytest.approx(right.float().mean().item())
    assert not storage.results()["rows"]  # the test part is for after a choice


def test_the_same_command_again_changes_nothing(trained):
    before = [(trained / name / "weights.safetensors").stat().st_mtime_ns for name in MEMBERS]
    main(["train", "tests/toy.py:oracle", "--out", str(trained)])
    assert [(trained / name / "weights.safetensors").stat().st_mtime_ns for name in MEMBERS] == before


def test_a_kill_between_two_members_ends_with_the_same_supernet(trained, tmp_path):
    folder = tmp_path / "killed"
    arguments = ["train", "tests/toy.py:oracle", "--out", str(folder)]
    killed(arguments, "given[1]['training']['index'] == 3 and '2.' in given[0].name", **CHECKPOINT)
    assert [(folder / name).exists() for name in MEMBERS] == [True, False, False]
    main(arguments)
    whole, resumed = (load_state(f / "checkpoint.safetensors")["training"]["model"] for f in (trained, folder))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def test_settings_survive_their_manifest_and_a_contradiction_is_refused():
    made = oracle()
    assert Experiment.from_json(made.to_json()) == made
    with pytest.raises(ValueError, match="an ensemble or a route"):
        dataclasses.replace(made.train.teacher, snapshots=2)
    with pytest.raises(ValueError, match="at least 1"):
        FitTeacher(members=0)


def test_a_fitted_teacher_has_as_many_blocks_as_asked():
    assert [len(stage) for stage in fitted_teacher((1, 8, 8), 3, 3).stages] == [3, 3, 3]
    assert fitted_teacher((1, 8, 8), 3, 1) == fitted_teacher((1, 8, 8), 3)
    assert fitted_teacher((1, 32, 32), 3, 2) == fitted_teacher((1, 32, 32), 3)
    asked = dataclasses.replace(experiment().train, teacher=FitTeacher(blocks=2))
    assert Experiment.from_json(Experiment(train=asked).to_json()).train == asked
    with pytest.raises(ValueError, match="`blocks` must be at least 0"):
        FitTeacher(blocks=-1)


def test_a_number_of_members_without_teachers_to_train_is_refused(tmp_path, capsys):
    arguments = ["run", "--data", "tests.toy:data", "--space", "toy", "--teacher", "tests.toy:cnn"]
    with pytest.raises(SystemExit):
        main([*arguments, "--teacher-members", "2", "--out", str(tmp_path / "run")])
    assert "--teacher-members must be 1 where --teacher is not fit, got 2" in capsys.readouterr().err
