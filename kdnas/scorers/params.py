"""Parameters as a score: a size control."""

from typing import final

from torch import nn

from kdnas.scorers.base import Evidence, Score, Scorer


@final
class Params(Scorer):
    """The number of parameters: a size control.

    Reference: none; for the comparison of rankings with size see White et al., A Deeper Look at Zero-Cost Proxies for
        Lightweight NAS, ICLR Blog Track 2022.
    """

    reads_weights = False

    def score(self, student: nn.Module, evidence: Evidence) -> Score:
        """The student's score."""
        del evidence
        count = float(sum(p.numel() for p in student.parameters()))
        return Score(count, {"params": count})
