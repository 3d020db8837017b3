"""The sandwich rule with in-place distillation, under a teacher."""

from collections.abc import Callable, Iterator
from typing import ClassVar, final

from torch import Tensor

from kdnas.architecture import Architecture
from kdnas.distillers.base import Batch, Model, ObjectiveDistiller, Parallel, Step
from kdnas.losses.base import Loss
from kdnas.outputs import Moment
from kdnas.specs import Spec, spec
from kdnas.supernet import Supernet

ALPHA = spec("kdnas.losses.response.alpha_divergence:AlphaDivergence")
SOFT = ((1.0, spec("kdnas.losses.response.soft_targets:SoftTargets", temperature=1.0)),)


@final
class Sandwich(ObjectiveDistiller):
    """Each step trains the largest subnet, the smallest, and a few random ones.

    The largest learns from the labels and the teacher, the others from the largest's detached logits only:
    `L = CE(largest, labels) + sum_k weight_k loss_k(largest, teacher) + sum_children soft(child, largest)`. The
    gradients are summed, not averaged, and there is one optimizer step. Dropout and drop-path act on the largest only.

    Args:
        soft: the loss between a child and the largest; by default the adaptive alpha-divergence.
        terms: pairs of weight and loss between the largest and the teacher; empty for none.
        num_random: random children per step.
        label_smoothing: label smoothing of the largest subnet's cross-entropy; None for none, without labels.

    Reference: Yu et al., BigNAS, ECCV 2020, section 3.1 (rules 1, 2 and 5); Wang et al., AlphaNet, ICML 2021,
        section 4.
    Differs: the papers have no teacher; with `terms=()` this is theirs. Weight decay acts on the shared
        weights of all children (as in AttentiveNAS and AlphaNet; in BigNAS on those of the largest only).
    """

    model_type: ClassVar[type[Supernet]] = Supernet
    parallel: ClassVar[Parallel] = "any"

    def __init__(
        self,
        *,
        soft: Spec = ALPHA,
        terms: tuple[tuple[float, Spec], ...] = SOFT,
        num_random: int = 2,
        label_smoothing: float | None = 0.0,
    ) -> None:
        super().__init__(terms, label_smoothing=label_smoothing)
        if num_random < 0:
            raise ValueError(f"`num_random` must not be negative, got {num_random}.")
        self.soft, self.num_random = soft.build(Loss), num_random

    def prepare(self, model: Model, batch: Batch) -> None:
        """Build the adapters between the largest subnet and the teacher."""
        assert isinstance(model, Supernet)
        largest = model(batch.images, model.space.largest)
        self.soft.prepare(largest, largest, elastic=True)
        self.objective.prepare(largest, self.teacher_outputs(batch, largest))

    def losses(self, model: Model, batch: Batch, step: Step) -> Iterator[tuple[str, Tensor]]:
        """The largest's losses, then one per child; children follow the largest in every stage of its schedule."""
        assert isinstance(model, Supernet)
        rng = step.rng("architectures")
        yield from self.losses_with(model, batch, step, lambda: model.space.sample(rng))

    def losses_with(
        self, model: Supernet, batch: Batch, step: Step, sample: Callable[[], Architecture]
    ) -> Iterator[tuple[str, Tensor]]:
        """The same, where `sample` gives the random children."""
        space = model.space
        largest = model(batch.images, space.largest)
        target = largest.detach()
        yield from self.student_losses("largest", largest, model, batch, step, space.largest)
        del largest  # the graph: one subnet's activations alive at a time
        at = Moment(step.progress, ids=batch.ids)
        for name in ("smallest", *("random",) * self.num_random):
            child = space.smallest if name == "smallest" else sample()
            yield name, self.soft(model(batch.images, child, regularise=False), target, batch.labels, at)
