"""Titles of the rows of the closing table, and of the phases in `run.json` and `metrics.jsonl`."""

_NETWORKS = {
    "teacher": "Teacher",
    "student": "Student, distilled",
    "control": "Control: student without a teacher",
    "random networks": "Control: best of as many random networks, trained and chosen alike",
    "largest": "Control: largest network within the budget, distilled",
    "longer": "Control: place 1, for as many steps as all finalists",
    "contrast": "Control: best subnet under the other score, distilled",
    "trained": "What short trials chose, distilled",
    "equal": "Control: equal shares of all channels, distilled",
    "random": "Control: random removal to the same cost, distilled",
    "grown": "Ensemble",
    "single network": "Control: single network of at most its MACs, without a teacher",
    "random candidates": "Control: ensemble of random candidates within its cost",
    "not taught": "Control: the same members without a teacher",
}
_PHASES = {
    "train": "Supernet",
    "search": "Search",
    "export": "Export",
    "retrain": "Student, distilled",
    "factors": "Scale factors",
    "removal": "Removal",
    "trained": "Student, distilled",
    "grow": "Ensemble",
}
_NUMBERED = {
    "teacher": "Teacher, member {}",
    "random": "Control: random subnet {} within the budget, distilled",
    "finalist": "Finalist {}",
    "training": "Training {} of the search",
    "search": "Search {}: the searcher",
    "random control": "Search {}: random search at equal cost",
    "contrast": "Search {}: the same search under the other score",
}


def network_name(row: str) -> str:
    """The network of a row of the closing table, such as `random 1`."""
    return _NETWORKS.get(row) or _numbered(row)


def phase_name(phase: str) -> str:
    """A phase, such as `control` or `teacher 2`; an unknown name stays as it is."""
    return _PHASES.get(phase) or network_name(phase)


def loss_name(loss: str, phase: str) -> str:
    """A logged loss; runs of earlier versions call a teacher's `student`."""
    return "teacher" if loss == "student" and phase.partition(" ")[0] == "teacher" else loss


def _numbered(name: str) -> str:
    """A name such as `random 1`, `finalist-2` or `finalist-2-seed-1`."""
    first, seed, number = name.rpartition("-seed-")
    if seed:
        return f"{_numbered(first)}, further seed {number}"
    kind, separator, number = name.rpartition("-" if "-" in name else " ")
    if not number.isdigit():
        return name
    if kind in _NUMBERED and (separator == " " or kind in ("random", "finalist", "training")):
        return _NUMBERED[kind].format(number)
    return _NETWORKS[kind] if separator == "-" and kind in _NETWORKS else name
