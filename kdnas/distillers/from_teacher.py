"""Offline distillation: a fixed teacher teaches one network."""

from collections.abc import Iterator
from typing import ClassVar, final

from torch import Tensor

from kdnas.distillers.base import Batch, Distiller, Model, Step
from kdnas.losses.objective import Objective
from kdnas.network import Network
from kdnas.outputs import Moment, Outputs
from kdnas.specs import Spec, spec

HINTON = (
    (0.1, spec("kdnas.losses.response.cross_entropy:CrossEntropy")),
    (0.9, spec("kdnas.losses.response.soft_targets:SoftTargets")),
)


@final
class FromTeacher(Distiller):
    """A weighted sum of losses between student, teacher and labels, with the stages its losses ask for.

    Args:
        terms: pairs of weight and loss; where none of them reads a teacher, none is needed. By default 0.1
            cross-entropy and 0.9 soft targets at temperature 4.

    Reference: Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network, 2015, section 2; the weights are
        those of RepDistiller and mdistiller.
    """

    model_type: ClassVar[type[Network]] = Network

    def __init__(self, *, terms: tuple[tuple[float, Spec], ...] = HINTON) -> None:
        super().__init__()
        self.objective = Objective(terms)

    @property
    def uses_teacher(self) -> bool:
        """Whether one of its losses does."""
        return self.objective.uses_teacher

    def prepare(self, model: Model, batch: Batch) -> None:
        """Build the adapters."""
        assert isinstance(model, Network)
        student = model(batch.images)
        self.objective.prepare(student, self._teacher(batch, student))

    def losses(self, model: Model, batch: Batch, step: Step) -> Iterator[tuple[str, Tensor]]:
        """What the objective yields."""
        assert isinstance(model, Network)
        student = model(batch.images)
        yield from self.objective.teach(
            "student",
            student,
            self._teacher(batch, student),
            batch.labels,
            Moment(step.progress, model.remaining_layers, batch.ids),
            learner=model,
        )

    def _teacher(self, batch: Batch, student: Outputs) -> Outputs:
        """The teacher's outputs; the student's own where no loss reads them, so that none need be there."""
        return batch.teacher if self.objective.uses_teacher else student.detach()

    def restarts(self, total: int) -> frozenset[int]:
        """Where a stage of one of the losses ends."""
        return self.objective.restarts(total)
