"""Files and folders that are written whole or not at all, whenever the writer is stopped."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def write_atomically(path: Path, write: Any) -> None:
    """Call `write(draft)` on a neighbouring file, then move it into place."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        write(draft)
        with draft.open("rb+") as handle:
            os.fsync(handle.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def remove_drafts(path: Path) -> None:
    """Remove the drafts that kills during `write_atomically` left beside a file; nobody may be writing it."""
    for draft in path.parent.glob(f".{path.name}.*.draft"):
        draft.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    text = json.dumps(value, indent=2) + "\n"
    write_atomically(path, lambda draft: draft.write_text(text))


@contextlib.contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """An empty sibling to fill, which takes the folder's place when the block ends without an error.

    No system call swaps two folders everywhere, so the one in place is set aside first; stopped between the two
    renames, `current_folder` finds it there, and the next `new_folder` starts from it.
    """
    folder = Path(folder).resolve()
    new, aside = folder.with_name(f".{folder.name}.new"), _aside(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if aside.is_dir() and not folder.exists():
        aside.rename(folder)
    for left in (new, aside):
        if left.is_dir():
            shutil.rmtree(left)
    new.mkdir()
    try:
        yield new
        if folder.exists():
            folder.rename(aside)
        new.rename(folder)
    except BaseException:
        if aside.is_dir() and not folder.exists():
            aside.rename(folder)
        shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def current_folder(folder: str | Path) -> Path:
    """Where the folder's content is: its own place, or aside when a replacement was stopped half-way."""
    folder = Path(folder).resolve()
    aside = _aside(folder)
    return aside if aside.is_dir() and not folder.exists() else folder


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")
