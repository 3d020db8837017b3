"""The base of distillers that add to another one."""

from typing import ClassVar

from kdnas.distillers.base import Batch, Distiller, Model, Schedule, Step
from kdnas.specs import Spec
from kdnas.supernet import Supernet


class Wrapping(Distiller):
    """A distiller that adds to another: everything but the losses is the other's.

    Args:
        inner: the other distiller.
    """

    model_type: ClassVar[type[Supernet]] = Supernet

    def __init__(self, inner: Spec) -> None:
        super().__init__()
        self.inner: Distiller = inner.build(Distiller)

    @property
    def uses_teacher(self) -> bool:
        """Whether the inner one does."""
        return self.inner.uses_teacher

    def prepare(self, model: Model, batch: Batch) -> None:
        """Build the inner one's learnable parts."""
        self.inner.prepare(model, batch)

    def after(self, model: Model, batch: Batch, step: Step) -> None:
        """Call the inner one's."""
        self.inner.after(model, batch, step)

    def schedule(self, total: int) -> Schedule:
        """The inner one's."""
        return self.inner.schedule(total)
