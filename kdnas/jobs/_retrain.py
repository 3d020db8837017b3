"""Retraining by the scheme that the options ask for."""

from pathlib import Path
from typing import Any

from kdnas.jobs._anchors import retrain_along
from kdnas.jobs._assist import retrain_assisted
from kdnas.jobs.retrain import retrain
from kdnas.settings import Retrain, TeacherChoice
from kdnas.specs import Spec


def retrain_with(
    student: Path,
    settings: Retrain,
    out: Path,
    *,
    greedy_anchors: float | None,
    assistants: str | None,
    data: Spec | None,
    teacher: TeacherChoice,
) -> dict[str, Any]:
    """Retrain directly, along a route of snapshots, or under assistants.

    Raises:
        ValueError: both schemes at once.
    """
    if assistants and greedy_anchors is not None:
        raise ValueError("--assistants and --greedy-anchors are two schemes. Drop one of the two.")
    if greedy_anchors is not None:
        return retrain_along(student, settings, out, threshold=greedy_anchors, data=data, teacher=teacher)
    if assistants:
        return retrain_assisted(student, settings, out, assistants, data=data, teacher=teacher)
    return retrain(student, settings, out, data=data, teacher=teacher)
