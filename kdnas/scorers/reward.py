"""AKD's reward: a score weighed against a cost target."""

from collections.abc import Sequence
from typing import Literal, final

from kdnas.scorers.base import CombinedScorer, Evidence, Score
from kdnas.specs import Spec, check_literals


@final
class Reward(CombinedScorer):
    r"""$R = S \cdot (C / T)^w$: another score, softly bounded in cost.

    At the target the reward is the score itself; it falls with the cost where $w < 0$, continuously and without a
    bound: twice the target costs $1 - 2^{-0.07} = 4.7$ % of the score. A hard bound is the search's budget.

    Args:
        scorer: what is weighed, a Spec or a name; its scores must not be negative. By default a short training under
            the teacher.
        cost: `macs`, `params`, or `latency`, seconds measured for one image here and now (and so not repeatable).
        target: T, in the cost's unit: multiply-accumulates, parameters, or seconds.
        exponent: w.

    Raises:
        ValueError: a target that is not positive, an unknown cost, or a negative score.

    Reference: Liu et al., Search to Distill: Pearls are Everywhere but not the Eyes, CVPR 2020, section 3.2; the form
        and w = -0.07 from Tan et al., MnasNet, CVPR 2019, equation 2.
    Differs: the papers measure latency on a telephone; here it is this machine's, or a count.
    """

    def __init__(
        self,
        *,
        scorer: Spec | str = "short_training",
        cost: Literal["macs", "params", "latency"] = "macs",
        target: float = 1e6,
        exponent: float = -0.07,
    ) -> None:
        check_literals(type(self), locals())
        if not target > 0:
            raise ValueError(f"target must be positive, got {target}.")
        super().__init__((scorer, cost))
        self.cost, self.target, self.exponent = cost, target, exponent

    def combine(self, scores: Sequence[Score], evidence: Evidence) -> Score:
        """The reward."""
        del evidence
        worth, spent = scores[0].value, scores[1].parts[self.cost]
        if worth < 0:
            raise ValueError(f"a reward weighs scores that are not negative, got {worth:.4g}. Use accuracies.")
        return Score(worth * (spent / self.target) ** self.exponent, {**scores[0].parts, "score": worth})
