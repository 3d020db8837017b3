"""Route-constrained optimisation: the student follows the teacher's training, not only its end."""

from typing import ClassVar, final

from torch import Tensor

from kdnas.losses.base import Loss, Stage
from kdnas.losses.response.soft_targets import SoftTargets
from kdnas.outputs import Moment, Outputs
from kdnas.specs import Spec, spec


@final
class RouteConstrained(Loss):
    r"""Any loss, against the teacher's checkpoints $A_1, ..., A_n$ one after the other (RCO).

    $L(\theta) = D(\theta, A_k)$ in the $k$-th of $n$ equal parts of the training; the student keeps its weights from
    part to part. The value of a batch is the inner loss's: in stage `anchor k` the run hands in the outputs of the
    teacher's $k$-th anchor. Which checkpoints those are, `equal_intervals` says; greedy anchors depend on what the
    student has learnt and are a job of their own (`kdnas retrain --greedy-anchors`).

    Shapes, units, parts, discriminators and `needs` are those of the inner loss; it gets the whole run's progress.

    Default weight 1; give it the inner loss's.

    Args:
        loss: the inner loss, or its Spec; default the paper's, soft targets.
        num_anchors: $n$; 4, as the paper on CIFAR.

    Raises:
        ValueError: no anchors; an inner loss that is no Loss, or that has stages of its own.

    Reference: Jin et al., Knowledge Distillation via Route Constrained Optimization, ICCV 2019, section 3.
    Differs: the learning rate is the run's; the authors start it again at each anchor.
    """

    golden: ClassVar[float | None] = SoftTargets.golden

    def __init__(self, *, loss: Loss | Spec = spec(SoftTargets), num_anchors: int = 4) -> None:
        super().__init__()
        inner = loss.build() if isinstance(loss, Spec) else loss
        if not isinstance(inner, Loss):
            raise ValueError(f"loss must be a Loss or the Spec of one, got {type(inner).__name__}.")
        if num_anchors < 1:
            raise ValueError(f"num_anchors must be at least 1, got {num_anchors}.")
        if len(inner.stages()) > 1:
            raise ValueError(
                f"{type(inner).__name__} has {len(inner.stages())} stages of its own, and the anchors are stages too. "
                "Build it with staged=False."
            )
        self.loss, self.num_anchors = inner, num_anchors
        self.needs = inner.needs  # type: ignore[misc]

    def prepare(self, student: Outputs, teacher: Outputs, *, elastic: bool = False) -> None:
        """Prepare the inner loss."""
        super().prepare(student, teacher, elastic=elastic)
        self.loss.prepare(student, teacher, elastic=elastic)

    def compute(self, student: Outputs, teacher: Outputs, labels: Tensor, at: Moment) -> Tensor:
        """The inner loss, against the anchor that was handed in."""
        return self.loss(student, teacher, labels, at)

    def discriminate(self, student: Outputs, teacher: Outputs, labels: Tensor, at: Moment) -> Tensor | None:
        """The inner loss's."""
        return self.loss.discriminate(student, teacher, labels, at)

    def stages(self) -> tuple[Stage, ...]:
        """One stage per anchor, of equal length."""
        return tuple(Stage(f"anchor {k + 1}", 1 / self.num_anchors) for k in range(self.num_anchors))


def equal_intervals(num_checkpoints: int, num_anchors: int) -> tuple[int, ...]:
    """Anchors at equal intervals of the route, the last checkpoint among them (the paper's EEI).

    Args:
        num_checkpoints: the teacher's checkpoints, in the order of its training.
        num_anchors: how many of them to choose.

    Returns:
        Ascending indices of checkpoints.

    Raises:
        ValueError: more anchors than checkpoints, or none.
    """
    if not 1 <= num_anchors <= num_checkpoints:
        raise ValueError(
            f"num_anchors must lie between 1 and the {num_checkpoints} checkpoints, got {num_anchors}. "
            "Save the teacher more often, or take fewer anchors."
        )
    return tuple(-(-k * num_checkpoints // num_anchors) - 1 for k in range(1, num_anchors + 1))
