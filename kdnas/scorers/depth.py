"""Size as a score: depth."""

from typing import final

from torch import nn

from kdnas.scorers._probing import ACTIVATIONS
from kdnas.scorers.base import Evidence, Score, Scorer


@final
class Depth(Scorer):
    """The number of activation modules, that is of nonlinear layers: a control, not a method.

    A layer without activation adds no depth: NAS-Bench-Macro's identity at a change of width is a 1x1 convolution, so
    the ranking's own `layers` counts it, and agrees with the public accuracies by tau 0.35, this by 0.69. A
    module that is called twice counts once, a functional activation not at all.

    Reference: none; see Ning et al., Evaluating Efficient Performance Estimators of Neural Architectures, NeurIPS
        2021, for size as the baseline of scores.
    """

    reads_weights = False

    def score(self, student: nn.Module, evidence: Evidence) -> Score:
        """The score of one student."""
        del evidence
        count = float(sum(isinstance(module, ACTIVATIONS) for module in student.modules()))
        return Score(count, {"activations": count})
