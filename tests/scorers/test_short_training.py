import dataclasses

import pytest
import torch

from kdnas.scorers.accuracy import Accuracy
from kdnas.scorers.short_training import ShortTraining
from kdnas.specs import spec
from kdnas.training.loop import Training
from tests.scorers.scene import SPACE, evidence, network

FROM_LABELS = spec("kdnas.distillers.from_labels:FromLabels")


@pytest.fixture(scope="module")
def held():
    return evidence()


def short(**arguments):
    return ShortTraining(**{"steps": 2, "batch_size": 12, **arguments})


def test_the_score_is_the_accuracy_of_the_copy_after_the_steps(held, monkeypatch):
    trained, step = [], Training.step

    def watched(self):
        trained.append(self.model)
        return step(self)

    monkeypatch.setattr(Training, "step", watched)
    student = network(3)
    found = short(steps=3).score(student, held)
    assert len(trained) == 3
    assert found.value == Accuracy().score(trained[-1], held).value
    assert not any(torch.equal(a, b) for a, b in zip(trained[-1].parameters(), student.parameters(), strict=True))


def test_fresh_weights_forget_the_students_own_and_inherited_ones_do_not(held):
    assert short().score(network(1), held) == short().score(network(2), held)
    assert short(weights="inherited").score(network(1), held) != short(weights="inherited").score(network(2), held)


def test_the_seed_of_the_evidence_decides_everything(held):
    student = network(1)
    first = short().score(student, held)
    assert short().score(network(1, SPACE.smallest), held) != first
    assert short().score(student, held) == first
    assert short().score(student, dataclasses.replace(held, seed=1)) != first
    kept = short(weights="inherited")  # the seed orders the images too
    assert kept.score(student, dataclasses.replace(held, seed=1)) != kept.score(student, held)


def test_with_and_without_distillation_are_two_scores(held):
    without = dataclasses.replace(held, teacher_module=None)
    assert short(distiller=FROM_LABELS).score(network(1), without) != short().score(network(1), held)
    with pytest.raises(ValueError, match="needs a teacher"):
        short().score(network(1), without)


def test_longer_training_lowers_the_loss_on_the_toy_data(held):
    scores = [short(steps=n, distiller=FROM_LABELS, learning_rate=0.05).score(network(1), held) for n in (1, 12)]
    assert scores[1].parts["cross_entropy"] < scores[0].parts["cross_entropy"]


def test_what_it_cannot_train_is_refused(held):
    with pytest.raises(ValueError, match="needs a data set, and the evidence has none"):
        short().score(network(1), dataclasses.replace(held, data=None))
    with pytest.raises(ValueError, match="`weights` must be one of fresh, inherited"):
        short(weights="old")
    with pytest.raises(ValueError, match="`steps` must be at least 1"):
        short(steps=0)
