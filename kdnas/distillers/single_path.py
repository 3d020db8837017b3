"""Single-path one-shot training: one uniformly sampled subnet per step."""

from collections.abc import Iterator
from typing import ClassVar, final

from torch import Tensor

from kdnas.distillers.base import Batch, Model, ObjectiveDistiller, Parallel, Step
from kdnas.specs import Spec
from kdnas.supernet import Supernet


@final
class SinglePath(ObjectiveDistiller):
    """Each step trains one subnet, sampled uniformly from the choices, on the labels and with `terms` on the teacher.

    Args:
        terms: pairs of weight and loss between the subnet and the teacher; empty for none.
        label_smoothing: label smoothing of the cross-entropy; None for none, without labels.

    Reference: Guo et al., Single Path One-Shot Neural Architecture Search, ECCV 2020, section 3.2.
    Differs: the released training rejects paths outside a band of FLOPs; the paper, and this, sample uniformly.
    """

    model_type: ClassVar[type[Supernet]] = Supernet
    parallel: ClassVar[Parallel] = "any"

    def __init__(self, *, terms: tuple[tuple[float, Spec], ...] = (), label_smoothing: float | None = 0.0) -> None:
        super().__init__(terms, label_smoothing=label_smoothing)

    def losses(self, model: Model, batch: Batch, step: Step) -> Iterator[tuple[str, Tensor]]:
        """The objective's losses for the path."""
        assert isinstance(model, Supernet)
        path = model.space.sample(step.rng("architectures"))
        yield from self.student_losses("path", model(batch.images, path), model, batch, step, path)
