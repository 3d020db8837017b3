"""Whose code a file may name: kdnas's own, and what this user's earlier commands named."""

import functools
import importlib.util
import itertools
import json
import os
import pkgutil
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, final

from kdnas.plain import printable
from kdnas.specs import algorithms
from kdnas.state import key_of, recall, record

_ALGORITHMS = tuple(f"kdnas.{kind}" for kind in ("losses", "scorers", "searchers", "distillers", "spaces"))
_BLOCKS = "kdnas.blocks"
_MAKERS = {
    "kdnas.data": (
        *("digits", "folder", "cifar10", "cifar100", "strong", "hf", "parquet", "wds", "csv", "npz"),
        *("masks", "culane", "tusimple", "roads"),
    ),
    "kdnas.teachers": (  # without export_teacher: what torch.export wrote is a program
        *("hf_teacher", "onnx_teacher", "own_teacher", "several_teachers"),
        *("streamed_teacher", "student_teacher", "zoo_teacher"),
    ),
    "kdnas.sharing": ("KernelTransform",),
    "kdnas.jobs._memory": ("data_in_memory", "teacher_in_memory"),
}
"""Packages whose functions and classes are no folder of algorithms, with those that a file may name."""
_PRUNERS = "optuna.pruners"
_MOST_NAMES = 5
_BEGUN = "begun"
_TRUSTS: ContextVar[bool] = ContextVar("trusts", default=False)
_ADMITTED: set[str] = set()
"""Specs that this process may build, as JSON texts."""


@final
class Untrusted(ValueError):
    """A file names code that is not kdnas's own, and nobody has said that it may run.

    Attributes:
        names: the import paths.
    """

    def __init__(self, where: object, names: Iterable[str], advice: str = "") -> None:
        self.names = tuple(dict.fromkeys(names))
        shown = [printable(name)[:80] for name in self.names[:_MOST_NAMES]]
        more = f" and {len(self.names) - len(shown)} more" if len(self.names) > len(shown) else ""
        super().__init__(
            f"{printable(str(where))} names code that is none of kdnas's algorithms: {', '.join(shown)}{more}. "
            f"{advice or 'It would run with your rights; if you trust whoever wrote it, add --trust (trust=True).'}"
        )


@contextmanager
def trusting(value: bool) -> Iterator[None]:
    """Inside, files may name any code; what they name is remembered as if it had been begun here."""
    token = _TRUSTS.set(value or _TRUSTS.get())
    try:
        yield
    finally:
        _TRUSTS.reset(token)


def admit(content: Any, where: object, advice: str = "") -> None:
    """Refuse the content of a file that names foreign code, before anything of it is imported.

    Admitted are specs that a command of this user named before, with the same arguments, as long as their modules lie
    where they lay then; and any inside `trusting(True)`.

    Args:
        content: plain JSON or TOML content, or a part of it.
        where: the file, for the message.
        advice: what to do, a sentence, in place of --trust.

    Raises:
        Untrusted: with the names.

    Example:
        >>> admit({"make": "kdnas.data:digits", "arguments": {}}, "run.json")
        >>> admit({"make": "subprocess:run", "arguments": {"args": ["ls"]}}, "run.json")
        Traceback (most recent call last):
        kdnas.trust.Untrusted: run.json names code that is none of kdnas's algorithms: subprocess:run. It would ...
    """
    specs = dict(foreign_specs(content))
    if _TRUSTS.get():
        remember(content)
        return
    unknown = [name for text, names in specs.items() if not _is_known(text) for name in names]
    if unknown:
        raise Untrusted(where, unknown, advice)


def check_links(folder: Path, part: str = "") -> None:
    """Refuse a folder with a link that leads out of it, which would be written through; not inside `trusting(True)`.

    Args:
        folder: the folder.
        part: of it, which alone is looked at.

    Raises:
        ValueError: with the link's name.
    """
    if _TRUSTS.get():
        return
    inner = (Path(root, name) for root, folders, files in os.walk(folder / part) for name in (*folders, *files))
    for path in itertools.chain([folder / part], (path for path in inner if path.is_symlink())):
        if leads_out(path, folder):
            raise ValueError(
                f"{printable(str(path))} is a link that leads out of its folder. Copy what it leads to, or add "
                "--trust if the link is yours (trust=True)."
            )


def leads_out(path: Path, folder: Path) -> bool:
    """Whether links lead from a path in a folder to a place outside of it; a link to itself leads nowhere."""
    return not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def remember(content: Any) -> None:
    """Admit the foreign specs of content from now on, in later processes of this user too.

    What is written is a keyed digest of each spec and where its modules lie, in `kdnas/begun` below `$XDG_STATE_HOME`
    or `~/.local/state`. Where that cannot be written, this process alone remembers.

    Args:
        content: plain content that was admitted, or that this process made from what its user named.
    """
    for text, names in foreign_specs(content):
        _ADMITTED.add(text)
        record(_BEGUN, key_of(text), json.dumps({name: _place(name) for name in names}))


def foreign_specs(content: Any) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every spec or family in plain content that names foreign code: its canonical text, and the names.

    A spec names its callable, and code in texts among its arguments, such as a teacher's function or a loss.
    """
    if isinstance(content, Mapping):
        arguments = content.get("arguments", {})
        if "make" in content:
            names = [name for name in (content["make"], *_texts(arguments)) if _is_foreign(name)]
            if names:
                text = json.dumps({"make": content["make"], "arguments": arguments}, sort_keys=True)
                yield text, tuple(map(_path, names))
        if _is_foreign(content.get("family")):
            yield json.dumps({"family": content["family"]}), (_path(content["family"]),)
    inner = content.values() if isinstance(content, Mapping) else content if isinstance(content, list | tuple) else ()
    for value in inner:
        yield from foreign_specs(value)


def _texts(value: Any) -> Iterator[str]:
    """The texts in plain content that are not in a spec of their own."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping) and "make" not in value:
        for entry in value.values():
            yield from _texts(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _texts(entry)


def _path(text: str) -> str:
    return text.partition(",")[0]


def _is_foreign(text: object) -> bool:
    """Whether a text has the form of an import path, which may be followed by options, and is none of kdnas's own."""
    return isinstance(text, str) and re.match(r"[^:/\\]+:[^:/\\]", text) is not None and not is_own(_path(text))


@functools.cache
def is_own(path: str) -> bool:
    """Whether an import path is that of an algorithm, a layer or a maker of kdnas; nothing is imported to find out.

    Example:
        >>> is_own("kdnas.losses:SoftTargets"), is_own("kdnas.specs:resolve"), is_own("kdnas.blocks.basic:torch.load")
        (True, False, False)
    """
    module, _, name = path.partition(":")
    package = next((p for p in (*_ALGORITHMS, _BLOCKS, *_MAKERS) if f"{module}.".startswith(f"{p}.")), None)
    if package is None:
        return module == _PRUNERS and name.isidentifier() and name.endswith("Pruner")
    return name in _names(package)


@functools.cache
def _names(package: str) -> frozenset[str]:
    """The names in a package that a file may use."""
    if package in _MAKERS:
        return frozenset(_MAKERS[package])
    if package in _ALGORITHMS:
        return frozenset(path.rpartition(":")[2] for path in algorithms(package).values())
    folder = Path(__file__).parent.joinpath(*package.split(".")[1:])
    texts = [(folder / f"{m.name}.py").read_text(encoding="utf-8") for m in pkgutil.iter_modules([str(folder)])]
    return frozenset(name for text in texts for name in re.findall(r"^class ([A-Z]\w*)", text, re.MULTILINE))


# What this user began.


def _is_known(text: str) -> bool:
    """Whether this spec was remembered, and its modules still lie where they lay.

    A folder of theirs that is no longer searched is searched again, last.
    """
    if text in _ADMITTED:
        return True
    content = recall(_BEGUN, key_of(text))
    try:
        places = json.loads(content or "null")
    except ValueError:
        return False
    if not isinstance(places, dict):
        return False
    for name, place in places.items():
        if _place(name) is None and place:
            sys.path.append(place)
            importlib.invalidate_caches()
        if _place(name) != place:
            return False
    _ADMITTED.add(text)
    return True


def _place(name: str) -> str | None:
    """The folder that the top module of an import path is found in, without importing it; None where it is not."""
    top = name.partition(":")[0].partition(".")[0]
    try:
        module = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if module is None:
        return None
    folders = list(module.submodule_search_locations or ())
    if folders:
        return str(Path(folders[0]).resolve().parent)
    return str(Path(module.origin).resolve().parent) if module.has_location and module.origin else ""
