"""Route-constrained optimisation: distillation from checkpoints of the teacher's training (RCO)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, final

from kdnas.losses.base import Loss, Stage, Wrapper
from kdnas.losses.response.soft_targets import SoftTargets
from kdnas.specs import Spec, spec


@final
class RouteConstrained(Wrapper):
    r"""Any loss against a sequence of the teacher's checkpoints, one per stage of the training (RCO).

    $L(\theta) = D(\theta, A_k)$ in the $k$-th of $n$ equal parts of the training, with checkpoints (anchors)
    $A_1, ..., A_n$; the student keeps its weights. The value is the inner loss's: in stage `anchor k` the run passes
    the outputs of the teacher's $k$-th anchor. `equal_intervals` chooses the checkpoints; greedy anchors depend on the
    student and have a job (`kdnas retrain --greedy-anchors`).

    Shapes, units, learnable parts, discriminators and `needs` are those of the inner loss; its progress is the run's.

    Default weight 1; use the inner loss's.

    Args:
        loss: the inner loss, or its Spec; default `SoftTargets()`, as in the paper.
        num_anchors: $n$, at least 1; default 4, as in the paper on CIFAR.

    Raises:
        ValueError: no anchors; an inner loss that is not a Loss, or that has several stages.

    Reference: Jin et al., Knowledge Distillation via Route Constrained Optimization, ICCV 2019, section 3.
    Differs: the learning rate is the run's; the authors restart it at each anchor.
    """

    ranges: ClassVar[Mapping[str, str]] = {"num_anchors": "[1, inf)"}
    golden: ClassVar[float | None] = SoftTargets.golden

    def __init__(self, *, loss: Loss | Spec = spec(SoftTargets), num_anchors: int = 4) -> None:
        super().__init__(loss)
        if len(self.inner.stages()) > 1:
            raise ValueError(
                f"`loss` must have a single stage, since the anchors are stages, got {type(self.inner).__name__} with "
                f"{len(self.inner.stages())}. Build it with staged=False."
            )
        self.num_anchors = num_anchors

    def stages(self) -> tuple[Stage, ...]:
        """One stage per anchor, of equal length, each like the inner loss's."""
        (stage,) = self.inner.stages()
        return tuple(
            replace(stage, name=f"anchor {k + 1}", share=1 / self.num_anchors) for k in range(self.num_anchors)
        )


def equal_intervals(num_checkpoints: int, num_anchors: int) -> tuple[int, ...]:
    """Indices of checkpoints at equal intervals, including the last (the paper's EEI).

    Args:
        num_checkpoints: the teacher's checkpoints, in the order of its training.
        num_anchors: number of checkpoints to choose.

    Returns:
        Ascending indices of checkpoints.

    Raises:
        ValueError: more anchors than checkpoints, or none.
    """
    if not 1 <= num_anchors <= num_checkpoints:
        raise ValueError(
            f"`num_anchors` must be between 1 and the number of checkpoints, {num_checkpoints}, got {num_anchors}. "
            "Save the teacher more often, or use fewer anchors."
        )
    return tuple(-(-k * num_checkpoints // num_anchors) - 1 for k in range(1, num_anchors + 1))
