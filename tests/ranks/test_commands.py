"""Commands in two processes: every training of them is shared, and what cannot be shared is refused first."""

import json
import subprocess
import sys

import pytest

import kdnas
from kdnas.network import Network
from kdnas.ranks import team
from kdnas.runs.folder import METRICS
from kdnas.students.card import Card
from kdnas.students.folder import read_student, write_student
from tests.distillers.spaces import TOY as SPACE
from tests.processes import together
from tests.toy import data

DATA = {"data": "tests.toy:data", "batch_size": 16}
RUN = {**DATA, "teacher": "fit,width=8", "space": "toy", "budget": "macs=70k", "scorer": "params", "steps": 2}


def shared_steps(command):
    """The number of steps that two processes took together in a command, and its result."""

    def lead():
        calls, everywhere = [], team.everywhere

        def counted(function, *args, **options):
            calls.append(function.__name__)
            return everywhere(function, *args, **options)

        team.everywhere = counted  # in this process, which ends with the command
        result = command()
        return calls.count("_take"), result if isinstance(result, dict) else None

    return together(lead)


def test_a_run_shares_the_trainings_of_teacher_supernet_finalist_and_control(tmp_path):
    out = tmp_path / "run"
    count, _ = shared_steps(lambda: kdnas.run(**RUN, num_evaluations=2, finalists=1, deploy=False, out=out))
    rows = [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
    names = {row["phase"] for row in rows}
    assert count == 8, names


@pytest.fixture
def student(tmp_path):
    network = Network(SPACE.blueprint(SPACE.smallest))
    write_student(tmp_path / "student", network, Card.of(network, data(), {}), deploy=False)
    return tmp_path / "student"


def test_a_retraining_is_shared(student):
    options = {**DATA, "teacher": "none", "distiller": "from_labels", "steps": 3, "out": student.with_name("new")}
    count, result = shared_steps(lambda: kdnas.retrain(student, **options))
    assert count == 3 and result["params"] == sum(p.numel() for p in read_student(options["out"])[0].parameters())


def test_a_pruning_shares_its_trials_and_trainings(tmp_path):
    options = {"source": "tests.toy:steady_cnn", "budget": "macs=60%", "controls": False, "steps": 10, "insist": True}
    count, result = shared_steps(lambda: kdnas.prune(**DATA, **options, out=tmp_path / "run"))
    assert count >= 10 and result["accuracy"] >= 0


@pytest.mark.slow  # three processes import torch
def test_torchrun_trains_a_teacher_by_two_processes(tmp_path):
    words = ["fit", "--data", "tests.toy:data", "--width", "8", "--steps", "2", "--batch-size", "16", "--json"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "kdnas", *words, "--out", str(tmp_path / "teacher")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["teacher"] == str(tmp_path / "teacher")


@pytest.mark.parametrize("command", ["run", "fit", "prune"])
def test_a_batch_without_equal_parts_is_refused_before_anything_is_written(command, tmp_path, student, monkeypatch):
    monkeypatch.setattr(team, "number", lambda: 2)
    out = tmp_path / "new"
    odd = {"data": "tests.toy:data", "batch_size": 7, "steps": 2, "out": out}
    call = {
        "run": lambda: kdnas.run(**RUN | odd),
        "fit": lambda: kdnas.fit(**odd),
        "prune": lambda: kdnas.prune(**odd, source="tests.toy:steady_cnn", budget="macs=60%"),
    }[command]
    with pytest.raises(ValueError, match="`batch_size` must be a multiple of the number of processes, 2, got 7"):
        call()
    assert not out.exists()
