"""The sandwich rule with in-place distillation, under an outside teacher."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import ClassVar, final

from torch import Tensor

from kdnas.architecture import Architecture
from kdnas.distillers.base import Batch, Distiller, Model, Step
from kdnas.losses.base import Loss
from kdnas.losses.objective import Objective
from kdnas.outputs import Moment, Outputs
from kdnas.specs import Spec, spec
from kdnas.supernet import Supernet

ALPHA = spec("kdnas.losses.response.alpha_divergence:AlphaDivergence")
SOFT = ((1.0, spec("kdnas.losses.response.soft_targets:SoftTargets", temperature=1.0)),)


@final
class Sandwich(Distiller):
    """Each step trains the largest subnet, the smallest, and a few random ones.

    The largest learns from the labels and from the teacher, the others from the largest's detached logits alone:
    `L = CE(largest, labels) + sum_k weight_k loss_k(largest, teacher) + sum_children soft(child, largest)`. The
    gradients are summed, not averaged, and there is one optimiser step. Dropout and drop-path act on the largest only.

    Args:
        soft: the loss between a child and the largest; by default the adaptive alpha-divergence.
        terms: pairs of weight and loss between the largest and the teacher; empty for none.
        num_random: random children per step.
        label_smoothing: of the largest subnet's cross-entropy.

    Reference: Yu et al., BigNAS, ECCV 2020, section 3.1 (rules 1, 2 and 5); Wang et al., AlphaNet, ICML 2021,
        section 4.
    Differs: the papers have no outside teacher; with `terms=()` this is theirs. Weight decay acts on the shared
        weights of all children (as in AttentiveNAS and AlphaNet; BigNAS writes: of the largest only).
    """

    model_type: ClassVar[type[Supernet]] = Supernet

    def __init__(
        self,
        *,
        soft: Spec = ALPHA,
        terms: tuple[tuple[float, Spec], ...] = SOFT,
        num_random: int = 2,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if num_random < 0:
            raise ValueError(f"num_random must not be negative, got {num_random}.")
        self.soft = soft.build(Loss)
        task = spec("kdnas.losses.response.cross_entropy:CrossEntropy", label_smoothing=label_smoothing)
        self.objective = Objective(((1.0, task), *terms))
        self.has_teacher = bool(terms)
        self.num_random = num_random

    def prepare(self, model: Model, batch: Batch) -> None:
        """Build the adapters between the largest subnet and the teacher."""
        assert isinstance(model, Supernet)
        largest = model(batch.images, model.space.largest)
        self.soft.prepare(largest, largest, elastic=True)
        if self.has_teacher:
            self.objective.prepare(largest, batch.teacher)

    def restarts(self, total: int) -> frozenset[int]:
        """Where a stage of one of the losses ends."""
        return self.objective.restarts(total)

    def losses(self, model: Model, batch: Batch, step: Step) -> Iterator[tuple[str, Tensor]]:
        """The largest's losses, then one per child; children follow the largest in every stage of its schedule."""
        assert isinstance(model, Supernet)
        rng = step.rng("architectures")
        yield from self.teach(model, batch, step, lambda: model.space.sample(rng))

    def teach(
        self, model: Supernet, batch: Batch, step: Step, draw: Callable[[], Architecture]
    ) -> Iterator[tuple[str, Tensor]]:
        """The same, with the random children that `draw` gives."""
        space = model.space
        largest = model(batch.images, space.largest)
        target: Outputs = largest.detach()
        # Without terms there are the labels alone, which ask no teacher.
        teacher = batch.teacher if self.has_teacher else target
        yield from self.objective.teach(
            "largest",
            largest,
            teacher,
            batch.labels,
            Moment(step.progress, partial(model.remaining_layers, architecture=space.largest), batch.ids),
            learner=model,
        )
        at = Moment(step.progress, ids=batch.ids)
        del largest  # the graph: one subnet's activations alive at a time
        for name in ("smallest", *("random",) * self.num_random):
            child = space.smallest if name == "smallest" else draw()
            yield name, self.soft(model(batch.images, child, regularise=False), target, batch.labels, at)
