"""Single-path one-shot training: one uniformly sampled subnet per step."""

from collections.abc import Iterator
from functools import partial
from typing import ClassVar, final

from torch import Tensor

from kdnas.distillers.base import Batch, Distiller, Model, Step
from kdnas.losses.objective import Objective
from kdnas.outputs import Moment
from kdnas.specs import Spec, spec
from kdnas.supernet import Supernet


@final
class SinglePath(Distiller):
    """Each step trains one subnet drawn uniformly from the choices, on the labels and, if asked, the teacher.

    Args:
        terms: pairs of weight and loss between the subnet and the teacher; empty for none.
        label_smoothing: of the cross-entropy.

    Reference: Guo et al., Single Path One-Shot Neural Architecture Search, ECCV 2020, section 3.2.
    Differs: the released training rejects paths outside a band of FLOPs; the paper, and this, sample uniformly.
    """

    model_type: ClassVar[type[Supernet]] = Supernet

    def __init__(self, *, terms: tuple[tuple[float, Spec], ...] = (), label_smoothing: float = 0.0) -> None:
        super().__init__()
        task = spec("kdnas.losses.response.cross_entropy:CrossEntropy", label_smoothing=label_smoothing)
        self.objective = Objective(((1.0, task), *terms))
        self.has_teacher = bool(terms)

    def prepare(self, model: Model, batch: Batch) -> None:
        """Build the adapters from the largest subnet."""
        assert isinstance(model, Supernet)
        if self.has_teacher:
            self.objective.prepare(model(batch.images, model.space.largest), batch.teacher, elastic=True)

    def restarts(self, total: int) -> frozenset[int]:
        """Where a stage of one of the losses ends."""
        return self.objective.restarts(total)

    def losses(self, model: Model, batch: Batch, step: Step) -> Iterator[tuple[str, Tensor]]:
        """What the objective yields for the path."""
        assert isinstance(model, Supernet)
        chosen = model.space.sample(step.rng("architectures"))
        student = model(batch.images, chosen)
        # Without terms there are the labels alone, which ask no teacher.
        teacher = batch.teacher if self.has_teacher else student.detach()
        yield from self.objective.teach(
            "path",
            student,
            teacher,
            batch.labels,
            Moment(step.progress, partial(model.remaining_layers, architecture=chosen), batch.ids),
            learner=model,
        )
