"""A fitted predictor as a score: what cheap scores say of a costly one."""

from collections.abc import Sequence
from typing import Literal, final

import numpy as np

from kdnas.scorers._predictor import Predictor, fit
from kdnas.scorers.base import CombinedScorer, Evidence, Score, Scorer, score_all
from kdnas.specs import Spec, check_literals, find_spec


@final
class Predicted(CombinedScorer):
    """The target score as a fitted function of the members' scores and of what they are made of.

    `num_fitted` subnets are drawn and scored by the members and by the target; a linear or Gaussian-process predictor
    is fitted to them and then asked instead of the target. Features are every member's value and parts (per-stage
    similarities, counts). Every score carries the fit's leave-one-out error and its Kendall tau as parts: a tau near 0
    says that the prediction is worth nothing.

    Args:
        members: specs or names, cheap.
        target: what is predicted, costly: by default a short training under the teacher.
        num_fitted: subnets the target is asked about, at least 3.
        kind: `linear` or `gaussian_process`.

    Raises:
        ValueError: as in `kdnas.scorers._predictor.fit`, or no supernet to draw from.

    Reference: Moons et al., Distilling Optimal Neural Networks: Rapid Search in Diverse Spaces, ICCV 2021, section 3.3.
    Differs: the paper's targets are networks finetuned from block-wise weights, its features block losses; here both
        are any scorer's.
    """

    def __init__(
        self,
        *,
        members: tuple[Spec | str, ...] | str = ("in_place", "macs", "params"),
        target: Spec | str = "short_training",
        num_fitted: int = 30,
        kind: Literal["linear", "gaussian_process"] = "gaussian_process",
    ) -> None:
        check_literals(type(self), locals())
        super().__init__(members)
        made = find_spec("kdnas.scorers", target) if isinstance(target, str) else target
        self.target: Scorer = made.build(Scorer)
        self.reads_weights = self.reads_weights or self.target.reads_weights
        self.num_fitted, self.kind = num_fitted, kind

    def combine(self, scores: Sequence[Score], evidence: Evidence) -> Score:
        """The predicted target."""
        predictor = evidence.once(("predictor", self), lambda: self._fitted(evidence))
        value = float(predictor.predict([_features(scores)])[0])
        return Score(value, {"left_out_error": predictor.error, "left_out_tau": predictor.tau})

    def _fitted(self, evidence: Evidence) -> Predictor:
        drawn, table = self.reference(evidence, self.num_fitted)
        targets = [s.value for s in score_all(evidence.subnets(self), drawn, self.target, evidence)]
        return fit([_features(scores) for scores in zip(*table, strict=True)], targets, self.kind)


def _features(scores: Sequence[Score]) -> np.ndarray:
    return np.array([v for score in scores for v in (score.value, *(score.parts[n] for n in sorted(score.parts)))])
