"""AKD's reward: a score weighted by a cost relative to its target."""

from collections.abc import Sequence
from typing import Literal, final

from kdnas.scorers.base import CombinedScorer, Evidence, Score
from kdnas.specs import Spec, check_literals
from kdnas.values import Real


@final
class Reward(CombinedScorer):
    r"""$R = S \cdot (C / T)^w$: another score with a soft bound on a cost.

    At the target the reward equals the score; for $w < 0$ it decreases continuously with the cost: at twice the target
    by $1 - 2^{-0.07} = 4.7$ % of the score. The search's budget is a hard bound.

    Args:
        scorer: a Spec or a name; its scores must be non-negative.
        cost: `macs`, `params`, or `latency`: seconds for one image, measured (not reproducible).
        target: T, in the cost's unit: multiply-accumulates, parameters, or seconds.
        exponent: w.

    Raises:
        ValueError: the target or a student's cost is not positive, the cost is unknown, or a score is negative.

    Reference: Liu et al., Search to Distill: Pearls are Everywhere but not the Eyes, CVPR 2020, section 3.2; the form
        and w = -0.07 from Tan et al., MnasNet, CVPR 2019, equation 2.
    Differs: the papers measure latency on a phone; here it is that of this machine, or a count.
    """

    def __init__(
        self,
        *,
        scorer: Spec | str = "short_training",
        cost: Literal["macs", "params", "latency"] = "macs",
        target: float = 1e6,
        exponent: Real = -0.07,
    ) -> None:
        check_literals(type(self), locals())
        if not target > 0:
            raise ValueError(f"`target` must be positive, got {target}.")
        super().__init__((scorer, cost))
        self.cost, self.target, self.exponent = cost, target, exponent

    def combine(self, scores: Sequence[Score], evidence: Evidence) -> Score:
        """The reward."""
        del evidence
        score, cost = scores[0].value, scores[1].parts[self.cost]
        if score < 0:
            raise ValueError(f"scores of `scorer` must be non-negative, got {score:.4g}. Use accuracies.")
        if not cost > 0:
            raise ValueError(f"the student's {self.cost} must be positive, got {cost:g}. Use another `cost`.")
        return Score(score * (cost / self.target) ** self.exponent, {**scores[0].parts, "score": score})
