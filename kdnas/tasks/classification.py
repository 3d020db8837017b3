"""One class per image."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor

from kdnas.statistics import guessing
from kdnas.tasks.base import Chance, Task
from kdnas.tasks.labels import as_labels


@final
@dataclass(frozen=True)
class Classification(Task):
    """Each image has one class; networks are measured by the share of images whose largest logit is their class's.

    Example:
        >>> logits, labels = torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.tensor([0, 0])
        >>> CLASSIFICATION.grades(logits, labels)
        tensor([ True, False])
    """

    name: ClassVar[str] = "classification"

    def as_labels(self, labels: Any, count: int) -> Tensor:
        """One class index per image; see `kdnas.tasks.labels.as_labels`."""
        return as_labels(labels, count)

    def check(self, part: str, labels: Tensor, names: Sequence[str]) -> None:
        """Raise a ValueError for labels without a class, or a class with fewer than 2 training images."""
        low, high, classes = int(labels.min()), int(labels.max()), len(names)
        if low < 0 or high >= classes:
            fix = " Subtract 1: they begin at 1." if (low, high) == (1, classes) else ""
            worst = low if low < 0 else high
            raise ValueError(f"labels must be 0 to {classes - 1}, the {part} part has {worst}.{fix}")
        counts = torch.bincount(labels, minlength=classes)
        if part == "train" and counts.min() < 2:
            rare = int(counts.argmin())
            raise ValueError(
                f"every class must have at least 2 training images, class {names[rare]!r} has "
                f"{int(counts[rare])}. Add images or remove the class."
            )

    def loss(self, logits: Tensor, labels: Tensor, label_smoothing: float = 0.0, reduction: str = "mean") -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(logits, labels, reduction=reduction, label_smoothing=label_smoothing)

    def grades(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Whether each image is classified correctly, `[batch]`."""
        return logits.argmax(1) == labels

    def chance(self, grades: Tensor, labels: Tensor, names: Sequence[str]) -> Chance | None:
        """The balanced accuracy, where it is at most two standard errors above that of guessing."""
        share = balanced_accuracy(grades, labels)
        if share > guessing(len(names), len(grades)):
            return None
        return Chance(share, 1 / len(names), " (mean over classes)")

    def image_classes(self, labels: Tensor) -> Tensor:
        """The labels."""
        return labels


CLASSIFICATION = Classification()
"""The task of data that name none."""


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
