"""Classification as a task."""

import pytest
import torch

from kdnas.data.base import Data
from kdnas.tasks.base import Chance
from kdnas.tasks.classification import CLASSIFICATION, balanced_accuracy
from kdnas.testing import TaskContract
from tests import toy


class TestClassification(TaskContract):
    def data(self) -> Data:
        return toy.data()


def test_grades_are_hits_and_their_mean_is_the_accuracy():
    logits, labels = torch.eye(3)[[0, 1, 2, 0]], torch.tensor([0, 1, 1, 1])
    grades = CLASSIFICATION.grades(logits, labels)
    assert grades.tolist() == [True, True, False, False]
    assert float(CLASSIFICATION.quality(grades.double().mean(0))) == 0.5


def test_chance_is_the_mean_over_classes_below_two_standard_errors_above_guessing():
    labels = torch.tensor([0] * 90 + [1] * 10)
    assert CLASSIFICATION.chance(labels == 0, labels, "ab") == Chance(0.5, 0.5, " (mean over classes)")
    assert CLASSIFICATION.chance(labels >= 0, labels, "ab") is None
    assert balanced_accuracy(labels == 0, labels) == 0.5


@pytest.mark.parametrize(
    ("labels", "message"),
    [([0, 1, 3], "must be 0 to 2, the search part has 3"), ([1, 2, 3], "Subtract 1"), ([-1, 0, 1], "has -1")],
)
def test_labels_without_a_class_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        CLASSIFICATION.check("search", torch.tensor(labels), "abc")


def test_a_class_needs_two_training_images():
    with pytest.raises(ValueError, match="class 'b' has 1"):
        CLASSIFICATION.check("train", torch.tensor([0, 0, 1]), "ab")
    CLASSIFICATION.check("test", torch.tensor([0, 0, 1]), "ab")
