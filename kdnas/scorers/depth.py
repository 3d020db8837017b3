"""Size as a score: depth."""

from typing import final

from torch import nn

from kdnas.search import Evidence, Score, Scorer

_WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


@final
class Depth(Scorer):
    """The number of convolutions and linear layers: a control, not a method.

    The ranking's own `layers` counts the layers of a space instead, each of several convolutions.

    Reference: none; see Ning et al., Evaluating Efficient Performance Estimators of Neural Architectures, NeurIPS
        2021, for size as the baseline of scores.
    """

    def score(self, student: nn.Module, evidence: Evidence) -> Score:
        """The score of one student."""
        del evidence
        count = float(sum(isinstance(module, _WEIGHTED) for module in student.modules()))
        return Score(count, {"layers": count})
