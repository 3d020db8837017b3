"""The order of a ranking."""

from collections.abc import Sequence

from kdnas.runs.entry import Entry


def ranked(entries: Sequence[Entry]) -> list[Entry]:
    """Best first; ties go to the network that uses more of the budget (more MACs), then by code.

    Those whose evaluation was stopped early come after those that went further: their scores are not comparable.
    """
    return sorted(entries, key=lambda e: (-e.share, -e.score, -e.macs, e.code))
