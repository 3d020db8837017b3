"""Size as a score: parameters."""

from typing import final

from torch import nn

from kdnas.scorers.base import Evidence, Score, Scorer


@final
class Params(Scorer):
    """The number of parameters: a control, not a method.

    Reference: none; every ranking is to be compared with size, as White et al., A Deeper Look at Zero-Cost Proxies
        for Lightweight NAS, ICLR Blog Track 2022, show.
    """

    reads_weights = False

    def score(self, student: nn.Module, evidence: Evidence) -> Score:
        """The score of one student."""
        del evidence
        count = float(sum(p.numel() for p in student.parameters()))
        return Score(count, {"params": count})
