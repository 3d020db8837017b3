"""The order of a ranking, and its Pareto front."""

from collections.abc import Sequence

from kdnas.architecture import Architecture
from kdnas.runs.entry import Entry
from kdnas.statistics import apart, pareto_front


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


def finalists(entries: Sequence[Entry], count: int, least: float = 0.2) -> list[Entry]:
    """The best entries, each apart from all better ones in at least this share of its choices.

    Args:
        entries: best first.
        count: how many at most; there are fewer where no more are apart.
        least: smallest `difference` of two finalists.
    """
    return apart(entries, count, lambda a, b: difference(a.architecture, b.architecture), least)


def difference(first: Architecture, second: Architecture) -> float:
    """Share of the choices of either network in which the two differ, 0 to 1; one that only one has is a difference.

    Example:
        >>> difference(Architecture({"depth": 1, "width": 8}), Architecture({"depth": 1, "width": 16}))
        0.5
    """
    names = {*first, *second}
    return sum(first.get(name) != second.get(name) for name in names) / max(1, len(names))
