"""Every distiller on networks that answer for every pixel: it trains them, or says in one sentence that it cannot."""

import math
from dataclasses import replace

import pytest

from kdnas.distillers.base import Distiller
from kdnas.distillers.conflict_free import ConflictFree
from kdnas.distillers.from_teacher import FromTeacher
from kdnas.distillers.prioritized import Prioritized
from kdnas.losses.dense.pixel_wise import PixelWise
from kdnas.network import Network
from kdnas.randomness import initialised
from kdnas.settings import Recipe
from kdnas.specs import algorithms, resolve, spec
from kdnas.supernet import Supernet
from kdnas.tasks.base import HINTON
from kdnas.tasks.classification import Classification
from kdnas.tasks.segmentation import Segmentation
from kdnas.teachers.base import Frozen
from kdnas.training.loop import Training
from tests.tasks.test_segmentation import shapes
from tests.tasks.test_segmentation import space as segmenters

DATA = shapes()
SPACE = DATA.fitted(replace(segmenters(), heads=("aspp",)))
TEACHER = initialised(lambda: Network(SPACE.blueprint(SPACE.largest)), 1)
OF_IMAGES = ("prioritized", "self_distillation")
SLOW = ("quantization_aware",)  # its training traces the network, most of a minute


def training(name, space=SPACE):
    distiller = spec(resolve(algorithms("kdnas.distillers")[name])).build(Distiller)
    of_networks = distiller.model_type is Network
    model = initialised(lambda: Network(space.blueprint(space.largest)) if of_networks else Supernet(space), 0)
    teacher = Frozen(TEACHER, preprocessing=DATA.preprocessing)
    return Training(model, distiller, DATA, teacher, Recipe(steps=3, batch_size=4, learning_rate=0.05))


@pytest.mark.parametrize("name", [name for name in algorithms("kdnas.distillers") if name not in (*OF_IMAGES, *SLOW)])
def test_a_distiller_trains_networks_that_answer_for_every_pixel(name):
    trained = training(name)
    for _ in range(3):
        values = trained.step()
        assert values and all(map(math.isfinite, values.values()))


@pytest.mark.parametrize("name", OF_IMAGES)
def test_what_needs_logits_of_whole_images_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} needs one answer for the whole image, these networks have one for"):
        training(name)


def test_what_is_wrapped_is_refused_too():
    wrapped = ConflictFree(inner=spec(Prioritized))
    wrapped.check_answers(False)
    with pytest.raises(ValueError, match="prioritized needs one answer for the whole image"):
        wrapped.check_answers(True)


def test_a_bridge_runs_through_a_head_of_two_maps():
    trained = training("aggregation", DATA.fitted(segmenters()))
    assert math.isfinite(trained.step()["bridge"])


def test_the_task_says_how_a_network_learns_from_a_teacher_where_nobody_does():
    (labels, of_labels), (teacher, of_teacher) = zip(
        (objective := training("from_teacher").distiller.objective).weights, objective.losses.values(), strict=True
    )
    assert (labels, teacher) == (1.0, 1.0) and isinstance(of_teacher, PixelWise)
    assert not isinstance(of_labels, PixelWise)
    named = FromTeacher(terms=HINTON)
    named.suit(DATA.task)
    assert named.objective.weights == (0.1, 0.9)


def test_class_weights_reach_the_labels_at_their_full_weight():
    weights = tuple(range(1, 1 + DATA.classes))
    distiller = FromTeacher()
    distiller.suit(Segmentation(class_weights=weights))
    assert distiller.objective.weights[0] == 1.0
    assert next(iter(distiller.objective.losses.values())).class_weights == weights


def test_classes_are_learnt_as_ever():
    distiller = FromTeacher()
    before = distiller.objective
    distiller.suit(Classification())
    assert distiller.objective is before and before.weights == (0.1, 0.9)
