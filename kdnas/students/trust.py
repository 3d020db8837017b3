"""Data and teacher of a student's card, and whether their makers may be imported."""

from pathlib import Path
from typing import Any

from kdnas.runs.folder import CARD, run_around
from kdnas.settings import CardTeacher, NoTeacher, TeacherChoice
from kdnas.specs import Spec, resolve
from kdnas.students.card import Card
from kdnas.students.source import nested_specs

TRUSTED = {
    "data": tuple(f"kdnas.data:{name}" for name in ("digits", "folder", "cifar10", "cifar100", "strong")),
    "teacher": tuple(
        f"kdnas.teachers:{name}" for name in ("student_teacher", "zoo_teacher", "several_teachers", "streamed_teacher")
    ),
}
"""Makers that a card may name wherever its folder lies: they run no code of the student's author."""


def provenance(student: Path, card: Card, data: Spec | None, teacher: TeacherChoice) -> tuple[Spec, Spec | None]:
    """Data and teacher of a student: the arguments, or those of the card; no teacher for `NoTeacher`.

    Raises:
        ValueError: the card names no data, or a maker that is not trusted (see `source_of`).
    """
    if isinstance(teacher, CardTeacher):
        return data_of(student, card, data), source_of(student, card, "teacher")
    return data_of(student, card, data), None if isinstance(teacher, NoTeacher) else teacher


def data_of(student: Path, card: Card, data: Spec | None) -> Spec:
    """The first of the two that `provenance` returns."""
    data = data or source_of(student, card, "data")
    if data is None:
        raise ValueError(f"{student / CARD} names no data set. Add --data.")
    return data


def source_of(student: Path, card: Card, name: str) -> Spec | None:
    """The data or the teacher that a card names, or None.

    A student inside its run may name anything that the run's own manifest could. A student from elsewhere may come from
    anybody: importing what it names would run their code, so it may name kdnas's own makers only.

    Args:
        student: the student folder.
        card: its card.
        name: `data` or `teacher`.

    Raises:
        ValueError: another maker is named, and the student lies in no run.
    """
    content = card.origin.get(name)
    if content is None:
        return None
    source = Spec.from_json(content)
    if run_around(student) is None and not is_trusted(source, name):
        raise ValueError(
            f"{student / CARD} names {source.make} as its {name}; outside a run only kdnas's own makers are trusted. "
            f"Add --{name}."
        )
    return source


def is_trusted(source: Spec, name: str) -> bool:
    """Whether a spec and every spec among its arguments is one of `TRUSTED[name]`, under whichever import path.

    Nothing outside `kdnas.data` and `kdnas.teachers` is imported to find out.
    """
    trusted = {resolve(path) for path in TRUSTED[name]}
    return all(_maker(spec) in trusted for spec in nested_specs(source))


def _maker(source: Spec) -> Any:
    """The callable of a spec, None where it is not in a package of trusted makers or does not exist."""
    package = ".".join(source.make.partition(":")[0].split(".")[:2])
    if package not in ("kdnas.data", "kdnas.teachers"):
        return None
    try:
        return resolve(source.make)
    except ValueError:
        return None
