"""The order of a ranking, and its Pareto front."""

from collections.abc import Sequence

from kdnas.runs.entry import Entry
from kdnas.statistics import pareto_front


def ranked(entries: Sequence[Entry]) -> list[Entry]:
    """Best first; of equal scores the network with more MACs comes first, then the smaller code.

    Evaluations that were stopped early come after those that went further, as their scores are not comparable.
    """
    return sorted(entries, key=lambda e: order_key(e.code, e.score, e.share, e.macs))


def order_key(
    code: str, score: float | None, share: float | None, macs: float | None
) -> tuple[bool, float, float, float, str]:
    """The sort key of `ranked`; an entry without a score comes last, a missing share or cost counts as 0."""
    return score is None, -(share or 0.0), -(score or 0.0), -(macs or 0.0), code


def front_of(entries: Sequence[Entry]) -> list[Entry]:
    """The Pareto front of score, MACs and params, cheapest first; of equal entries the one with the first code."""
    by_code = sorted(entries, key=lambda e: e.code)
    front = pareto_front([(e.macs, e.params, -e.score) for e in by_code], distinct=True)
    return sorted((by_code[i] for i in front), key=lambda e: (e.macs, e.params))
