"""Losses that a task has in place of those of classes, and what losses of logits see of one."""

from typing import ClassVar, Literal, final

from torch import Tensor

from kdnas.losses.base import Loss, Wrapper
from kdnas.outputs import Moment, Outputs
from kdnas.specs import Spec
from kdnas.tasks.base import Task


@final
class OfTask(Loss):
    """A task's own loss of the labels, or its own distance from a teacher: `Task.loss` or `Task.imitation`.

    Args:
        task: the task's spec.
        of: which of the two.
    """

    needs: ClassVar[tuple[str, ...]] = ("logits",)

    def __init__(self, *, task: Spec, of: Literal["labels", "teacher"]) -> None:
        super().__init__()
        self.task: Task = task.build(Task)
        self.of = of
        self.uses_teacher = of == "teacher"  # type: ignore[misc]

    def compute(self, student: Outputs, teacher: Outputs, labels: Tensor, at: Moment) -> Tensor:
        """The task's mean over the batch."""
        if self.of == "labels":
            return self.task.loss(student.logits, labels)
        return self.task.imitation(student.logits, teacher.logits)


@final
class OfMaps(Wrapper):
    """A loss that sees the logits of pixels alone, without the last ones, which are of the whole image.

    Args:
        loss: the loss, or its Spec.
        image_outputs: `Task.image_outputs`.
    """

    def __init__(self, *, loss: Loss | Spec, image_outputs: int) -> None:
        super().__init__(loss)
        self.image_outputs = image_outputs

    def change(self, outputs: Outputs) -> Outputs:
        """The outputs with fewer logits, also of an ensemble's members."""
        members = tuple(self.change(member) for member in outputs.members)
        return outputs._replace(logits=outputs.logits[:, : -self.image_outputs], members=members)
