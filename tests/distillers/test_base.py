"""What every distiller with an objective does alike."""

import pytest
import torch

from kdnas.distillers.base import Schedule
from kdnas.distillers.born_again import BornAgain
from kdnas.distillers.from_teacher import FromTeacher
from kdnas.network import Network
from kdnas.randomness import initialised
from kdnas.settings import Recipe
from kdnas.specs import find_spec
from kdnas.supernet import Supernet
from kdnas.tables import load_space
from kdnas.training.loop import Training
from tests.toy import data

SPACE, DATA = load_space("toy").fitted(classes=3, image_channels=3), data()
LABELS = ((1.0, find_spec("kdnas.losses", "cross_entropy")),)
SOFT = ((1.0, find_spec("kdnas.losses", "soft_targets")),)
STAGES = (("full", 1, 1.0, 1), ("width", 0, 1.0, 2))


@pytest.mark.parametrize(
    ("name", "options", "uses"),
    [
        ("sandwich", {}, True),
        ("sandwich", {"terms": ()}, False),
        ("sandwich", {"terms": LABELS}, False),
        ("single_path", {}, False),
        ("single_path", {"terms": SOFT}, True),
        ("progressive", {"stages": STAGES}, False),
        ("progressive", {"stages": STAGES, "source": "teacher"}, True),
        ("progressive", {"stages": STAGES, "terms": SOFT}, True),
        ("prioritized", {}, False),
        ("conflict_free", {"inner": find_spec("kdnas.distillers", "sandwich", terms=())}, False),
        ("conflict_free", {}, True),
    ],
)
def test_a_distiller_that_uses_no_teacher_trains_without_one_and_others_do_not(name, options, uses):
    distiller = find_spec("kdnas.distillers", name, **options).build()
    assert distiller.uses_teacher == uses

    def train():
        model = initialised(lambda: Supernet(SPACE), 0)
        training = Training(model, distiller, DATA, None, Recipe(steps=2, batch_size=16, learning_rate=0.05))
        while not training.done:
            training.step()

    if uses:
        with pytest.raises(ValueError, match="needs a teacher"):
            train()
    else:
        train()


def test_a_supernet_that_learns_from_labels_alone_is_as_it_was_after_preparing():
    for name in ("single_path", "sandwich"):
        model = initialised(lambda: Supernet(SPACE), 0)
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        distiller = find_spec("kdnas.distillers", name, terms=()).build()
        Training(model, distiller, DATA, None, Recipe(steps=2, batch_size=16, learning_rate=0.05))
        same = all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
        assert same == (name == "single_path")  # a sandwich's soft loss is prepared from a pass


def test_losses_get_the_remaining_layers_of_their_own_student():
    network = initialised(lambda: Network(SPACE.blueprint(SPACE.smallest)), 0)
    maps, logits = {}, {}
    terms = ((1.0, find_spec("kdnas.losses", "aggregation")),)
    for name, model, architecture in (
        ("network", network, None),
        ("supernet", initialised(lambda: Supernet(SPACE), 0), SPACE.smallest),
    ):
        distiller = FromTeacher(terms=terms)
        training = Training(network, FromTeacher(terms=LABELS), DATA, None, Recipe(steps=2, batch_size=16))
        batch = training._batch(0)
        student = model(batch.images) if architecture is None else model(batch.images, architecture)
        batch.__dict__["teacher"] = student.detach()
        distiller.objective.prepare(student, student)
        moments, loss = [], distiller.objective.losses["aggregation"]
        compute = loss.compute
        loss.compute = lambda *arguments, compute=compute, moments=moments: (
            moments.append(arguments[3]) or compute(*arguments)
        )
        step = type("Step", (), {"progress": 0.0, "weigh": False})()
        list(distiller.student_losses("student", student, model, batch, step, architecture))
        maps[name] = student.features[-1]
        logits[name] = moments[0].remaining(1, student.features[1])
        assert torch.equal(moments[0].ids, batch.ids)
    own = network.remaining_layers(1, maps["network"])
    assert torch.equal(logits["network"], own) and logits["supernet"].shape == own.shape


def test_a_learning_rate_curve_begins_anew_where_the_schedule_says():
    whole = Schedule(10)
    assert [whole.curve(index) for index in (0, 9)] == [(0, 10), (9, 10)]
    parts = Schedule(10, curves=frozenset({7, 3}))
    assert [parts.curve(index) for index in (0, 2, 3, 6, 7, 9)] == [(0, 3), (2, 3), (0, 4), (3, 4), (0, 3), (2, 3)]
    assert BornAgain(generations=3).schedule(7) == Schedule(7, frozenset({2, 4}), frozenset({2, 4}))


def test_every_option_may_be_trained_unless_a_schedule_restricts_them():
    choice = SPACE.choices[0]
    assert Schedule(10).options(choice, 0) == choice.options
    inner = find_spec("kdnas.distillers", "progressive", stages=STAGES)
    schedule = find_spec("kdnas.distillers", "ranked", inner=inner).build().schedule(10)
    widths = next(c for c in SPACE.choices if "width" in c.name)
    assert schedule.options(widths, 4) == widths.options[-1:] and schedule.options(widths, 5) == widths.options
    assert schedule.restarts == {5}
