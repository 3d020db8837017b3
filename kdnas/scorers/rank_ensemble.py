"""Several scores as one ranking."""

from collections.abc import Sequence
from typing import final

import numpy as np

from kdnas.scorers.base import CombinedScorer, Evidence, Score
from kdnas.specs import Spec


@final
class RankEnsemble(CombinedScorer):
    """The weighted mean of a student's ranks under several scorers, each rank taken among the same drawn subnets.

    A member's rank is the share of `num_reference` drawn subnets that score lower, ties counting half, linear between
    neighbours and, beyond the best and the worst of them, by the range of them all: strictly increasing in each
    member's score, so that no two candidates tie because both beat the reference, and free of units. Unlike a rank
    among the candidates it does not change when others join.

    Args:
        members: specs or names, such as `in_place+depth`.
        weights: one per member, not negative; equal by default.
        num_reference: subnets drawn, at least 2.

    Raises:
        ValueError: no members, wrong weights, or no supernet to draw from.

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
                f"weights needs {len(self.members)} numbers, not negative and not all zero, or none; got {weights}."
            )
        if num_reference < 2:
            raise ValueError(f"num_reference must be at least 2, got {num_reference}.")
        self.weights = np.asarray(weights or (1.0,) * len(self.members))
        self.num_reference = num_reference

    def combine(self, scores: Sequence[Score], evidence: Evidence) -> Score:
        """The mean rank, about 0 for the worst and 1 for the best."""
        known = evidence.once(("reference", self), lambda: self._known(evidence))
        ranks = [rank_among(score.value, values) for score, values in zip(scores, known, strict=True)]
        parts = {type(m).__name__: round(rank, 6) for m, rank in zip(self.members, ranks, strict=True)}
        return Score(float(self.weights @ ranks / self.weights.sum()), parts)

    def _known(self, evidence: Evidence) -> list[np.ndarray]:
        _, table = self.reference(evidence, self.num_reference)
        return [np.sort([score.value for score in scores]) for scores in table]


def rank_among(value: float, known: np.ndarray) -> float:
    """A value's rank among sorted known ones: 0 at the least, 1 at the greatest, ties half; strictly increasing.

    Between neighbours and beyond the ends it is linear; where all known are equal it is 1/2 at them, and a larger
    value ranks at 1, a smaller one at 0.
    """
    distinct, first, count = np.unique(known, return_index=True, return_counts=True)
    if len(distinct) == 1:
        return 0.5 + 0.5 * float(np.sign(value - distinct[0]))
    ranks = (first + (count - 1) / 2) / (len(known) - 1)
    beyond = max(value - distinct[-1], 0.0) + min(value - distinct[0], 0.0)
    return float(np.interp(value, distinct, ranks) + beyond / (distinct[-1] - distinct[0]))
