"""Training without a teacher: the control of every distillation."""

from collections.abc import Iterator
from typing import ClassVar, final

from torch import Tensor

from kdnas.distillers.base import Batch, Distiller, Model, Parallel, Step
from kdnas.network import Network
from kdnas.values import Rate


@final
class FromLabels(Distiller):
    """Cross-entropy with the labels, a mean over the batch.

    Args:
        label_smoothing: share of the target spread evenly over the classes.

    Reference: Szegedy et al., Rethinking the Inception Architecture, CVPR 2016, section 7 (label smoothing).
    """

    model_type: ClassVar[type[Network]] = Network
    parallel: ClassVar[Parallel] = "any"

    def __init__(self, *, label_smoothing: Rate = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    @property
    def uses_teacher(self) -> bool:
        """No."""
        return False

    def losses(self, model: Model, batch: Batch, step: Step) -> Iterator[tuple[str, Tensor]]:
        """One loss."""
        assert isinstance(model, Network)
        logits = model(batch.images).logits.float()
        yield "student", batch.task.loss(logits, batch.labels, self.label_smoothing)
