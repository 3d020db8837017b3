"""Retraining by the scheme that the options ask for."""

from pathlib import Path
from typing import Any

from kdnas.data.base import Data
from kdnas.distillers.base import Distiller
from kdnas.jobs._anchors import retrain_along
from kdnas.jobs._assist import retrain_assisted
from kdnas.jobs._preflight import preflight
from kdnas.jobs._run import insisting
from kdnas.jobs.retrain import retrain
from kdnas.runs.lock import hold
from kdnas.runs.steps import drafts_of
from kdnas.settings import CardTeacher, Retrain, TeacherChoice
from kdnas.specs import Spec
from kdnas.students.folder import check_place, read_student
from kdnas.students.trust import provenance


def retrain_with(
    student: Path,
    settings: Retrain,
    out: Path,
    *,
    greedy_anchors: float | None,
    assistants: str | None,
    data: Spec | None,
    teacher: TeacherChoice,
    force: bool = False,
) -> dict[str, Any]:
    """Retrain directly, along a route of snapshots, or under assistants.

    Raises:
        ValueError: both schemes at once; or the new folder holds a student, and `force` is off.
    """
    hold(out)
    check_place(out, replace=force)
    _preflight(student, settings, out, data, teacher)
    if assistants and greedy_anchors is not None:
        raise ValueError("--assistants and --greedy-anchors are two schemes. Drop one of the two.")
    if greedy_anchors is not None:
        return retrain_along(student, settings, out, threshold=greedy_anchors, data=data, teacher=teacher)
    if assistants:
        return retrain_assisted(student, settings, out, assistants, data=data, teacher=teacher)
    return retrain(student, settings, out, data=data, teacher=teacher)


def _preflight(student: Path, settings: Retrain, out: Path, data: Spec | None, teacher: TeacherChoice) -> None:
    """Show what is retrained, on what and by whom, unless the training is under way."""
    if drafts_of(out):
        return
    network, card = read_student(student)
    source, teacher_spec = provenance(student, card, data, teacher)
    if settings.distiller.build(Distiller).uses_teacher is False:
        teacher_spec = None
    with insisting(isinstance(teacher, CardTeacher)):  # it was judged when its run began
        preflight(source.build(Data), folder=out, teacher=teacher_spec, network=network, recipe=settings.recipe)
