"""Teachers from their text forms."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from kdnas.plain import typed_path
from kdnas.settings import FitTeacher
from kdnas.specs import Spec, check_typed, nearest, resolve, spec, split_options
from kdnas.teachers.combined import Mean, several_teachers, streamed_teacher
from kdnas.teachers.zoo import own_teacher, zoo_teacher
from kdnas.values import shown

FIT = "fit"
_MOST_COLONS = 100


def load_teacher(text: str) -> Spec | FitTeacher:
    """The spec of a teacher from its text form; a `FitTeacher` for `fit`.

    Args:
        text: `fit` (`fit,blocks=1,width=16` for a smaller one); `torchvision:NAME` or `timm:NAME`, either with a file
            of weights and with options, as in `timm:NAME@WEIGHTS,size=96,normalise=data`; `timm:FOLDER`;
            `hf:FOLDER_OR_NAME` of transformers; `export:FILE` of torch.export; `onnx:FILE`; `checkpoint:FOLDER`
            or `FOLDER` (a student folder, or one of `kdnas fit`); or `package.module:function` that returns a Teacher,
            a module or a function of images. Of several of these, `ensemble:SPEC,SPEC` (or `ensemble+logits:`,
            `ensemble+random:`, `ensemble+reliable:`; the first two also weighted, `ensemble:SPEC=2,SPEC=1`) and
            `route:SPEC,SPEC` (snapshots of one teacher, in the order of its training). `streamed:SPEC` is a teacher
            that is in memory only while it runs.

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
    if kind in _OF_FILES and rest:
        return _of_file(kind, rest)
    if kind == "streamed" and rest:
        return spec(streamed_teacher, member=_finished(rest, text))
    if kind in ("route", "ensemble", *(f"ensemble+{mean}" for mean in get_args(Mean))) and rest:
        parts, weights = _split_weights(_members(rest))
        options = {"weights": weights} if weights else {}
        return spec(several_teachers, kind=kind, members=tuple(_finished(part, text) for part in parts), **options)
    if text and Path(text).is_dir():
        return _of_file("checkpoint", text)
    name, options = _typed(text)
    if name.partition(":")[2].isidentifier():
        resolve(name)
        return _checked(name, spec(own_teacher, function=name, **options), options)
    file = " A file of weights needs its network: torchvision:NAME@FILE." if Path(text).is_file() else ""
    raise ValueError(
        "a teacher is fit, torchvision:NAME or timm:NAME (with @WEIGHTS, or ,size=N), timm:FOLDER, hf:FOLDER_OR_NAME, "
        "export:FILE, onnx:FILE, checkpoint:FOLDER, "
        f"package.module:function, ensemble:SPEC,SPEC, route:SPEC,SPEC or streamed:SPEC, got {text!r}.{file}"
    )


def _fit(text: str) -> FitTeacher:
    _, options = split_options(text)
    known = {"members", "snapshots", "blocks", "width"}
    for name, value in options.items():
        if name not in known:
            raise ValueError(f"fit has no option {shown(name)}.{nearest(name, sorted(known))}")
        if type(value) is not int:
            raise ValueError(f"{name} of fit must be a whole number, got {value!r}.")
    return FitTeacher(**options)


def _zoo(kind: str, rest: str) -> Spec:
    text, options = _typed(rest)
    name, at, weights = text.partition("@")
    if not name or (at and not weights):
        raise ValueError(f"a teacher of {kind} is {kind}:NAME or {kind}:NAME@WEIGHTS, got {kind}:{rest!r}.")
    name = _place(name) if kind == "timm" else name
    fixed = {"zoo": kind, "name": name, "weights": str(typed_path(weights).resolve()) if weights else ""}
    return _checked(f"{kind}:{name}", spec(zoo_teacher, **fixed, **options), options)


_OF_FILES = {
    "hf": "kdnas.teachers.hf:hf_teacher",
    "export": "kdnas.teachers.export:export_teacher",
    "onnx": "kdnas.teachers.onnx:onnx_teacher",
    "checkpoint": "kdnas.teachers.zoo:student_teacher",
}
"""Teachers of one file or folder."""


def _of_file(kind: str, rest: str) -> Spec:
    name, options = _typed(rest)
    path = _place(name) if kind == "hf" else str(typed_path(name).resolve())
    return _checked(f"{kind}:{name}", spec(_OF_FILES[kind], path=path, **options), options)


def _place(name: str) -> str:
    """A folder's whole path; another text is a name elsewhere, unless it looks like a path.

    Raises:
        ValueError: it does, and there is no such folder.
    """
    path = typed_path(name)
    if path.is_dir():
        return str(path.resolve())
    if name.startswith((".", "/", "~")) or path.exists():
        raise ValueError(f"{name} is no folder. Give the folder of config.json and model.safetensors.")
    return name


def _typed(text: str) -> tuple[str, dict[str, object]]:
    """A text without its options, and these; a path may have commas."""
    name = re.sub(r"(,\w+=[^,/]*)+$", "", text)
    return name, split_options("_" + text[len(name) :])[1]


def _checked(name: str, source: Spec, options: dict[str, object]) -> Spec:
    check_typed(name, source.make, options)
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
