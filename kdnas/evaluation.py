"""Accuracy of teachers, subnets and students on a part of the data."""

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
from kdnas.students.folder import read_student
from kdnas.supernet import Supernet
from kdnas.teachers.base import Teacher


def teacher_accuracy(teacher: Teacher, part: Images) -> float:
    """A teacher's accuracy on a part."""
    hits = []
    for pixels, labels in part.batches():
        pixels, labels = pixels.to(default_device()), labels.to(default_device())
        hits.append(teacher(pixels, labels).logits.argmax(1) == labels)
    return float(torch.cat(hits).float().mean())


def teacher_row(teacher: Teacher, data: Data) -> dict[str, Any]:
    """The closing table's row of a teacher not trained in the run; MACs of one image, None where not countable."""
    teacher = teacher.to(default_device())
    accuracy = teacher_accuracy(teacher, data.test)
    try:
        with counted_macs() as counted:
            device = default_device()
            teacher(data.test.take(torch.arange(1)).to(device), data.test.labels[:1].to(device))
        macs = counted() or None
    except (RuntimeError, NotImplementedError):
        macs = None
    params = sum(p.numel() for p in teacher.parameters())
    return {"accuracy": accuracy, "params": params, "macs": macs, "seconds": 0.0}


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
    return float(correct(network, part, data).float().mean())


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
