"""A predictor as a score: a costly score fitted from cheap ones."""

from collections.abc import Sequence
from typing import Literal, final

import numpy as np

from kdnas.scorers._predictor import Predictor, fit
from kdnas.scorers.base import CombinedScorer, Evidence, Score, Scorer, score_all
from kdnas.specs import Spec, check_literals, find_spec
from kdnas.values import Sample


@final
class Predicted(CombinedScorer):
    """The target score, predicted from the members' scores and their parts.

    `num_fitted` random subnets are scored by the members and by the target; a linear or Gaussian-process predictor is
    fitted to them and replaces the target. Features are every member's value and parts (per-stage similarities,
    counts). The parts of every score are the fit's leave-one-out error and its Kendall tau: with a tau near 0 the
    predictions are worthless.

    Args:
        members: specs or names of cheap scorers.
        target: spec or name of the costly scorer to predict.
        num_fitted: subnets scored by the target, at least 3.
        kind: `linear` or `gaussian_process`.

    Raises:
        ValueError: as in `kdnas.scorers._predictor.fit`, or the evidence has no supernet.

    Reference: Moons et al., Distilling Optimal Neural Networks: Rapid Search in Diverse Spaces, ICCV 2021, section 3.3.
    Differs: the paper's targets are networks finetuned from block-wise weights and its features are block losses; here
        both come from any scorers.
    """

    def __init__(
        self,
        *,
        members: tuple[Spec | str, ...] | str = ("in_place", "macs", "params"),
        target: Spec | str = "short_training",
        num_fitted: Sample = 30,
        kind: Literal["linear", "gaussian_process"] = "gaussian_process",
    ) -> None:
        check_literals(type(self), locals())
        super().__init__(members)
        target_spec = find_spec("kdnas.scorers", target) if isinstance(target, str) else target
        self.target: Scorer = target_spec.build(Scorer)
        self.reads_weights = self.reads_weights or self.target.reads_weights
        self.num_fitted, self.kind = num_fitted, kind

    def combine(self, scores: Sequence[Score], evidence: Evidence) -> Score:
        """The predicted target."""
        predictor = evidence.once(("predictor", self), lambda: self._fitted(evidence))
        value = float(predictor.predict([_features(scores)])[0])
        return Score(value, {"left_out_error": predictor.error, "left_out_tau": predictor.tau})

    def _fitted(self, evidence: Evidence) -> Predictor:
        sample, table = self.reference(evidence, self.num_fitted)
        targets = [s.value for s in score_all(evidence.subnets(self), sample, self.target, evidence)]
        return fit([_features(scores) for scores in zip(*table, strict=True)], targets, self.kind)


def _features(scores: Sequence[Score]) -> np.ndarray:
    return np.array([v for score in scores for v in (score.value, *(score.parts[n] for n in sorted(score.parts)))])
