"""Mean rank under several scorers as a score."""

from collections.abc import Sequence
from typing import final

import numpy as np

from kdnas.scorers.base import CombinedScorer, Evidence, Score
from kdnas.specs import Spec


@final
class RankEnsemble(CombinedScorer):
    """The weighted mean of a student's ranks under several scorers, among the same random subnets.

    A member's rank is the share of `num_reference` random subnets with lower scores, ties counting half; it is
    interpolated linearly between neighbours and extrapolated by the range of all of them. It is strictly increasing in
    each member's score, so that two candidates that both beat the reference do not tie, and independent of the score's
    unit. Unlike a rank among candidates it does not change when candidates are added.

    Args:
        members: specs or names, such as `in_place+depth`; typed, each with its options: `in_place,scorer=loss+nwot`.
        weights: one per member, non-negative; equal by default.
        num_reference: random subnets, at least 2.

    Raises:
        ValueError: no members, invalid weights, or the evidence has no supernet.

    Reference: de Borda, Mémoire sur les élections au scrutin, 1781: positional voting.
    Differs: ranks are among a fixed sample, not among the candidates.
    """

    def __init__(
        self,
        *,
        members: tuple[Spec | str, ...] | str = ("in_place", "depth"),
        weights: tuple[float, ...] = (),
        num_reference: int = 200,
    ) -> None:
        super().__init__(members)
        if weights and (len(weights) != len(self.members) or min(weights) < 0 or sum(weights) == 0):
            raise ValueError(
                f"`weights` must be {len(self.members)} non-negative numbers, not all zero, or empty, got {weights}."
            )
        if num_reference < 2:
            raise ValueError(f"`num_reference` must be at least 2, got {num_reference}.")
        self.weights = np.asarray(weights or (1.0,) * len(self.members))
        self.num_reference = num_reference

    def combine(self, scores: Sequence[Score], evidence: Evidence) -> Score:
        """The mean rank, about 0 for the worst and 1 for the best."""
        known = evidence.once(("reference", self), lambda: self._known(evidence))
        ranks = [rank_among(score.value, values) for score, values in zip(scores, known, strict=True)]
        parts = {name: round(rank, 6) for name, rank in zip(self._names(), ranks, strict=True)}
        return Score(float(self.weights @ ranks / self.weights.sum()), parts)

    def _names(self) -> list[str]:
        """The members' classes, numbered where one occurs again."""
        classes = [type(member).__name__ for member in self.members]
        counts = [classes[:place].count(name) for place, name in enumerate(classes)]
        return [f"{name} {count + 1}" if count else name for name, count in zip(classes, counts, strict=True)]

    def _known(self, evidence: Evidence) -> list[np.ndarray]:
        _, table = self.reference(evidence, self.num_reference)
        return [np.sort([score.value for score in scores]) for scores in table]


def rank_among(value: float, known: np.ndarray) -> float:
    """The rank of a value among sorted known values: 0 at the smallest, 1 at the largest, ties counting half.

    Strictly increasing: linear between neighbours and beyond the ends. Where all known values are equal, the rank is
    1/2 at them, 1 above and 0 below.
    """
    distinct, first, count = np.unique(known, return_index=True, return_counts=True)
    if len(distinct) == 1:
        return 0.5 + 0.5 * float(np.sign(value - distinct[0]))
    ranks = (first + (count - 1) / 2) / (len(known) - 1)
    beyond = max(value - distinct[-1], 0.0) + min(value - distinct[0], 0.0)
    return float(np.interp(value, distinct, ranks) + beyond / (distinct[-1] - distinct[0]))
