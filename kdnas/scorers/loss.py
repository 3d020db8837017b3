"""Any loss of the library as a score."""

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
        loss: a Spec, or the name of a loss without learnable parts: `soft_targets` (KL to the teacher, the default),
            `alpha_divergence`, `dist`, `representational`, and so on.

    Raises:
        ValueError: the loss has learnable parts, which no one has trained.

    Reference: the loss's own. As a ranking score: Huang et al., DIST, NeurIPS 2022, for one that is bounded.
    """

    def __init__(self, *, loss: Spec | str = "soft_targets") -> None:
        made = find_spec("kdnas.losses", loss) if isinstance(loss, str) else loss
        self.loss: DistillationLoss = made.build(DistillationLoss)
        tried: DistillationLoss = made.build(DistillationLoss)
        tried.prepare(*example(dense=tried.dense)[:2])
        if any(True for _ in tried.parameters()):
            raise ValueError(
                f"{type(tried).__name__} has learnable parts, and an untrained part scores nothing. "
                "Use a loss without them, such as soft_targets, dist or representational."
            )

    def judge(self, logits: Tensor, digests: Sequence[Any], evidence: Evidence) -> Score:
        """The score of one student."""
        student = Outputs(logits, tuple(digests), images=evidence.images)
        value = float(self.loss(student, evidence.teacher, evidence.labels))
        accuracy = float((logits.argmax(1) == evidence.labels).float().mean())
        return Score(-value, {"loss": value, "accuracy": accuracy})
