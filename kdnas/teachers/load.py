"""Teachers from their text forms."""

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from kdnas.settings import FitTeacher
from kdnas.specs import Spec, resolve, spec
from kdnas.teachers.combined import Mean, several_teachers, streamed_teacher
from kdnas.teachers.zoo import own_teacher, student_teacher, zoo_teacher

FIT = "fit"


def load_teacher(text: str) -> Spec | FitTeacher:
    """The spec of a teacher from its text form; `FitTeacher()` for `fit`.

    Args:
        text: `fit`, `torchvision:NAME`, `timm:NAME` (either may end in `@weights.safetensors`), `checkpoint:FOLDER`
            (a student folder), or `package.module:function` that returns a Teacher or a module; of several of these,
            `ensemble:SPEC,SPEC` (or `ensemble+logits:`, `ensemble+random:`, `ensemble+reliable:`; the first two also
            weighted, `ensemble:SPEC=2,SPEC=1`) and `route:SPEC,SPEC` (snapshots of one teacher, in the order of its
            training). `streamed:SPEC` is a teacher that is in memory only while it runs.

    Raises:
        ValueError: another form.

    Example:
        >>> load_teacher("torchvision:resnet18").arguments
        (('name', 'resnet18'), ('weights', ''), ('zoo', 'torchvision'))
        >>> load_teacher("fit").members
        1
    """
    if text == FIT:
        return FitTeacher()
    kind, _, rest = text.partition(":")
    if kind in ("torchvision", "timm") and rest:
        name, _, weights = rest.partition("@")
        return spec(zoo_teacher, zoo=kind, name=name, weights=str(Path(weights).resolve()) if weights else "")
    if kind == "streamed" and rest:
        return spec(streamed_teacher, member=_finished(rest, text))
    if kind in ("route", "ensemble", *(f"ensemble+{mean}" for mean in get_args(Mean))) and rest:
        parts, weights = _split_weights(rest.split(","))
        options = {"weights": weights} if weights else {}
        return spec(several_teachers, kind=kind, members=tuple(_finished(part, text) for part in parts), **options)
    if kind == "checkpoint" and rest:
        return spec(student_teacher, path=str(Path(rest).resolve()))
    if rest.isidentifier():
        resolve(text)
        return spec(own_teacher, function=text)
    raise ValueError(
        "a teacher is fit, torchvision:NAME, timm:NAME, checkpoint:FOLDER, package.module:function, "
        f"ensemble:SPEC,SPEC, route:SPEC,SPEC or streamed:SPEC, got {text!r}."
    )


def _finished(text: str, whole: str) -> Spec:
    teacher = load_teacher(text)
    if not isinstance(teacher, Spec):
        raise ValueError(f"each teacher of {whole!r} must be a trained one, got {text!r}.")
    return teacher


def _split_weights(parts: Sequence[str]) -> tuple[list[str], tuple[float, ...]]:
    """Teachers' texts without their weights, and the weights if all have one."""
    pairs = [part.rpartition("=") for part in parts]
    try:
        weights = [float(number) for _, equals, number in pairs if equals]
    except ValueError:
        return list(parts), ()  # the sign is part of a path
    if weights and len(weights) < len(parts):
        raise ValueError(f"either all teachers of an ensemble have weights or none, got {','.join(parts)!r}.")
    return ([text for text, _, _ in pairs] if weights else list(parts)), tuple(weights)
