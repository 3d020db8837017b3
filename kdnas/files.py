"""Folders that are written whole or not at all, whenever the writer is stopped."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """An empty sibling to fill, which takes the folder's place when the block ends without an error.

    No system call swaps two folders everywhere, so the one in place is set aside first; stopped between the two
    renames, `present` finds it there, and the next `new_folder` goes on from it.
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


def present(folder: str | Path) -> Path:
    """Where the folder's content is: its own place, or aside when a replacement was stopped half-way."""
    folder = Path(folder).resolve()
    aside = _aside(folder)
    return aside if aside.is_dir() and not folder.exists() else folder


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")
