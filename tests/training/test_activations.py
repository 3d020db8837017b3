"""Activations that are computed again in the backward pass change nothing but memory."""

import dataclasses

import pytest
import torch

from kdnas.distillers.from_teacher import FromTeacher
from kdnas.distillers.sandwich import Sandwich
from kdnas.network import Network
from kdnas.randomness import initialised
from kdnas.settings import Recipe
from kdnas.supernet import Supernet
from kdnas.tables import load_space
from kdnas.teachers.base import Frozen
from kdnas.training.loop import Training
from tests.toy import data

DATA = data()
RECIPE = Recipe(steps=3, batch_size=12, learning_rate=0.05, warmup=0.0)
SPACES = {name: load_space(name).fitted(classes=3, image_channels=3) for name in ("toy", "elastic_resnet")}


def trained(kind, space, activations):
    """The state after three steps, and the bytes that their graphs held."""
    largest, smallest = space.blueprint(space.largest), space.blueprint(space.smallest)
    taught = Frozen(initialised(lambda: Network(largest), 1), preprocessing=DATA.preprocessing)
    recipe, held = dataclasses.replace(RECIPE, activations=activations), []
    if kind == "supernet":
        model, distiller, teacher = initialised(lambda: Supernet(space), 0), Sandwich(terms=()), None
    else:
        model, distiller, teacher = initialised(lambda: Network(smallest), 0), FromTeacher(), taught
    training = Training(model, distiller, DATA, teacher, recipe)
    keep = lambda tensor: held.append(tensor.numel()) or tensor  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = [training.step() for _ in range(3)]
    return training.state(), losses, sum(held)


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("kind", ["supernet", "network"])
def test_a_training_is_the_same_and_holds_less(kind, name):
    (kept, losses, most), (again, others, least) = (
        trained(kind, SPACES[name], activations) for activations in ("kept", "recomputed")
    )
    assert losses == others
    for part in ("model", "distiller"):
        assert kept[part].keys() == again[part].keys()
        assert all(torch.equal(kept[part][name], again[part][name]) for name in kept[part])
    assert kept["uses"] == again["uses"]
    assert least < most / 2
