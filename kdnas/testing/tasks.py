"""What must hold for every task, as a class that anyone's tests can inherit."""

import dataclasses
import json
import math

import numpy as np
import torch
from torch import Tensor

from kdnas.data.base import Data
from kdnas.losses.base import Loss
from kdnas.outputs import START, Outputs
from kdnas.randomness import torch_rng
from kdnas.tasks.base import Task


class TaskContract:
    """What must hold for every task. Give a small data set, and logits in the form that a head gives.

        class TestMine(TaskContract):
            def data(self):
                return my_data()

    Attributes:
        positions: height and width of the logits; empty where there is one row of them per image.
    """

    positions: tuple[int, ...] = ()

    def data(self) -> Data:
        """A data set of the task, with at least 4 images in each part."""
        raise NotImplementedError

    def test_it_is_a_value(self) -> None:
        task = self._task()
        assert dataclasses.is_dataclass(task) and not isinstance(task, type)
        assert task == dataclasses.replace(task) and hash(task) == hash(dataclasses.replace(task))

    def test_grades_are_one_per_image_whatever_the_batch(self) -> None:
        logits, labels = self._outputs()
        whole = self._task().grades(logits, labels)
        apart = torch.cat([self._task().grades(logits[i : i + 1], labels[i : i + 1]) for i in range(len(labels))])
        assert len(whole) == len(labels) and torch.equal(whole, apart)

    def test_the_measure_is_a_number_of_mean_grades_of_many_samples(self) -> None:
        task = self._task()
        grades = task.grades(*self._outputs()).double()
        means = torch.stack([grades.mean(0), grades[:2].mean(0)])
        values = task.quality(means)
        assert values.shape == (2,) and math.isclose(float(values[0]), float(task.quality(grades.mean(0))))
        np.testing.assert_allclose(np.asarray(task.quality(means.numpy())), values.numpy())
        assert all(math.isfinite(value) for value in values.tolist())

    def test_outputs_do_not_diverge_from_themselves_and_divergences_of_images_add_up(self) -> None:
        (own, labels), task = self._outputs(), self._task()
        other = own.flip(0)
        apart = float(task.divergence(own, other, labels))
        assert abs(float(task.divergence(own, own, labels))) < 1e-5 * (1 + apart) and apart > 0
        each = [float(task.divergence(own[i : i + 1], other[i : i + 1], labels[i : i + 1])) for i in range(len(labels))]
        assert math.isclose(apart, sum(each), rel_tol=1e-4)

    def test_details_are_numbers_by_name(self) -> None:
        task = self._task()
        details = task.details(task.grades(*self._outputs()).double().mean(0).numpy(), self.data().class_names)
        assert json.loads(json.dumps(details, allow_nan=False)) == details

    def test_the_loss_is_a_finite_scalar_with_a_gradient(self) -> None:
        logits, labels = self._outputs()
        logits.requires_grad_()
        loss = self._task().loss(logits, labels)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.shape == () and loss.isfinite() and gradient.isfinite().all() and gradient.abs().sum() > 0
        assert self._task().loss(logits, labels, 0.1).isfinite()
        assert len(self._task().loss(logits, labels, reduction="none")) == len(labels)

    def test_losses_in_place_of_others_are_finite(self) -> None:
        logits, labels = self._outputs()
        for name, source in self._task().losses.items():
            loss = source.build(Loss)
            outputs = Outputs(logits, images=torch.zeros(len(labels), 3, 4, 4))
            teacher = Outputs(logits.flip(0))
            loss.prepare(outputs, teacher)
            value = loss(outputs, teacher, labels, START)
            assert value.shape == () and value.isfinite(), name

    def test_labels_of_an_image_that_stays_where_it_is_stay(self) -> None:
        data, labels = self.data(), self._outputs()[1]
        rows, columns = (torch.arange(side).expand(len(labels), -1) for side in data.image[1:])
        assert torch.equal(data.task.moved(labels, rows, columns), labels)

    def test_other_labels_are_other_data(self) -> None:
        data = self.data()
        order = torch.arange(len(data.train)).roll(1)
        labels = data.train.labels[order]
        assert not torch.equal(labels, data.train.labels), "give training images of different labels"
        before = data.train.digest()
        data.train.labels = labels
        assert data.train.digest() != before

    def _task(self) -> Task:
        return self.data().task

    def _outputs(self) -> tuple[Tensor, Tensor]:
        """Random logits of the search part's first images, and their labels."""
        data = self.data()
        labels = data.search.truths(torch.arange(4))
        return torch.randn(4, data.classes, *self.positions, generator=torch_rng("task contract")), labels
