"""Paths in the files of a run: relative inside of it; outside of it a key and a name, and where that is lies apart."""

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kdnas.specs import Spec
from kdnas.state import key_of, recall, record
from kdnas.trust import is_own

_KIND = "places"
_ELSEWHERE = re.compile(r"(?s)(.*?)elsewhere/([0-9a-f]{16})/([^/]*)")
_HERE: dict[str, str] = {}
"""Where things are, by key, as far as this process has seen."""
_MOST_MOVES = 8
_WEIGHTS = ("", "weights.safetensors", "teacher/weights.safetensors")
"""The files by which a file, a student or a folder of `kdnas fit` is known again."""


def portable(value: Any, folder: Path, top: Path) -> Any:
    """JSON content for a file in a folder, without absolute paths.

    Those of files inside `top` become relative to the folder. Others become `elsewhere/KEY/NAME`, and where they are is
    remembered for this user and machine, outside of the run.

    Args:
        value: the content.
        folder: that the file is in.
        top: what can be moved as a whole: the run, or the comparison that it is a part of.
    """
    folder, top = folder.resolve(), top.resolve()

    def convert(text: str) -> str:
        before, path = _absolute(text)
        if not path:
            return text
        if Path(path).is_relative_to(top):
            return before + os.path.relpath(path, folder)
        key = _key(path)
        _HERE[key] = path
        record(_KIND, key, path)
        return f"{before}elsewhere/{key}/{Path(path).name}"

    return _converted(value, convert)


def located(value: Any, folder: Path, top: Path) -> Any:
    """The content that `portable` was given; what is not known on this machine stays as it is."""
    folder, top = folder.resolve(), top.resolve()

    def convert(text: str) -> str:
        if (match := _ELSEWHERE.fullmatch(text)) is not None:
            path = _where(match[2])
            return text if path is None else match[1] + path
        before, path = _absolute(text)
        if path and not Path(path).exists():
            return before + (_where(_key(path)) or path)
        before, colon, path = text.rpartition(":")
        there = (folder / path).resolve() if path.startswith(f"..{os.sep}") and "\0" not in path else None
        return before + colon + str(there) if there is not None and there.is_relative_to(top) else text

    return _converted(value, convert)


def name_again(pairs: Mapping[str, str]) -> None:
    """Let this process find things at other places; `settle` remembers them.

    Args:
        pairs: what `moved` returned.
    """
    _HERE.update({_key(old): path for old, path in pairs.items()})


def settle(pairs: Mapping[str, str]) -> None:
    """Remember where things are from now on, for this user and machine; see `name_again`."""
    for old, path in pairs.items():
        record(_KIND, _key(old), path)


def forget(pairs: Mapping[str, str]) -> None:
    """Undo `name_again`."""
    for old in pairs:
        _HERE.pop(_key(old), None)


def _key(text: str) -> str:
    """The key of an absolute path, or the one in what stands for it."""
    match = _ELSEWHERE.fullmatch(text)
    return key_of(text)[:16] if match is None else match[2]


def _where(key: str) -> str | None:
    """The path that a key stands for on this machine; one that is not there stands in turn for where it was moved."""
    path = None
    for _ in range(_MOST_MOVES):
        path, before = _HERE.get(key) or recall(_KIND, key), path
        if path is None or Path(path).exists():
            return path or before
        key = _key(path)
    return path


def by_name(value: Any) -> Any:
    """The content with names in place of paths, for people."""

    def convert(text: str) -> str:
        match, (before, path) = _ELSEWHERE.fullmatch(text), _absolute(text)
        return match[1] + match[3] if match else before + Path(path).name if path else text

    return _converted(value, convert)


def by_content(value: Any) -> Any:
    """The content with, in place of each path, SHA-256 of the weights there, or its name: alike wherever that lies."""

    def convert(text: str) -> str:
        before, path = _absolute(text)
        return before + (weights_digest(path) or Path(path).name) if path else text

    return _converted(value, convert)


def missing(value: Any) -> list[str]:
    """The names of what a content names outside of its run and what is not there, or not known, on this machine."""
    if isinstance(value, str):
        match = _ELSEWHERE.fullmatch(value)
        return [] if match is None else [match[3]]
    if isinstance(value, Mapping) and isinstance(value.get("make"), str) and is_own(value["make"]):
        lost = [path for text in _texts(value) if (path := _absolute(text)[1]) and not Path(path).exists()]
        if lost:
            return [Path(path).name for path in lost]
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [name for part in inner for name in missing(part)]


def check_places(source: Spec, subject: str, option: str) -> None:
    """Raise a ValueError where a spec names a file or folder that is not known or not there on this machine."""
    names = missing(source.to_json())
    if names:
        raise ValueError(
            f"{subject} needs {names[0]!r}, which is not where it was, or was on another machine. Say where it is now: "
            f"{option}."
        )


def moved(old: Any, new: Any) -> tuple[Any, dict[str, str]]:
    """Old content with those paths of new content that stand where the old one names something that is not there.

    Returns:
        The content, and by old path the new one.
    """
    pairs: dict[str, str] = {}

    def merge(one: Any, other: Any) -> Any:
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            return {key: merge(value, other.get(key)) for key, value in one.items()}
        if isinstance(one, list) and isinstance(other, list | tuple) and len(one) == len(other):
            return [merge(*both) for both in zip(one, other, strict=True)]
        if isinstance(one, str) and isinstance(other, str) and one != other:
            match, (before, path), (first, lost) = _ELSEWHERE.fullmatch(one), _absolute(other), _absolute(one)
            if path and before == (match[1] if match else first if lost and not Path(lost).exists() else None):
                pairs[one[len(before) :]] = path
                return other
        return one

    return merge(old, new), pairs


def digests(value: Any) -> dict[str, str]:
    """By absolute path in a content, SHA-256 of the file there, or of the weights in the folder there; not of data."""
    paths = {path for text in _texts(value, but="data") if (path := _absolute(text)[1])}
    return {path: digest for path in sorted(paths) if (digest := weights_digest(path))}


def weights_digest(path: str) -> str:
    """SHA-256 of a file, or of the weights of a student's or a teacher's folder; empty for anything else."""
    files = [file for name in _WEIGHTS if (file := Path(path, name)).is_file()]
    if not files:
        return ""
    with files[0].open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _absolute(text: str) -> tuple[str, str]:
    """What stands before an absolute path that a text ends with, such as `checkpoint:`, and the path; else nothing."""
    for start in (0, text.find(":") + 1, text.find("@") + 1):
        path = text[start:]
        if Path(path).is_absolute() and Path(path).name and "\0" not in path and not path.startswith("//"):
            return text[:start], path
    return text, ""


def _texts(value: Any, but: str = "") -> Iterator[str]:
    """The texts in a content, apart from what is under a key."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        value = [inner for key, inner in value.items() if key != but]
    for part in value if isinstance(value, list | tuple) else ():
        yield from _texts(part, but)


def _converted(value: Any, convert: Callable[[str], str]) -> Any:
    """The content with every text converted."""
    if isinstance(value, str):
        return convert(value)
    if isinstance(value, Mapping):
        return {key: _converted(inner, convert) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_converted(inner, convert) for inner in value)
    return value
