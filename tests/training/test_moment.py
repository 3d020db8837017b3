"""What changes during a training reaches teachers and losses as an argument, and is stored on neither."""

import pytest
import torch

from kdnas.distillers.aggregation import Aggregation
from kdnas.distillers.from_teacher import FromTeacher
from kdnas.distillers.sandwich import Sandwich
from kdnas.distillers.single_path import SinglePath
from kdnas.losses.base import Loss
from kdnas.network import Network
from kdnas.outputs import Outputs
from kdnas.randomness import initialised
from kdnas.settings import Recipe
from kdnas.specs import find_spec
from kdnas.supernet import Supernet
from kdnas.tables import load_space
from kdnas.teachers.base import Frozen, Teacher
from kdnas.teachers.combined import Ensemble, Route, Streamed
from kdnas.training.loop import Training
from tests.toy import data

SPACE, DATA = load_space("toy").fitted(classes=3, image_channels=3), data()
RECIPE = Recipe(steps=6, batch_size=16, learning_rate=0.05)
TERMS = tuple((1.0, find_spec("kdnas.losses", name)) for name in ("route_constrained", "aggregation"))


def frozen(seed=5):
    network = initialised(lambda: Network(SPACE.blueprint(SPACE.largest)), seed)
    return Frozen(network, preprocessing=DATA.preprocessing)


def training(distiller, teacher):
    kind = Supernet if distiller.model_type is Supernet else Network
    made = SPACE if kind is Supernet else SPACE.blueprint(SPACE.smallest)
    return Training(initialised(lambda: kind(made), 0), distiller, DATA, teacher, RECIPE)


def attributes(*modules):
    """Of every teacher and loss, by place: plain attributes, and the names of tensors and parts."""
    values = {}
    for root in modules:
        for name, module in root.named_modules():
            if isinstance(module, Teacher | Loss):
                for key, value in vars(module).items():
                    values[type(module), name, key] = tuple(value) if isinstance(value, dict) else value
    return values


def many():
    return Ensemble([Route([frozen(5), frozen(6)]), Streamed(lambda: Route([frozen(6)]))], mean="logits")


@pytest.mark.parametrize(
    ("distiller", "teacher"),
    [
        (FromTeacher(terms=TERMS), Route([frozen(5), frozen(6), frozen(7)])),
        (Sandwich(terms=TERMS), many()),
        (SinglePath(terms=TERMS), Ensemble([frozen(5), frozen(6)], mean="random")),
        (Aggregation(), frozen()),
    ],
)
def test_nothing_is_assigned_on_a_teacher_or_a_loss_by_a_step(distiller, teacher):
    made = training(distiller, teacher)
    made.step()
    before = attributes(made.teacher, made.distiller)
    assert len({kind for kind, _, _ in before}) >= 2
    while not made.done:
        made.step()
    assert attributes(made.teacher, made.distiller) == before


def test_the_ids_and_the_progress_that_reach_a_loss_and_a_teacher_are_those_of_the_batch(monkeypatch):
    of_loss, of_teacher = [], []

    class Watched(Teacher):
        def teach(self, pixels, labels, at):
            of_teacher.append(at)
            return Outputs(torch.zeros(len(pixels), 3))

    made = training(FromTeacher(), Watched())
    of_teacher.clear()
    (_, loss) = made.distiller.objective.losses.values()
    compute = loss.compute
    monkeypatch.setattr(loss, "compute", lambda *arguments: of_loss.append(arguments[3]) or compute(*arguments))
    while not made.done:
        made.step()
    assert len(of_loss) == len(of_teacher) == 6
    for moments in (of_loss, of_teacher):
        for step, at in enumerate(moments):
            assert at.progress == step / 6 and at.remaining is None
            assert torch.equal(at.ids, DATA.indices(RECIPE.seed, step, 16))


def test_each_part_of_a_split_batch_has_its_own_ids(monkeypatch):
    made = training(Aggregation(), frozen())
    moments, compute = [], made.distiller.hint.compute
    monkeypatch.setattr(
        made.distiller.hint, "compute", lambda *arguments: moments.append(arguments[3]) or compute(*arguments)
    )
    made.step()
    even, odd = (at.ids % 2 for at in moments)
    assert (even == 0).all() and (odd == 1).all() and len(even) + len(odd) == 16
    assert all(at.remaining is not None for at in moments)
