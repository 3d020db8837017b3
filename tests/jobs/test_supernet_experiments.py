"""Every experiment that trains a supernet builds, survives its manifest, and takes two steps at its small size."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from kdnas.data.base import Data
from kdnas.distillers.base import Distiller
from kdnas.jobs._arguments import load_experiment
from kdnas.jobs._run import build_teacher
from kdnas.network import Network
from kdnas.randomness import initialised
from kdnas.settings import Experiment, FitTeacher
from kdnas.supernet import Supernet, corner
from kdnas.teachers.base import Frozen
from kdnas.teachers.fitted import fitted_teacher
from kdnas.training.loop import Training

FOLDER = Path(__file__).parents[2] / "experiments"
NAMES = ("spos", "fairnas", "ofa", "bignas", "attentivenas", "alphanet", "dna", "cream", "okd", "dfa")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", ["experiment", "small"])
def test_an_experiment_is_what_its_manifest_says(name, size):
    made = load_experiment(f"{FOLDER / name}.py:{size}")
    assert Experiment.from_json(json.loads(json.dumps(made.to_json()))) == made
    made.train.distiller.build(Distiller)
    assert made.train.space.count() > 100


@pytest.mark.parametrize("name", NAMES)
def test_a_small_experiment_takes_two_steps(name):
    settings = load_experiment(f"{FOLDER / name}.py:small").train
    data = settings.data.build(Data)
    space = settings.space.fitted(classes=data.classes, image_channels=data.channels)
    share = corner if settings.share is None else settings.share.build()
    supernet = initialised(lambda: Supernet(space, share), 0)
    teacher = Frozen(Network(fitted_teacher(data.image, data.classes)), preprocessing=data.preprocessing)
    assert isinstance(settings.teacher, FitTeacher) or build_teacher(settings.teacher, data)
    recipe = dataclasses.replace(settings.recipe, steps=12, batch_size=8)
    training = Training(supernet, settings.distiller.build(Distiller), data, teacher, recipe)
    before = {name: tensor.clone() for name, tensor in supernet.named_parameters()}
    for _ in range(2):
        training.step()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in supernet.named_parameters())
