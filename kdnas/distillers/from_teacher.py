"""Offline distillation: a network learns from a fixed teacher."""

from collections.abc import Iterator
from typing import ClassVar, final

from torch import Tensor

from kdnas.distillers.base import Batch, Model, ObjectiveDistiller, Parallel, Step
from kdnas.network import Network
from kdnas.specs import Spec


@final
class FromTeacher(ObjectiveDistiller):
    """A weighted sum of losses between student, teacher and labels, by the stages of the losses' schedules.

    Args:
        terms: pairs of weight and loss; if none of them uses a teacher, none is needed. Without any, those of the task
            (`Task.distillation`), for classes 0.1 cross-entropy and 0.9 soft targets at temperature 4.

    Reference: Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network, 2015, section 2; the weights are
        those of RepDistiller and mdistiller.
    """

    model_type: ClassVar[type[Network]] = Network
    parallel: ClassVar[Parallel] = "any"

    def __init__(self, *, terms: tuple[tuple[float, Spec], ...] = ()) -> None:
        super().__init__(terms or None)

    def losses(self, model: Model, batch: Batch, step: Step) -> Iterator[tuple[str, Tensor]]:
        """The objective's losses."""
        yield from self.student_losses("student", model(batch.images), model, batch, step)
