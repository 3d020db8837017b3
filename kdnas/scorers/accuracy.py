"""The task's measure on the search images."""

from collections.abc import Sequence
from typing import Any, final

from torch import Tensor

from kdnas.scorers.base import Evidence, OutputScorer, Score


@final
class Accuracy(OutputScorer):
    """The task's measure on the search images, such as accuracy, minus a thousandth of the loss of the labels.

    The loss, of classification the cross-entropy, breaks ties.

    Reference: Guo et al., Single Path One-Shot Neural Architecture Search, ECCV 2020, section 3.3.
    Differs: the tie-break; on a few hundred images many subnets have equal accuracy.
    """

    def judge(self, logits: Tensor, digests: Sequence[Any], evidence: Evidence) -> Score:
        """The student's score."""
        del digests
        accuracy = evidence.accuracy(logits)
        entropy = float(evidence.task.loss(logits.float(), evidence.labels, reduction="none").mean())
        return Score(accuracy - 1e-3 * entropy, {"accuracy": accuracy, "cross_entropy": entropy})
