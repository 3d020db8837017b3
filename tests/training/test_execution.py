"""A training of compiled layers is that of their own code up to rounding."""

import dataclasses
import functools

import pytest
import torch

from kdnas.compilation import compiling
from kdnas.distillers.from_teacher import FromTeacher
from kdnas.distillers.sandwich import Sandwich
from kdnas.network import Network
from kdnas.randomness import initialised
from kdnas.settings import Recipe
from kdnas.supernet import Supernet
from kdnas.tables import load_space
from kdnas.teachers.base import Frozen
from kdnas.training import loop
from kdnas.training.loop import Training
from tests.toy import data

DATA = data()
SPACE = load_space("toy").fitted(classes=3, image_channels=3)
RECIPE = Recipe(steps=3, batch_size=12, learning_rate=0.05, warmup=0.0)


def trained(kind, recipe):
    """The state after three steps, their losses, and the number of programs."""
    largest, smallest = SPACE.blueprint(SPACE.largest), SPACE.blueprint(SPACE.smallest)
    taught = Frozen(initialised(lambda: Network(largest), 1), preprocessing=DATA.preprocessing)
    if kind == "supernet":
        model, distiller, teacher = initialised(lambda: Supernet(SPACE), 0), Sandwich(terms=()), None
    else:
        model, distiller, teacher = initialised(lambda: Network(smallest), 0), FromTeacher(), taught
    training = Training(model, distiller, DATA, teacher, recipe)
    losses = [training.step() for _ in range(3)]
    return training.state(), losses


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["supernet", "network"])
def test_a_training_is_the_same_up_to_rounding(monkeypatch, kind, precision):
    calls = []

    def backend(graph, inputs):
        calls.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    monkeypatch.setattr(loop, "check_compiler", lambda device: None)
    monkeypatch.setattr(loop, "compiling", functools.partial(compiling, backend=backend))
    recipe = dataclasses.replace(RECIPE, precision=precision)
    own, losses = trained(kind, recipe)
    assert not calls
    other, others = trained(kind, dataclasses.replace(recipe, execution="compiled"))
    assert calls
    tolerance = {"float32": 1e-5, "bfloat16": 1e-2}[precision]
    torch.testing.assert_close(others, losses, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(other["model"], own["model"], rtol=tolerance, atol=tolerance)  # with the same keys
    assert own["uses"] == other["uses"]


def test_without_a_compiler_no_training_begins(monkeypatch):
    monkeypatch.setenv("CXX", "no-compiler")
    monkeypatch.setenv("CC", "no-compiler")
    with pytest.raises(ValueError, match="`execution` must be eager on this machine, got compiled"):
        trained("network", dataclasses.replace(RECIPE, execution="compiled"))


def test_activations_of_compiled_layers_are_kept():
    with pytest.raises(ValueError, match="`activations` must be kept where `execution` is compiled"):
        Recipe(activations="recomputed", execution="compiled")
