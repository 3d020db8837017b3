"""One writing command per run: a lock file that names the process which writes."""

import atexit
import contextlib
import errno
import json
import os
import secrets
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

LOCK = ".lock"
_MARKS = ("run.json", "compare.json")
"""A folder with one of these files has its lock inside; any other path has it beside."""
_LEVELS = 5
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV)

Record = dict[str, Any]


class Busy(ValueError):
    """Another process is writing there."""


Process = tuple[str, str, int, str]

_companions: set[Process] = set()
"""Processes whose locks this one shares, though it was not started by them."""
_lost: set[Process] = set()
"""Processes of other machines that are known to have ended."""
_mutex = threading.RLock()
_locks: dict[Path, str] = {}
"""The lock files of this process, with the id in each."""
_depth = 0


@contextlib.contextmanager
def command() -> Iterator[None]:
    """One command: what `hold` locks inside is released at the end of the outermost."""
    global _depth
    with _mutex:
        _depth += 1
    try:
        yield
    finally:
        with _mutex:
            _depth -= 1
            if not _depth:
                _release_all()


def hold(path: str | Path, *, inside: bool = False) -> bool:
    """Lock the run around a path, or the path itself, for the rest of the command.

    A run and a comparison are locked as a whole, by a file `.lock` in them; any other path by a file beside it. This
    process and those that it started share a lock. The lock of a process that has ended is taken over; whether one on
    another machine has ended cannot be known here, see `believe`. The file is made by a hard link, which is atomic on
    network file systems too. Outside of a `command` nothing is kept: then it only says who else writes there.

    Args:
        path: what is to be written.
        inside: it is a new folder to be locked as a whole, and made; against commands that would put a folder in its
            place it is locked from beside too.

    Returns:
        Whether it is locked now and was not before.

    Raises:
        Busy: another process has the lock; the message says which.
    """
    place = Path(path).absolute()
    if inside:
        place.parent.mkdir(parents=True, exist_ok=True)
        if os.access(place.parent, os.W_OK):  # where it is not, no command can put a folder in this one's place
            _hold(_beside(place))
        return _hold(place.resolve() / LOCK)
    return _hold(_lock_of(place))


def _hold(lock: Path) -> bool:
    with _mutex:
        if lock in _locks:
            return False
        lock.parent.mkdir(parents=True, exist_ok=True)
        record = own_record()
        _locks[lock] = record["id"]  # before it is, so that an interruption leaves no file
        is_own = False
        try:
            _draft_of(lock, record["id"]).write_text(json.dumps(record), encoding="utf-8")
            is_own = _claim(lock, _draft_of(lock, record["id"]), record)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(lock)) from error
        finally:
            if not is_own or not _depth:
                _release(lock)
        if not is_own or not _depth:
            return False
        _draft_of(lock, record["id"]).unlink(missing_ok=True)
        for left in lock.parent.glob(f"{lock.name}.*"):  # of processes that were killed within this function
            if (owner := _read(left)) and not _is_alive(owner):
                left.unlink(missing_ok=True)
        return True


def _draft_of(lock: Path, number: str) -> Path:
    return lock.with_name(f"{lock.name}.{number}")


@atexit.register
def _release_all() -> None:
    """Release every lock of this process, however often it is interrupted meanwhile."""
    interruption = None
    while _locks:
        try:
            _release(next(iter(_locks)))
        except KeyboardInterrupt as error:
            interruption = error
    if interruption is not None:
        raise interruption


def _release(lock: Path) -> None:
    """Remove a lock of this process and what it left beside it; no file of a copy of this process, nor of another."""
    number = _locks[lock]
    with contextlib.suppress(OSError):  # on a disk that fails the lock of a process that has ended stays
        for path in (lock, *lock.parent.glob(f"{lock.name}.*")):
            owner = _read(path)
            if owner.get("id") == number and owner["pid"] == os.getpid():
                path.unlink(missing_ok=True)
        _draft_of(lock, number).unlink(missing_ok=True)
    _locks.pop(lock, None)


def is_locked(path: Path) -> bool:
    """Whether this process has locked the path, or a folder around it."""
    with _mutex:
        folders = (path.absolute(), *path.absolute().parents[:_LEVELS]) if _locks else ()
        return any(lock in _locks for folder in folders for lock in (folder.resolve() / LOCK, _beside(folder)))


def is_running(pid: int) -> bool:
    """Whether a process of this machine has this number."""
    return bool(_started(pid)) or _is_hidden(pid)


def is_lock(name: str) -> bool:
    """Whether a file of a run is its lock."""
    return name == LOCK or name.startswith(f"{LOCK}.")


def is_locked_by(folder: Path, record: Any) -> bool:
    """Whether the process of a record has locked the run or the comparison in a folder."""
    owner = _read(folder.resolve() / LOCK)
    return bool(owner) and _is_record(record) and _process(owner) == _process(record)


def accompany(record: Record) -> None:
    """Share the locks of another process, which knows what this one writes."""
    _companions.add(_process(record))


def believe(record: Any, *, ended: bool) -> None:
    """Take over the locks of a process on another machine that is known to have ended, or leave them again."""
    if _is_record(record):
        (_lost.add if ended else _lost.discard)(_process(record))


def has_ended(record: Any) -> bool:
    """Whether the process of a record has ended, as far as this machine knows; False for those of other machines."""
    return _is_record(record) and not _is_alive(record)


def _lock_of(path: Path) -> Path:
    for folder in (path, *path.parents[:_LEVELS]):
        if any((folder / name).is_file() for name in _MARKS):
            return folder.resolve() / LOCK
        if os.path.lexists(_beside(folder)):  # somebody may put another folder in its place
            return _beside(folder)
    return _beside(path)


def _beside(path: Path) -> Path:
    return path.parent.resolve() / f".{path.name}{LOCK}"


def _claim(lock: Path, draft: Path, record: Record) -> bool:
    """Put the draft in the lock's place; False where a process has the lock that started this one.

    A dead lock is replaced by whoever first makes the file that bears its id: so one of several claimants does, and
    none removes the lock of another.
    """
    while True:
        if _linked(draft, lock):
            return True
        other = _read(lock)
        if not other:
            if os.path.lexists(lock):
                raise Busy(f"{lock} is no lock of kdnas. Where no other command writes there, remove it.")
            continue
        if _is_alive(other):
            if _process(other) in _companions or (_is_near(other) and other["pid"] in _ancestors()):
                return False
            raise Busy(_words(lock, other))
        token = lock.with_name(f"{lock.name}.{other['id']}.over")
        _claim(token, draft, record)
        if _read(lock).get("id") == other["id"]:
            token.replace(lock)
            return True
        token.unlink(missing_ok=True)


def _linked(draft: Path, lock: Path) -> bool:
    """Make the lock, whole and only where there is none."""
    try:
        os.link(draft, lock)
        return True
    except FileExistsError:
        # On a network file system the answer to a link that was made can get lost.
        return draft.stat().st_nlink == 2 and draft.samefile(lock)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
    try:
        with lock.open("x", encoding="utf-8") as handle:
            handle.write(draft.read_text(encoding="utf-8"))
        return True
    except FileExistsError:
        return False


def _read(lock: Path) -> Record:
    """The record in a lock file; empty where there is none."""
    try:
        if not stat.S_ISREG(lock.lstat().st_mode):  # a pipe would block, a link leads elsewhere
            return {}
        record = json.loads(lock.read_bytes()[:10_000])
    except (OSError, ValueError, RecursionError):
        return {}
    return record if _is_record(record) else {}


def _is_record(value: Any) -> bool:
    kinds = {"host": str, "machine": str, "pid": int, "started": str, "since": str, "command": str, "id": str}
    is_whole = isinstance(value, dict) and all(isinstance(value.get(key), kind) for key, kind in kinds.items())
    return is_whole and value["id"].isalnum() and value["pid"] > 0


def own_record() -> Record:
    """What a lock says of its process: host, process number, start time, command."""
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "since": datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:2]]),
        "id": secrets.token_hex(8),
    }


def _process(record: Record) -> Process:
    return record["host"], record["machine"], record["pid"], record["started"]


def _machine() -> str:
    """The machine and, of its namespaces of process numbers, this process's: elsewhere the numbers mean others."""
    parts = []
    with contextlib.suppress(OSError):
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    with contextlib.suppress(OSError):
        parts.append(Path("/etc/machine-id").read_text(encoding="utf-8").strip())
    return " ".join(parts)


def _is_near(other: Record) -> bool:
    """Whether the process is of this machine, so that its number can be looked up."""
    return other["host"] == socket.gethostname() and other["machine"] == _machine()


def _is_alive(other: Record) -> bool:
    if not _is_near(other):
        return _process(other) not in _lost
    started = _started(other["pid"])
    return (other["started"] != "" and started == other["started"]) or (not started and _is_hidden(other["pid"]))


def _is_hidden(pid: int) -> bool:
    """Whether a process of another user has this number, of which the system shows nothing else."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except OSError:
        return False
    return False


def _started(pid: int) -> str:
    """When a process began, in words that no later one of its number has; empty where it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return "" if fields[0] in "ZX" else f"{boot} {fields[19]}"
    except OSError:
        if Path("/proc/self/stat").exists():
            return ""
    command = ["ps", "-o", "lstart=", "-p", str(pid)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _ancestors() -> Iterator[int]:
    """The processes that started this one, and the process itself."""
    yield os.getpid()
    pid = os.getppid()
    while pid > 0:
        yield pid
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return
        pid = int(stat.rpartition(")")[2].split()[1])


def _words(lock: Path, other: Record) -> str:
    place = lock.parent if lock.name == LOCK else lock.with_name(lock.name[1:].removesuffix(LOCK))
    texts = {
        name: "".join(c for c in str(other[name]) if c.isprintable())[:60] for name in ("command", "host", "since")
    }
    remedy = "wait until it ends, or stop it"
    if not _is_near(other):
        remedy += f". Where it runs no more, which cannot be seen from {socket.gethostname()}, remove {lock}"
    return (
        f"{place} is being written by `{texts['command']}` (process {other['pid']} on {texts['host']}, since "
        f"{texts['since']}): {remedy}."
    )
