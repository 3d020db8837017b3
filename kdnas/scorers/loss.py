"""A distillation loss as a score."""

from collections.abc import Sequence
from typing import Any, final

from torch import Tensor

from kdnas.losses.base import Loss as DistillationLoss
from kdnas.losses.example import example
from kdnas.outputs import Outputs
from kdnas.scorers.base import Evidence, OutputScorer, Score
from kdnas.specs import Spec, find_spec


@final
class Loss(OutputScorer):
    """The negative of a distillation loss between student and teacher.

    Args:
        loss: a Spec or the name of a loss without learnable parts, such as `soft_targets` (KL to the teacher, the
            default), `alpha_divergence`, `dist` or `representational`.

    Raises:
        ValueError: the loss has learnable parts, which are untrained.

    Reference: that of the loss. As a ranking score: Huang et al., DIST, NeurIPS 2022, for a bounded one.
    """

    def __init__(self, *, loss: Spec | str = "soft_targets") -> None:
        loss_spec = find_spec("kdnas.losses", loss) if isinstance(loss, str) else loss
        self.loss: DistillationLoss = loss_spec.build(DistillationLoss)
        probe: DistillationLoss = loss_spec.build(DistillationLoss)
        probe.prepare(*example(dense=probe.dense)[:2])
        if any(True for _ in probe.parameters()):
            raise ValueError(
                f"`loss` must have no learnable parts, which would be untrained; {type(probe).__name__} has some. Use "
                "soft_targets, dist or representational."
            )

    def judge(self, logits: Tensor, digests: Sequence[Any], evidence: Evidence) -> Score:
        """The student's score."""
        student = Outputs(logits, tuple(digests), images=evidence.images)
        # Students are seen stage by stage, so the teacher's last one too stands for the map that is classified.
        value = float(self.loss(student, evidence.teacher._replace(classified=None), evidence.labels))
        accuracy = evidence.accuracy(logits)
        return Score(-value, {"loss": value, "accuracy": accuracy})
