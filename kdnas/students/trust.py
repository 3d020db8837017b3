"""Data and teacher of a student: what a person names, else what its card names."""

from pathlib import Path

from kdnas.plain import reason
from kdnas.runs.folder import CARD
from kdnas.runs.places import check_places
from kdnas.settings import CardTeacher, NoTeacher, TeacherChoice
from kdnas.specs import Spec
from kdnas.students.card import Card
from kdnas.trust import admit


def provenance(student: Path, card: Card, data: Spec | None, teacher: TeacherChoice) -> tuple[Spec, Spec | None]:
    """Data and teacher of a student: the arguments, or those of the card; no teacher for `NoTeacher`.

    Raises:
        ValueError: the card names no data, or foreign code (see `source_of`).
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

    Args:
        student: the student folder.
        card: its card.
        name: `data` or `teacher`.

    Raises:
        Untrusted: the card names foreign code there; see `kdnas.trust.admit`.
        ValueError: it names a file or folder that is not there.
    """
    content = card.origin.get(name)
    if content is None:
        return None
    admit(content, student / CARD, f"Add --{name} to use another {name}, or --trust if you trust whoever wrote it.")
    try:
        source = Spec.from_json(content)
    except ValueError as error:
        raise ValueError(f"the {name} of {student / CARD} is damaged: {reason(error)}. Add --{name}.") from error
    check_places(source, f"the {name} of {student / CARD}", f"--{name} {name.upper()}")
    return source
