"""What every task is: labels, loss, measures, comparison of outputs, and what an exported student answers."""

import abc
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar, final

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from kdnas.specs import Spec, spec

Answers = Literal["classes", "values"]
PIPELINES: Mapping[tuple[Answers, bool], str] = {
    ("classes", False): "image-classification",
    ("classes", True): "image-segmentation",
    ("values", False): "image-feature-extraction",
    ("values", True): "image-to-image",
}
"""By what an output is, and whether there is one for every pixel: what hubs of models call a network's purpose."""
HINTON = (
    (0.1, spec("kdnas.losses.response.cross_entropy:CrossEntropy")),
    (0.9, spec("kdnas.losses.response.soft_targets:SoftTargets")),
)
"""Weights and losses of classes under a teacher: those of RepDistiller and mdistiller."""

Numbers = TypeVar("Numbers", Tensor, np.ndarray)


@final
class Chance(NamedTuple):
    """A measure that guessing could have.

    Attributes:
        value: what a network reaches.
        guess: what guessing reaches.
        note: on how the value is formed, such as `" (mean over classes)"`; empty for nothing.
    """

    value: float
    guess: float
    note: str = ""


class Task(abc.ABC):
    """What a network is for. `Data.task` has it, and whatever reads labels asks it.

    A subclass is a frozen dataclass. A label is the entry of one image in a tensor of all, `[images, ...]`; -100 leaves
    a label, or an element of it, out. Logits are `[batch, outputs, ...]`, with as many outputs as the data have names.

    Class attributes:
        name: of the task.
        measure: name of the measure by which networks are chosen, higher is better. Files store its value as
            `accuracy`.
        follows: whether a label moves with the image under augmentation; then `moved` says how.
        dense: whether a network answers for every pixel, by a space of dense blueprints.
        answers: what an output is: a class's logit, or a value.
        images_at_once: number of images that are evaluated together, and by default at most trained on in a step.
        compares: whether grades compare images with each other, so that all of a part are graded together.
        has_classes: whether outputs are the data's classes, or whatever they name; if not, they are a teacher's
            features, and a teacher is asked for these instead of classes.
    """

    name: ClassVar[str]
    measure: ClassVar[str] = "accuracy"
    follows: ClassVar[bool] = False
    dense: ClassVar[bool] = False
    answers: ClassVar[Answers] = "classes"
    images_at_once: ClassVar[int] = 500
    compares: ClassVar[bool] = False
    has_classes: ClassVar[bool] = True

    @property
    def measures(self) -> str:
        """Several values of the measure, in words."""
        return "accuracies" if self.measure == Task.measure else f"values of {self.measure}"

    @property
    def pipeline(self) -> str:
        """What hubs of models call a student's purpose (`pipeline_tag`); by default from `answers` and `dense`."""
        return PIPELINES[self.answers, self.dense]

    @property
    def losses(self) -> Mapping[str, Spec]:
        """By the name of a loss of classes, the loss that distillers have in its place; none by default."""
        return {}

    @property
    def distillation(self) -> tuple[tuple[float, Spec], ...]:
        """Weights and losses, first that of the labels, with which a network learns where nobody names any.

        By default 0.1 cross-entropy and 0.9 soft targets at temperature 4, exchanged as `losses` says.
        """
        return HINTON

    @property
    def image_outputs(self) -> int:
        """How many of the last outputs are of the whole image: their logit is the mean of their map. Default: none."""
        return 0

    @abc.abstractmethod
    def as_labels(self, labels: Any, count: int) -> Tensor:
        """The labels of so many images as a tensor `[count, ...]`, from what people hand over.

        Raises:
            ValueError: another number, shape or type.
        """

    @abc.abstractmethod
    def check(self, part: str, labels: Tensor, names: Sequence[str]) -> None:
        """Raise a ValueError unless the labels of a part of the data, `train` for example, can be learnt.

        Args:
            part: name of the part.
            labels: as `as_labels` returns them.
            names: of the outputs.
        """

    def fits(self, part: str, labels: Tensor, size: tuple[int, int]) -> None:
        """Raise a ValueError unless labels fit images of this height and width; by default those of pixels have it.

        Args:
            part: name of the part of the data.
            labels: as `as_labels` returns them.
            size: height and width.
        """
        if self.dense and tuple(labels.shape[-2:]) != size:
            raise ValueError(
                f"labels of the {part} part must have the size of the images, {size}, got {tuple(labels.shape[-2:])}."
            )

    def moved(self, labels: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """The labels of images that an augmentation moved.

        Args:
            labels: `[batch, ...]`.
            rows: `[batch, height]`, the row of the image that each row of the moved image shows; outside of the image
                where it is none of its rows.
            columns: `[batch, width]`, the same of the columns.
        """
        del rows, columns
        return labels

    @abc.abstractmethod
    def loss(self, logits: Tensor, labels: Tensor, label_smoothing: float = 0.0, reduction: str = "mean") -> Tensor:
        """The loss of the labels: a scalar, a mean over the labels; with the reduction `none` a number per label."""

    def imitation(self, logits: Tensor, teacher: Tensor) -> Tensor:
        """The distance from a teacher's logits that a task has of its own, a scalar; `losses` say where it is used."""
        raise NotImplementedError

    def divergence(self, logits: Tensor, target: Tensor, labels: Tensor) -> Tensor:
        r"""How far a smaller network's logits are from those of its source: a sum over images, 0 for equal ones.

        By it pruning chooses what it removes. Default: of classes $\mathrm{KL}(p \| q)$, p the source's, a mean over
        positions where there are any; of values the squared difference, a mean over values and positions.

        Args:
            logits: of the smaller network.
            target: of the source, of the same shape.
            labels: of the images, for tasks that leave positions out.
        """
        del labels
        if self.answers == "values":
            return (logits - target).square().flatten(1).mean(1).sum()
        values = F.kl_div(logits.log_softmax(1), target.log_softmax(1), reduction="sum", log_target=True)
        return values / logits[0, 0].numel()

    @abc.abstractmethod
    def grades(self, logits: Tensor, labels: Tensor) -> Tensor:
        """What is measured of each image, `[batch, ...]`, in numbers whose mean over images gives the measure."""

    def quality(self, means: Numbers) -> Numbers:
        """The measure from mean grades `[..., *grade]`, which may be of many samples of the images; `[...]`.

        The default is for grades that are a number each, and returns their mean.
        """
        return means

    @property
    def claims(self) -> dict[str, Any]:
        """What `kdnas.statistics.compare_accuracy` has to know of the measure."""
        return {"measure": self.measure, "quality": None if type(self).quality is Task.quality else self.quality}

    def details(self, means: np.ndarray, names: Sequence[str]) -> dict[str, float]:
        """Further measures from mean grades, by name; none by default."""
        del means, names
        return {}

    def chance(self, grades: Tensor, labels: Tensor, names: Sequence[str]) -> Chance | None:
        """What the measure of these images is, where guessing could reach it; by default None."""
        del grades, labels, names
        return None

    def pixel_classes(self, logits: Tensor, labels: Tensor) -> Tensor | None:
        """What a network answers for each pixel, `[batch, height, width]`; None where answers are no pictures."""
        del logits, labels
        return None

    def label_classes(self, labels: Tensor, size: tuple[int, int]) -> Tensor:
        """What labels say of each pixel, `[batch, height, width]`, where `pixel_classes` gives any."""
        del size
        return labels

    def image_classes(self, labels: Tensor) -> Tensor | None:
        """The class of each image, `[batch]`, for what is looked at class by class; None where images have none."""
        del labels
        return None
