"""Single-path one-shot training: one uniformly sampled subnet per step."""

from collections.abc import Iterator
from typing import final

import torch.nn.functional as F
from torch import Tensor

from kdnas.objective import Objective
from kdnas.spec import Spec
from kdnas.supernet import Supernet
from kdnas.training import Batch, Distiller, Model, Step


@final
class SinglePath(Distiller):
    """Each step trains one subnet drawn uniformly from the choices, on the labels and, if asked, the teacher.

    Args:
        terms: pairs of weight and loss between the subnet and the teacher; empty for none.
        label_smoothing: of the cross-entropy.

    Reference: Guo et al., Single Path One-Shot Neural Architecture Search, ECCV 2020, section 3.2.
    Differs: the released training rejects paths outside a band of FLOPs; the paper, and this, sample uniformly.
    """

    def __init__(self, *, terms: tuple[tuple[float, Spec], ...] = (), label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.objective = Objective(terms) if terms else None
        self.label_smoothing = label_smoothing

    def prepare(self, model: Model, batch: Batch) -> None:
        """Build the adapters from the largest subnet."""
        assert isinstance(model, Supernet)
        if self.objective is not None:
            self.objective.prepare(model(batch.images, model.space.largest), batch.teacher, elastic=True)

    def restarts(self, total: int) -> frozenset[int]:
        """Where a stage of one of the losses ends."""
        return frozenset() if self.objective is None else self.objective.restarts(total)

    def losses(self, model: Model, batch: Batch, step: Step) -> Iterator[tuple[str, Tensor]]:
        """One loss."""
        assert isinstance(model, Supernet)
        student = model(batch.images, model.space.sample(step.rng("architectures")))
        loss = F.cross_entropy(student.logits.float(), batch.labels, label_smoothing=self.label_smoothing)
        if self.objective is not None:
            loss = loss + self.objective(student, batch.teacher, batch.labels, step.progress)[0]
        yield "path", loss
