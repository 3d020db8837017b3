"""The measure of teachers, subnets and students on a part of the data: of classification the accuracy."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdnas.costs.count import counted_macs
from kdnas.data.base import Data, Images, normalise
from kdnas.network import default_device, modes
from kdnas.outputs import Outputs
from kdnas.preprocessing import Preprocessing
from kdnas.randomness import torch_rng
from kdnas.statistics import mean_interval
from kdnas.students.folder import read_student
from kdnas.supernet import Supernet
from kdnas.tasks.base import Task
from kdnas.tasks.classification import balanced_accuracy
from kdnas.teachers.base import Teacher

_log = logging.getLogger(__name__)
_ROW = ("accuracy", "balanced_accuracy", "interval", "measures", "params", "macs", "seconds")


def quality_of(task: Task, grades: Tensor) -> float:
    """The task's measure of images from their grades, `[images, ...]`."""
    return float(task.quality(grades.double().mean(0)))


def final_measures(grades: Tensor, data: Data, name: str = "") -> dict[str, Any]:
    """The task's measure on the test part as `accuracy`, and what else there is to say.

    `balanced_accuracy` where the data's classes are imbalanced, `measures` where the task has further ones, and of a
    measure that is no share of the images its 95 % `interval` over images.

    Args:
        grades: of each test image, `[count, ...]`, or means of several networks.
        data: the data.
        name: of the network, for a warning where the measure is near chance; "" for none.
    """
    if name and (sentence := near_chance(grades, data, name)):
        _log.warning(sentence)
    rows: dict[str, Any] = {"accuracy": quality_of(data.task, grades)}
    classes = data.task.image_classes(data.test.labels)
    if classes is not None and data.is_imbalanced:
        rows["balanced_accuracy"] = balanced_accuracy(grades, classes)
    if data.task.measure != Task.measure:
        own = data.task.claims["quality"]
        rows["interval"] = list(mean_interval(grades.double().numpy(), quality=own))
    details = data.task.details(grades.double().mean(0).numpy(), data.class_names)
    return rows | ({"measures": details} if details else {})


def measure_of(task: Task) -> dict[str, str]:
    """The entry `measure` of a result whose `accuracy` is another measure than that; else empty."""
    return {} if task.measure == Task.measure else {"measure": task.measure}


def near_chance(grades: Tensor, data: Data, name: str) -> str:
    """A sentence on a network whose measure on the test part guessing could have; empty where it is higher."""
    chance = data.task.chance(grades, data.test.labels, data.class_names)
    if chance is None:
        return ""
    return (
        f"The {data.task.measure} of {name} on {len(grades)} test images, {chance.value:.1%}{chance.note}, is near "
        f"chance ({chance.guess:.1%}): nothing shows that it has learnt. Train for more steps, or with another "
        "learning rate."
    )


def row_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """What a closing table has of a training's result."""
    return {key: result[key] for key in _ROW if key in result}


def teacher_accuracy(teacher: Teacher, part: Images, data: Data) -> float:
    """A teacher's measure on a part."""
    return quality_of(data.task, teacher_grades(teacher, part, data))


def teacher_grades(teacher: Teacher, part: Images, data: Data) -> Tensor:
    """The grades of a teacher on each image of a part, `[count, ...]`."""
    device = default_device()
    return _graded(lambda pixels, labels: teacher(pixels.to(device), labels.to(device)).logits, part, data.task)


def _graded(give: Callable[[Tensor, Tensor], Tensor], part: Images, task: Task) -> Tensor:
    """The grades of what a network gives for pixels and labels, on each image of a part."""
    grades, outputs = [], []
    for pixels, labels in part.batches(task.images_at_once):
        logits = give(pixels, labels).cpu()
        if task.compares:
            outputs.append(logits.float())
        else:
            grades.append(task.grades(logits, labels))
    if task.compares:
        return task.grades(torch.cat(outputs), part.truths(torch.arange(len(part))))
    return torch.cat(grades)


def teacher_row(teacher: Teacher, data: Data) -> dict[str, Any]:
    """The closing table's row of a teacher not trained in the run; MACs of one image, None where not countable."""
    teacher = teacher.to(default_device())
    measures = final_measures(teacher_grades(teacher, data.test, data), data)
    try:
        with counted_macs() as counted:
            device = default_device()
            teacher(data.test.take(torch.arange(1)).to(device), data.test.truths(torch.arange(1)).to(device))
        macs = counted() or None
    except (RuntimeError, NotImplementedError):
        macs = None
    params = sum(p.numel() for p in teacher.parameters())
    return {**measures, "params": params, "macs": macs, "seconds": 0.0}


def health(supernet: Supernet, data: Data, most: int | None = None) -> dict[str, float]:
    """The measure of the smallest, a middle and the largest subnet on search images, with batch statistics.

    Args:
        supernet: the supernet.
        data: its search part is used.
        most: number of images, drawn where there are more, always the same ones; by default twice as many as the task
            evaluates together, 1000 of classification.
    """
    part, space = data.search, supernet.space
    device = next(supernet.parameters()).device
    pixels, labels = part.sample(most or 2 * data.task.images_at_once, torch_rng("health"))
    images, labels = data.normalise(pixels.to(device)), labels.to(device)
    middle = space.decide(lambda choice: choice.options[len(choice.options) // 2])
    accuracies = {}
    with modes(supernet), torch.no_grad():
        for name, architecture in (("smallest", space.smallest), ("middle", middle), ("largest", space.largest)):
            logits = supernet(images, architecture, batch_statistics=True).logits
            accuracies[name] = float(data.task.quality(data.task.grades(logits, labels).float().mean(0)))
    return accuracies


def accuracy(network: nn.Module, part: Images, data: Data) -> float:
    """The measure of a network, in evaluation mode, on a part."""
    return quality_of(data.task, graded(network, part, data))


def graded(network: nn.Module, part: Images, data: Data, preprocessing: Preprocessing | None = None) -> Tensor:
    """The grades of a network on each image of a part, `[count, ...]`; the network keeps its mode.

    Args:
        network: returns logits or `Outputs`.
        part: of the data.
        data: its task grades.
        preprocessing: by which images are normalised; by default the data's.
    """
    preprocessing = preprocessing or data.preprocessing
    device = next(network.parameters()).device

    def give(pixels: Tensor, _: Tensor) -> Tensor:
        outputs = network(normalise(pixels.to(device), preprocessing))
        return outputs.logits if isinstance(outputs, Outputs) else outputs

    with modes(network), torch.no_grad():
        return _graded(give, part, data.task)


def student_grades(folder: Path, data: Data) -> np.ndarray:
    """The grades of a student folder's network on each test image, `[images, ...]`, normalised as its card says."""
    network, card = read_student(folder)
    return graded(network.to(default_device()), data.test, data, card.preprocessing).numpy()
