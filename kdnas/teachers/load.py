"""Teachers from their text forms."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from kdnas.settings import FitTeacher
from kdnas.specs import Spec, check_typed, nearest, resolve, spec, split_options
from kdnas.teachers.combined import Mean, several_teachers, streamed_teacher
from kdnas.teachers.zoo import own_teacher, student_teacher, zoo_teacher

FIT = "fit"
_MOST_COLONS = 100


def load_teacher(text: str) -> Spec | FitTeacher:
    """The spec of a teacher from its text form; a `FitTeacher` for `fit`.

    Args:
        text: `fit` (`fit,blocks=1,width=16` for a smaller one), `torchvision:NAME` or `timm:NAME`, either with a file
            of weights and with options, as in `timm:NAME@WEIGHTS,size=96,normalise=data`; `checkpoint:FOLDER`
            or `FOLDER` (a student folder, or one of `kdnas fit`), or `package.module:function` that returns a Teacher
            or a module; of several of these, `ensemble:SPEC,SPEC` (or `ensemble+logits:`, `ensemble+random:`,
            `ensemble+reliable:`; the first two also weighted, `ensemble:SPEC=2,SPEC=1`) and `route:SPEC,SPEC`
            (snapshots of one teacher, in the order of its training). `streamed:SPEC` is a teacher that is in memory
            only while it runs.

    Raises:
        ValueError: another form, or an unknown option.

    Example:
        >>> load_teacher("torchvision:resnet18,size=96").arguments
        (('name', 'resnet18'), ('size', 96), ('weights', ''), ('zoo', 'torchvision'))
        >>> load_teacher("fit").members
        1
    """
    if text.count(":") > _MOST_COLONS:
        raise ValueError(f"a teacher must name at most {_MOST_COLONS} others, got {text.count(':')} colons.")
    if text.partition(",")[0] == FIT:
        return _fit(text)
    kind, _, rest = text.partition(":")
    if kind in ("torchvision", "timm") and rest:
        return _zoo(kind, rest)
    if kind == "streamed" and rest:
        return spec(streamed_teacher, member=_finished(rest, text))
    if kind in ("route", "ensemble", *(f"ensemble+{mean}" for mean in get_args(Mean))) and rest:
        parts, weights = _split_weights(_members(rest))
        options = {"weights": weights} if weights else {}
        return spec(several_teachers, kind=kind, members=tuple(_finished(part, text) for part in parts), **options)
    if kind == "checkpoint" and rest:
        return spec(student_teacher, path=str(Path(rest).expanduser().resolve()))
    if text and Path(text).is_dir():
        return spec(student_teacher, path=str(Path(text).resolve()))
    if rest.isidentifier():
        resolve(text)
        return spec(own_teacher, function=text)
    file = " A file of weights needs its network: torchvision:NAME@FILE." if Path(text).is_file() else ""
    raise ValueError(
        "a teacher is fit, torchvision:NAME or timm:NAME (with @WEIGHTS, or ,size=N), checkpoint:FOLDER, "
        f"package.module:function, ensemble:SPEC,SPEC, route:SPEC,SPEC or streamed:SPEC, got {text!r}.{file}"
    )


def _fit(text: str) -> FitTeacher:
    _, options = split_options(text)
    known = {"members", "snapshots", "blocks", "width"}
    for name, value in options.items():
        if name not in known:
            raise ValueError(f"fit has no option {name!r}.{nearest(name, sorted(known))}")
        if type(value) is not int:
            raise ValueError(f"{name} of fit must be a whole number, got {value!r}.")
    return FitTeacher(**options)


def _zoo(kind: str, rest: str) -> Spec:
    text = re.sub(r"(,\w+=[^,/]*)+$", "", rest)
    _, options = split_options(kind + rest[len(text) :])
    name, at, weights = text.partition("@")
    if not name or (at and not weights):
        raise ValueError(f"a teacher of {kind} is {kind}:NAME or {kind}:NAME@WEIGHTS, got {kind}:{rest!r}.")
    fixed = {"zoo": kind, "name": name, "weights": str(Path(weights).expanduser().resolve()) if weights else ""}
    source = spec(zoo_teacher, **fixed, **options)
    check_typed(f"{kind}:{name}", source.make, options)
    return source


def _finished(text: str, whole: str) -> Spec:
    teacher = load_teacher(text)
    if not isinstance(teacher, Spec):
        raise ValueError(f"each teacher of {whole!r} must be a trained one, got {text!r}.")
    return teacher


def _members(text: str) -> list[str]:
    """The teachers of a list, each with its options: what has an equals sign and no colon belongs to the one before."""
    parts: list[str] = []
    for part in text.split(","):
        if parts and re.fullmatch(r"\w+=[^:]*", part):
            parts[-1] += f",{part}"
        else:
            parts.append(part)
    return parts


def _split_weights(parts: Sequence[str]) -> tuple[list[str], tuple[float, ...]]:
    """Teachers' texts without their weights, and the weights if all have one."""
    pairs = [("", "", "") if re.search(r",\w+=[^,=]*$", part) else part.rpartition("=") for part in parts]
    try:
        weights = [float(number) for _, equals, number in pairs if equals]
    except ValueError:
        return list(parts), ()  # the sign is part of a path
    if weights and len(weights) < len(parts):
        raise ValueError(f"either all teachers of an ensemble have weights or none, got {','.join(parts)!r}.")
    return ([text for text, _, _ in pairs] if weights else list(parts)), tuple(weights)
