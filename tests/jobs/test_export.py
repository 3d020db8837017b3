"""Every student that leaves a run has batch-norm statistics of its own, re-estimated on training images."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from kdnas.jobs._run import Run
from kdnas.jobs.export import calibration_batches, export, inherited
from kdnas.jobs.search import search
from kdnas.network import BATCH_NORMS, Network
from kdnas.randomness import initialised
from kdnas.runs.checkpoint import save_state
from kdnas.runs.folder import CHECKPOINT, RunFolder
from kdnas.settings import Search
from kdnas.students.folder import read_student
from kdnas.supernet import Supernet
from kdnas.tables import load_space
from kdnas.teachers.load import load_teacher
from tests.toy import data, experiment

SPACE = load_space("toy").fitted(classes=3, image_channels=3)
DATA = data()


def moments(maps):
    """Mean, and variance with n - 1 below, of each channel of one batch, `[batch, channels, height, width]`."""
    variance, mean = torch.var_mean(maps.double(), (0, 2, 3))
    return mean, variance


def mixed():
    """A supernet whose running statistics are those of no subnet."""
    supernet = initialised(lambda: Supernet(SPACE), 0).eval()
    for norm in (m for m in supernet.modules() if isinstance(m, BATCH_NORMS)):
        norm.running_mean.fill_(4.0)
        norm.running_var.fill_(25.0)
    return supernet


def with_statistics_of_the_data(network):
    """Its batch norms' means and variances over the calibration images, taken by hooks from a plain forward pass."""
    norms = {name: m for name, m in network.named_modules() if isinstance(m, BATCH_NORMS)}
    every: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {name: [] for name in norms}
    handles = [
        norm.register_forward_pre_hook(lambda _, args, name=name: every[name].append(moments(args[0])))
        for name, norm in norms.items()
    ]
    network.train()
    with torch.no_grad():
        for images in calibration_batches(DATA, torch.device("cpu")):
            network(images)
    for handle in handles:
        handle.remove()
    return {name: [sum(part) / len(part) for part in zip(*pairs, strict=True)] for name, pairs in every.items()}


def are_of_the_data(student, supernet, architecture):
    expected = with_statistics_of_the_data(supernet.extract(architecture))
    norms = {name: m for name, m in student.named_modules() if isinstance(m, BATCH_NORMS)}
    assert norms.keys() == expected.keys() and len(norms) > 1
    for name, (mean, variance) in expected.items():
        torch.testing.assert_close(norms[name].running_mean.double(), mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norms[name].running_var.double(), variance, rtol=1e-4, atol=1e-5)
    weights = dict(supernet.extract(architecture).named_parameters())
    assert all(torch.equal(p, weights[name]) for name, p in student.named_parameters())


@pytest.mark.parametrize("architecture", [SPACE.smallest, SPACE.largest])
def test_an_inherited_subnet_has_its_own_statistics_and_the_supernet_keeps_its_own(architecture):
    supernet = mixed()
    before = {name: tensor.clone() for name, tensor in supernet.state_dict().items()}
    opened = SimpleNamespace(
        experiment=experiment(), supernet=supernet, data=DATA, device=torch.device("cpu"), space=SPACE
    )
    student = inherited(opened, architecture)
    assert isinstance(student, Network) and not student.training
    are_of_the_data(student, supernet, architecture)
    assert all(torch.equal(tensor, before[name]) for name, tensor in supernet.state_dict().items())


@pytest.fixture
def searched(tmp_path):
    """A run as after training and a search, with a supernet whose statistics are mixed."""
    job = dataclasses.replace(
        experiment(), train=dataclasses.replace(experiment().train, teacher=load_teacher("tests.toy:cnn"))
    )
    run = RunFolder.create(tmp_path / "run", job.to_json(), 0)
    save_state(run.path(CHECKPOINT), {"training": {"model": dict(mixed().state_dict())}})
    run.finish("train", steps=0)
    opened = Run(run.folder)
    search(opened, Search(num_evaluations=4, num_images=12, control=False))
    return opened


def test_an_exported_student_has_statistics_of_its_own(searched):
    folder = searched.storage.path("students", "own")
    export(searched, place=2, out=folder, deploy=False)
    student, card = read_student(folder)
    are_of_the_data(student, mixed(), card.architecture)
