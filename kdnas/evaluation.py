"""Accuracy of teachers, subnets and students on a part of the data."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdnas.costs.count import counted_macs
from kdnas.data.base import Data, Images
from kdnas.network import default_device, modes
from kdnas.outputs import Outputs
from kdnas.randomness import torch_rng
from kdnas.statistics import guessing
from kdnas.students.folder import read_student
from kdnas.supernet import Supernet
from kdnas.teachers.base import Teacher

_log = logging.getLogger(__name__)
_ROW = ("accuracy", "balanced_accuracy", "params", "macs", "seconds")


def balanced_accuracy(hits: Tensor, labels: Tensor) -> float:
    """The mean over the classes that occur of the share of their images that are classified correctly.

    Args:
        hits: whether each image is, `[count]`.
        labels: `[count]`.

    Example:
        >>> balanced_accuracy(torch.tensor([True, True, True, False]), torch.tensor([0, 0, 0, 1]))
        0.5
    """
    return float(torch.stack([hits[labels == label].double().mean() for label in labels.unique()]).mean())


def final_accuracies(hits: Tensor, data: Data, name: str = "") -> dict[str, float]:
    """`accuracy` on the test part, and `balanced_accuracy` where the data's classes are imbalanced.

    Args:
        hits: whether each test image is classified correctly, or how often, `[count]`.
        data: the data.
        name: of the network, for a warning where the accuracy is near chance; "" for none.
    """
    if name and (sentence := near_chance(hits, data, name)):
        _log.warning(sentence)
    rows = {"accuracy": float(hits.double().mean())}
    return rows | ({"balanced_accuracy": balanced_accuracy(hits, data.test.labels)} if data.is_imbalanced else {})


def near_chance(hits: Tensor, data: Data, name: str) -> str:
    """A sentence on a network whose accuracy on the test part guessing could have; empty where it is higher."""
    share = balanced_accuracy(hits, data.test.labels)
    if share > guessing(data.classes, len(hits)):
        return ""
    return (
        f"The accuracy of {name} on {len(hits)} test images, {share:.1%} (mean over classes), is near chance "
        f"({1 / data.classes:.1%}): nothing shows that it has learnt. Train for more steps, or with another learning "
        "rate."
    )


def row_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """What a closing table has of a training's result."""
    return {key: result[key] for key in _ROW if key in result}


def teacher_accuracy(teacher: Teacher, part: Images) -> float:
    """A teacher's accuracy on a part."""
    return float(teacher_hits(teacher, part).double().mean())


def teacher_hits(teacher: Teacher, part: Images) -> Tensor:
    """Whether a teacher classifies each image of a part correctly, `[count]`."""
    hits = []
    for pixels, labels in part.batches():
        device = default_device()
        hits.append(teacher(pixels.to(device), labels.to(device)).logits.argmax(1).cpu() == labels)
    return torch.cat(hits)


def teacher_row(teacher: Teacher, data: Data) -> dict[str, Any]:
    """The closing table's row of a teacher not trained in the run; MACs of one image, None where not countable."""
    teacher = teacher.to(default_device())
    accuracies = final_accuracies(teacher_hits(teacher, data.test), data)
    try:
        with counted_macs() as counted:
            device = default_device()
            teacher(data.test.take(torch.arange(1)).to(device), data.test.labels[:1].to(device))
        macs = counted() or None
    except (RuntimeError, NotImplementedError):
        macs = None
    params = sum(p.numel() for p in teacher.parameters())
    return {**accuracies, "params": params, "macs": macs, "seconds": 0.0}


def health(supernet: Supernet, data: Data, most: int = 1000) -> dict[str, float]:
    """Accuracy of the smallest, a middle and the largest subnet on search images, with batch statistics.

    Args:
        supernet: the supernet.
        data: its search part is used.
        most: number of images, drawn where there are more, always the same ones.
    """
    part, space = data.search, supernet.space
    device = next(supernet.parameters()).device
    pixels, labels = part.sample(most, torch_rng("health"))
    images, labels = data.normalise(pixels.to(device)), labels.to(device)
    middle = space.decide(lambda choice: choice.options[len(choice.options) // 2])
    accuracies = {}
    with modes(supernet), torch.no_grad():
        for name, architecture in (("smallest", space.smallest), ("middle", middle), ("largest", space.largest)):
            logits = supernet(images, architecture, batch_statistics=True).logits
            accuracies[name] = float((logits.argmax(1) == labels).float().mean())
    return accuracies


def accuracy(network: nn.Module, part: Images, data: Data) -> float:
    """Accuracy of a network, in evaluation mode, on a part."""
    return float(correct(network, part, data).double().mean())


def correct(network: nn.Module, part: Images, data: Data) -> Tensor:
    """Whether each image of a part is classified correctly, `[count]`; the network keeps its mode."""
    device = next(network.parameters()).device
    hits = []
    with modes(network), torch.no_grad():
        for pixels, labels in part.batches():
            outputs = network(data.normalise(pixels.to(device)))
            logits = outputs.logits if isinstance(outputs, Outputs) else outputs
            hits.append(logits.argmax(1).cpu() == labels)
    return torch.cat(hits)


def student_hits(folder: Path, data: Data) -> np.ndarray:
    """1 for each test image that the network of a student folder classifies correctly, else 0, `[images]`."""
    network, _ = read_student(folder)
    return correct(network.to(default_device()), data.test, data).double().numpy()
