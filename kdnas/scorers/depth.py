"""Depth as a score: a size control."""

from typing import final

from torch import nn

from kdnas.scorers._probing import ACTIVATIONS
from kdnas.scorers.base import Evidence, Score, Scorer


@final
class Depth(Scorer):
    """The number of activation modules, that is, of nonlinear layers: a size control.

    Layers without an activation are not counted: NAS-Bench-Macro's identity at a change of width is a 1x1 convolution,
    which an entry's `layers` counts; tau with the public accuracies is 0.35 for `layers` and 0.69 for this score. A
    module that is called twice counts once; a functional activation is not counted.

    Reference: none; see Ning et al., Evaluating Efficient Performance Estimators of Neural Architectures, NeurIPS
        2021, for size as a baseline.
    """

    reads_weights = False

    def score(self, student: nn.Module, evidence: Evidence) -> Score:
        """The student's score."""
        del evidence
        count = float(sum(isinstance(module, ACTIVATIONS) for module in student.modules()))
        return Score(count, {"activations": count})
