"""Files and folders: written whole or not at all, and read whole or refused in one sentence."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, final

from kdnas.plain import printable_content
from kdnas.runs.lock import hold, is_locked, is_running
from kdnas.runs.schema import mismatch

FORMAT = 2
"""The version of every file that is written; older ones, and files without a version, are read."""
CHECKSUM = "checksum"
MOST_DEPTH = 64
_ANOTHER = "its checksum is another than when it was written"
_MOST_BYTES = 2**28
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of a disk, a quota or a file that is full."""
_OLD = 600.0  # seconds
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES)


@final
class Damaged(ValueError):
    """A file does not hold what was written to it.

    Args:
        path: of the file.
        reason: what is wrong with it, after "it".
        advice: what to do about it, a sentence.
    """

    def __init__(self, path: str | Path, reason: str, advice: str) -> None:
        self.reason = plain(reason.removesuffix("."))
        subject = self.reason if reason.startswith("its ") else f"it {self.reason}"
        super().__init__(f"{plain(str(path), 200)} is damaged: {subject}. {advice}")


@final
class Fields(dict[str, Any]):
    """An object of a file; to ask for a key that it lacks is to find the file damaged.

    Args:
        values: the object.
        path: of the file.
        place: keys that lead to the object.
        advice: what to do about a damaged file.
    """

    def __init__(self, values: Any, path: str | Path = "", place: str = "", advice: str = "") -> None:
        super().__init__(values)
        self._origin = path, place, advice

    def __missing__(self, key: str) -> Any:
        path, place, advice = self._origin
        raise Damaged(path, f"has no {f'{place}.{key}'!r}", advice)


def plain(text: str, most: int = 160) -> str:
    """Text of a file or a library for a message: printable, on one line, shortened in the middle."""
    text = "".join(c if c.isprintable() else " " if c.isspace() else ascii(c)[1:-1] for c in text)
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-most // 2 + 1 :]}"


def checksum(value: Mapping[str, Any]) -> str:
    """Of the values of a JSON object in their order, but for its key `checksum`."""
    content = {key: entry for key, entry in value.items() if key != CHECKSUM}
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=8).hexdigest()


def signed(value: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object as it is written, alone in a file or as a line: with its format and its checksum."""
    content = {"format": FORMAT, **{key: entry for key, entry in value.items() if key != "format"}}
    return {**content, CHECKSUM: checksum(content)}


def parse_json(
    content: bytes, path: str | Path, advice: str, depth: int = MOST_DEPTH, *, is_signed: bool = False
) -> Any:
    """The value of a JSON text; control characters in its texts become escapes, see `kdnas.plain.printable`.

    Args:
        content: the text in UTF-8.
        path: of its file, for the message.
        advice: what to do about a damaged file.
        depth: how deep objects and lists may be nested.
        is_signed: an object of kdnas's own, whose checksum is compared and left out; those of older formats have none.

    Raises:
        Damaged: it is no JSON, nested deeper, or has another content than when it was written.
    """
    try:
        text = content.decode("utf-8")
        value = json.loads(text)
    except RecursionError:
        raise Damaged(path, f"is nested more than {depth} deep", advice) from None
    except ValueError as error:
        raise Damaged(path, f"cannot be read ({error})", advice) from error
    if text.count("[") + text.count("{") > depth and _depth(value) > depth:
        raise Damaged(path, f"is nested more than {depth} deep", advice)
    if is_signed and isinstance(value, dict):
        _compare(value, path, advice)
    # Without escapes, a JSON text is as printable as its strings, apart from its own line ends.
    return value if text.isascii() and "\\" not in text and "\x7f" not in text else printable_content(value)


def read_json(path: Path, kind: Any, advice: str, *, is_signed: bool = True) -> Any:
    """The value of a JSON file, of the types that an annotation names.

    Args:
        path: of the file.
        kind: see `kdnas.runs.schema.mismatch`.
        advice: what to do about a damaged file, a sentence.
        is_signed: see `parse_json`; False for a file of other people's.

    Raises:
        Damaged: it is no regular file, too large, no JSON, of other types, or not what was written.
        ValueError: a newer version of kdnas wrote it.
    """
    value = parse_json(read_bytes(path, advice, _MOST_BYTES), path, advice, is_signed=is_signed)
    if isinstance(value, dict):
        check_format(value.get("format", 0), path, advice)
    reason = mismatch(value, kind)
    if reason:
        raise Damaged(path, reason, advice)
    return value


def read_bytes(path: Path, advice: str, most: float = float("inf")) -> bytes:
    """The content of a regular file of at most so many bytes; nothing else, such as a pipe, is opened.

    Raises:
        Damaged: it is no such file.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise Damaged(path, "is no regular file", advice)
    if status.st_size > most:
        raise Damaged(path, f"has {status.st_size:,} bytes, more than {most:,.0f}", advice)
    return path.read_bytes()


def check_format(number: Any, path: str | Path, advice: str) -> None:
    """Refuse a file of a later format than this version writes.

    Raises:
        Damaged: the format is no whole number.
        ValueError: a newer version of kdnas wrote the file.
    """
    if mismatch(number, int) or number < 0:
        raise Damaged(path, f"its 'format' must be a whole number of at least 0, got {number!r}", advice)
    if number > FORMAT:
        raise ValueError(
            f"{plain(str(path), 200)} has format {plain(str(number), 20)}, and kdnas {version('kdnas')} reads formats "
            f"up to {FORMAT}: a newer version wrote it. Update kdnas."
        )


def _compare(value: dict[str, Any], path: str | Path, advice: str) -> None:
    """Take out an object's checksum and compare it; what has neither format nor checksum is from before there were any.

    Format 1 has checksums in rows of latency alone, which are compared where they are read. A later format than this
    version's may have others; `check_format` refuses it.
    """
    number = value.get("format", 0)
    is_signed = not mismatch(number, int) and 1 < number <= FORMAT
    if not is_signed and (number != 0 or CHECKSUM not in value):
        return
    if CHECKSUM not in value:
        raise Damaged(path, f"has no {CHECKSUM!r}", advice)
    if value.pop(CHECKSUM) != checksum(value):
        raise Damaged(path, f"{_ANOTHER} (of a file that you edited, set 'format' to 1)", advice)


def _depth(value: Any) -> int:
    level, depth = [value], 0
    while level := [v for v in level if isinstance(v, dict | list)]:
        depth += 1
        level = [inner for v in level for inner in (v.values() if isinstance(v, dict) else v)]
    return depth


@contextlib.contextmanager
def naming(path: Path, draft: Path | None = None) -> Iterator[None]:
    """Inside, an error of the operating system that names no file, or only the draft of this one, gets its name.

    Writing to a full disk, unlike opening a file, fails without a name.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or (error.filename is not None and str(error.filename) != str(draft)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_bytes(path: Path, *parts: bytes | memoryview) -> None:
    """Write a new file; for one that must appear whole, see `write_atomically`."""
    with naming(path), path.open("wb") as handle:
        for part in parts:
            handle.write(part)


def write_text(path: Path, text: str) -> None:
    """Write a new file in UTF-8; see `write_bytes`."""
    write_bytes(path, text.encode())


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Call `write(draft)` on a neighbouring file, then move it into place; it is on the disk when this returns.

    Drafts that killed processes left are removed: all of them where this command has the lock, else those that no
    process of another machine can be writing still.
    """
    for left in drafts_beside(path):
        with contextlib.suppress(OSError):
            if not is_running(int(left.suffixes[-2][1:])) and (
                is_locked(path) or time.time() - left.stat().st_mtime > _OLD
            ):
                left.unlink()
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        with naming(path, draft):
            write(draft)
            _sync(draft)
            draft.replace(path)
            _sync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def append_lines(path: Path, lines: Iterable[str], *, sync: bool = True) -> None:
    """Add whole lines to a file; those of a write that fails are taken back.

    Args:
        path: of the file, which is created where there is none.
        lines: without line ends.
        sync: wait until they are on the disk.
    """
    content = memoryview("".join(f"{line}\n" for line in lines).encode())
    with naming(path), path.open("ab", buffering=0) as handle:
        before = handle.tell()
        try:
            while content:
                content = content[handle.write(content) :]
            if sync:
                os.fsync(handle.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(handle.fileno(), before)
            raise


def _sync(path: Path) -> None:
    """Wait until a file's or a folder's content is on the disk."""
    is_folder = path.is_dir()
    if is_folder and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not is_folder or error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


def remove_drafts(path: Path) -> None:
    """Remove the drafts that kills during `write_atomically` left beside a file; nobody may be writing it."""
    for draft in drafts_beside(path):
        draft.unlink(missing_ok=True)


def drafts_beside(path: Path) -> list[Path]:
    """The drafts of a file that are there."""
    own = re.compile(rf"\.{re.escape(path.name)}\.\d+\.draft")
    return [draft for draft in path.parent.glob(".*.draft") if own.fullmatch(draft.name)]


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object with its `format` and its checksum atomically."""
    text = json.dumps(signed(value), indent=2) + "\n"
    write_atomically(path, lambda draft: write_text(draft, text))


@contextlib.contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """An empty sibling to fill, which takes the folder's place when the block ends without an error.

    No system call swaps two folders everywhere, so the one in place is set aside first; stopped between the two
    renames, `current_folder` finds it there, and the next `new_folder` starts from it.

    Raises:
        ValueError: another process writes there; see `kdnas.runs.lock.hold`.
    """
    hold(folder)
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
        with naming(folder):
            yield new
            for path in (*new.rglob("*"), new):
                _sync(path)
        if folder.exists():
            folder.rename(aside)
        new.rename(folder)
        _sync(folder.parent)
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
