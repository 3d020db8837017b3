"""One class per pixel."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kdnas.specs import Spec, spec
from kdnas.tasks.base import Chance, Numbers, Task
from kdnas.tasks.labels import VOID, as_tensor

MOST = 1000  # classes


@final
@dataclass(frozen=True)
class Segmentation(Task):
    r"""Each pixel has one class; networks are measured by the mean intersection over union (mIoU).

    With $n_{ij}$ the number of pixels of class $i$ that a network calls $j$, summed over all images,
    $\mathrm{IoU}_i = n_{ii} / (\sum_j n_{ij} + \sum_j n_{ji} - n_{ii})$; the mean is over the classes that occur among
    the labels or the predictions. A pixel labelled -100 (void) is left out everywhere.

    Labels are `[images, height, width]`, the size of the images. Logits of another size are resized to it (bilinear).

    Attributes:
        class_weights: of each class in the loss, whose divisor is the sum of the weights of the pixels; empty for 1
            each.

    Reference: Everingham et al., The Pascal Visual Object Classes Challenge: A Retrospective, IJCV 2015, section 3.2.

    Example:
        >>> logits, labels = torch.tensor([[[[2.0, 0.0]], [[0.0, 3.0]]]]), torch.tensor([[[0, 0]]])
        >>> grades = Segmentation().grades(logits, labels)
        >>> grades.tolist(), float(Segmentation().quality(grades.double().mean(0)))
        ([[[1, 1], [0, 0]]], 0.25)
    """

    class_weights: tuple[float, ...] = ()

    name: ClassVar[str] = "segmentation"
    measure: ClassVar[str] = "mIoU"
    dense: ClassVar[bool] = True
    follows: ClassVar[bool] = True
    images_at_once: ClassVar[int] = 16

    @property
    def losses(self) -> Mapping[str, Spec]:
        """Cross-entropy with the class weights, where there are any."""
        if not self.class_weights:
            return {}
        return {
            "cross_entropy": spec("kdnas.losses.response.cross_entropy:CrossEntropy", class_weights=self.class_weights)
        }

    @property
    def distillation(self) -> tuple[tuple[float, Spec], ...]:
        """The labels at their full weight, with the class weights, and the teacher at the same weight beside them.

        A teacher's pixels count alike whatever their class. With 0.1 of the labels and 0.9 of soft targets a network
        lost 3.5 points of mIoU to this, with the authors' weight of 10 it lost 1.4 (`experiments/segmentation.md`).

        Reference: Liu et al., Structured Knowledge Distillation for Semantic Segmentation, CVPR 2019, section 3.
        Differs: their weight of the pixel-wise term is 10.
        """
        return (
            (1.0, spec("kdnas.losses.response.cross_entropy:CrossEntropy")),
            (1.0, spec("kdnas.losses.dense.pixel_wise:PixelWise")),
        )

    def as_labels(self, labels: Any, count: int) -> Tensor:
        """A class index or -100 per pixel as int16, `[count, height, width]`."""
        masks = as_tensor(labels, "labels")
        if masks.dim() != 3 or len(masks) != count or 0 in masks.shape:
            raise ValueError(
                f"`labels` must be one mask per image, [{count}, height, width], got shape {tuple(masks.shape)}."
            )
        if masks.is_floating_point() or masks.is_complex() or masks.dtype is torch.bool:
            raise ValueError(f"`labels` must be whole numbers, one class index per pixel, got {masks.dtype}.")
        masks = masks.long()
        low, high = int(masks.min()), int(masks.max())
        if low < VOID or high >= MOST or bool(((masks < 0) & (masks != VOID)).any()):
            worst = high if high >= MOST else int(masks[(masks < 0) & (masks != VOID)][0])
            raise ValueError(f"`labels` must be 0 to {MOST - 1}, or {VOID} for void, got {worst}.")
        return masks.to(torch.int16)

    def check(self, part: str, labels: Tensor, names: Sequence[str]) -> None:
        """Raise a ValueError for an unknown index, an image of void alone, or a class without a training pixel."""
        classes = len(names)
        if self.class_weights and len(self.class_weights) != classes:
            raise ValueError(f"`class_weights` must be one per class, {classes}, got {len(self.class_weights)}.")
        if labels.dim() != 3:
            raise ValueError(f"labels of the {part} part must be masks, got shape {tuple(labels.shape)}.")
        high = int(labels.max())
        if high >= classes:
            number = int((labels == high).flatten(1).any(1).nonzero()[0])
            raise ValueError(
                f"masks must hold 0 to {classes - 1} or void, mask {number} of the {part} part has {high}. Name its "
                "class, or make it void."
            )
        empty = (labels == VOID).flatten(1).all(1).nonzero().flatten()
        if len(empty):
            raise ValueError(f"mask {int(empty[0])} of the {part} part is void alone. Remove that image.")
        if part == "train":
            absent = [name for i, name in enumerate(names) if not bool((labels == i).any())]
            if absent:
                raise ValueError(
                    f"every class must have training pixels, {absent[0]!r} has none. Add images that show it, or "
                    "remove the class."
                )

    def moved(self, labels: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Each mask as its image; void where the image shows nothing."""
        height, width = labels.shape[1:]
        within = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
        images = torch.arange(len(labels))[:, None, None]
        taken = labels[images, rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None, :]]
        return torch.where(within, taken, VOID)

    def loss(self, logits: Tensor, labels: Tensor, label_smoothing: float = 0.0, reduction: str = "mean") -> Tensor:
        """Cross-entropy over the pixels that are not void; 0 where all are."""
        logits = at_labels(logits, labels)
        weight = (
            torch.tensor(self.class_weights, device=logits.device, dtype=logits.dtype) if self.class_weights else None
        )
        losses = F.cross_entropy(logits, labels, weight, reduction="none", label_smoothing=label_smoothing)
        if reduction == "none":
            return losses
        counted = labels != VOID
        divisor = counted.sum() if weight is None else (weight[labels.clamp(min=0)] * counted).sum()
        return losses.sum() / torch.where(divisor > 0, divisor, 1)

    def divergence(self, logits: Tensor, target: Tensor, labels: Tensor) -> Tensor:
        """KL of the classes, a mean over the pixels of an image that are not void, summed over images."""
        log_q, log_p = (at_labels(each, labels).log_softmax(1) for each in (logits, target))
        values, counted = (log_p.exp() * (log_p - log_q)).sum(1), labels != VOID
        return ((values * counted).sum((1, 2)) / counted.sum((1, 2)).clamp_min(1)).sum()

    def grades(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The confusion matrix of each image, `[batch, class of the label, class of the network]`."""
        count, classes = logits.shape[:2]
        predictions = self.pixel_classes(logits, labels)
        image = torch.arange(count, device=labels.device)[:, None, None].expand_as(labels)
        places = ((image * classes + labels) * classes + predictions)[labels != VOID]
        return torch.bincount(places, minlength=count * classes**2).view(count, classes, classes)

    def pixel_classes(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The class of the largest logit at each pixel of the labels."""
        return at_labels(logits, labels).argmax(1)

    def quality(self, means: Numbers) -> Numbers:
        """The mIoU."""
        shares, present = self._shares(means)
        return (shares * present).sum(-1) / (present.sum(-1) + (present.sum(-1) == 0))

    def details(self, means: np.ndarray, names: Sequence[str]) -> dict[str, float]:
        """The accuracy over all pixels, and the IoU of each class that occurs."""
        shares, present = self._shares(means)
        accuracy = float(np.trace(means) / max(means.sum(), 1e-12))
        return {"pixel accuracy": accuracy} | {
            f"IoU {name}": float(share) for name, share, occurs in zip(names, shares, present, strict=True) if occurs
        }

    def chance(self, grades: Tensor, labels: Tensor, names: Sequence[str]) -> Chance | None:
        """The mIoU, where it is at most that of calling every pixel by the most frequent class."""
        means = grades.double().mean(0)
        truths = means.sum(1)
        guess = float(truths.max() / truths.sum() / (truths > 0).sum())
        value = float(self.quality(means))
        # Equal but for rounding where every pixel has that class.
        is_near = value <= guess * (1 + 1e-9)
        return Chance(value, guess, ", which the most frequent class alone reaches") if is_near else None

    @staticmethod
    def _shares(means: Any) -> tuple[Any, Any]:
        """The IoU of each class, 0 for one that does not occur, and which do occur."""
        classes = np.arange(means.shape[-1])
        both = means[..., classes, classes]
        either = means.sum(-1) + means.sum(-2) - both
        return both / (either + (either == 0)), either > 0


def at_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits in the size of the labels."""
    size = labels.shape[-2:]
    if logits.shape[2:] == size:
        return logits
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)
