"""Accuracy on the search images."""

from collections.abc import Sequence
from typing import Any, final

from torch import Tensor

from kdnas.scorers.base import Evidence, OutputScorer, Score


@final
class Accuracy(OutputScorer):
    """Accuracy on the search images, minus a thousandth of the cross-entropy to break ties.

    Reference: Guo et al., Single Path One-Shot Neural Architecture Search, ECCV 2020, section 3.3.
    Differs: the tie-break; on a few hundred images many subnets have equal accuracy.
    """

    def judge(self, logits: Tensor, digests: Sequence[Any], evidence: Evidence) -> Score:
        """The student's score."""
        del digests
        accuracy = float((logits.argmax(1) == evidence.labels).float().mean())
        entropy = float(-logits.float().log_softmax(1).gather(1, evidence.labels[:, None]).mean())
        return Score(accuracy - 1e-3 * entropy, {"accuracy": accuracy, "cross_entropy": entropy})
