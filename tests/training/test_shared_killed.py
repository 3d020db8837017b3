"""SIGKILL of either of two processes, and other numbers of processes: a training goes on as if nothing had happened."""

import time

import pytest
import torch

from kdnas.distillers.sandwich import Sandwich
from kdnas.randomness import initialised
from kdnas.ranks import team
from kdnas.runs.folder import CHECKPOINT, METRICS, RunFolder
from kdnas.runs.lock import command
from kdnas.settings import Recipe
from kdnas.supernet import Supernet
from kdnas.training import driver
from kdnas.training.driver import train_with_checkpoints
from kdnas.training.loop import Training
from tests import processes
from tests.distillers.spaces import TOY
from tests.processes import outcome, started, together
from tests.toy import data


def save_every_step():
    driver.CHECKPOINT_SECONDS = 0.0


@pytest.fixture(autouse=True)
def every_step_is_saved(monkeypatch):
    monkeypatch.setattr(driver, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(processes, "prepare", save_every_step)


def train(folder, steps, until=None):
    """The weights after a training in a run folder, which goes on where it was interrupted."""
    with command():
        storage = RunFolder.create(folder, {"name": "test"}, 0)
        supernet = initialised(lambda: Supernet(TOY), 0)
        distiller = Sandwich(terms=(), num_random=0)
        training = Training(supernet, distiller, data(), None, Recipe(steps=steps, batch_size=12, learning_rate=0.02))
        train_with_checkpoints(training, "train", folder / CHECKPOINT, storage, until=until)
        return {name: tensor.clone() for name, tensor in training.model.state_dict().items()}


def steps_of(folder):
    return [line["step"] for line in RunFolder(folder).lines(METRICS)] if (folder / METRICS).exists() else []


def check(folder, weights, steps, tmp_path):
    """Every step is recorded once, and the weights are those of one process that nobody stopped."""
    assert steps_of(folder) == list(range(steps))
    assert not list(folder.glob(".*"))
    for name, tensor in train(tmp_path / "whole", steps).items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-5 * steps, msg=name)


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_nothing_is_lost_where_either_process_is_killed(tmp_path, kills):
    folder, steps = tmp_path / "killed", kills + 2
    for kill in range(kills):
        with started(lambda: train(folder, steps)) as (processes, readers):
            while len(steps_of(folder)) <= kill and all(process.is_alive() for process in processes):
                time.sleep(0.001)
            victim, other = (0, 1) if kill % 2 else (1, 0)
            processes[victim].kill()
            assert f"process {victim} of 2 has ended" in str(outcome(readers[other]))
    check(folder, together(lambda: train(folder, steps)), steps, tmp_path)


def test_a_training_goes_on_with_another_number_of_processes(tmp_path):
    folder = tmp_path / "changing"
    together(lambda: train(folder, 4, until=1))
    train(folder, 4, until=3)
    assert team.number() == 1
    check(folder, together(lambda: train(folder, 4)), 4, tmp_path)
