"""TGSA: similarity to the teacher by representational dissimilarity matrices."""

from collections.abc import Sequence
from typing import Any, Literal, final

import torch
from torch import Tensor

from kdnas.scorers.base import Evidence, OutputScorer, Score
from kdnas.similarity import dissimilarity, standard, triangle
from kdnas.specs import check_literals
from kdnas.values import Amount


@final
class Rdm(OutputScorer):
    """Correlation of dissimilarity matrices, `TG = mean_t max_l r(RDM_t, RDM_l)`, plus `premature * accuracy`.

    For every teacher stage `t`, the student stage `l` of highest correlation; `RDM_ij = 1 - Pearson` of the activations
    of two images, `r` the correlation of the strict upper triangles. The logits are one more stage of both. TG is in
    [-1, 1], 1 for the teacher itself. With fewer than 3 images, and for a stage that is constant over the images, `r`
    is 0.

    Args:
        compare: `pearson` or `spearman` correlation of the triangles.
        premature: weight of the accuracy P on the same images: 0 is TG, 1 is P + TG. P alone is scorer `accuracy`.

    Reference: Bashivan, Tensen, DiCarlo, Teacher Guided Architecture Search, ICCV 2019, section 3.
    Differs: the paper uses every layer, here the stages' outputs and the logits.
    """

    def __init__(self, *, compare: Literal["pearson", "spearman"] = "pearson", premature: Amount = 0.0) -> None:
        check_literals(type(self), locals())
        self.compare, self.premature = compare, premature

    def digest(self, stage: int, feature: Tensor, evidence: Evidence) -> Any:
        """Correlation of this stage with every teacher stage, `[teacher stages]`."""
        del stage
        return (self._triangle(feature) * self._teacher(evidence)).sum(1)

    def judge(self, logits: Tensor, digests: Sequence[Any], evidence: Evidence) -> Score:
        """The mean over teacher stages of the best correlation."""
        table = torch.stack([*digests, self.digest(len(digests), logits, evidence)])
        best = table.amax(0)
        similarity = float(best.mean())
        accuracy = evidence.accuracy(logits)
        parts = {f"teacher_stage_{i}": round(v, 6) for i, v in enumerate(best.tolist())}
        value = similarity + self.premature * accuracy
        return Score(value, {"similarity": similarity, "accuracy": accuracy, **parts})

    def _triangle(self, feature: Tensor) -> Tensor:
        entries = triangle(dissimilarity(feature), self.compare)
        # Fewer than 3 images leave nothing to correlate.
        return standard(entries) if len(entries) > 1 else entries * 0

    def _teacher(self, evidence: Evidence) -> Tensor:
        stages = (*evidence.teacher.features, evidence.teacher.logits)
        return evidence.once(("rdm", self.compare), lambda: torch.stack([self._triangle(f) for f in stages]))
