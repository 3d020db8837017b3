"""What kdnas remembers between commands, for this user on this machine and outside of every run."""

import contextlib
import functools
import hashlib
import hmac
import os
import secrets
from pathlib import Path

_SECRET = "secret"


def key_of(text: str) -> str:
    """A digest of a text that nobody without this user's key can compute, in hexadecimal."""
    return hmac.new(_secret(_folder(create=True)), text.encode(errors="surrogateescape"), hashlib.sha256).hexdigest()


def recall(kind: str, key: str) -> str | None:
    """The content that was recorded under a key; None where there is none."""
    folder = _folder()
    if folder is None:
        return None
    try:
        return (folder / kind / key).read_bytes().decode(errors="surrogateescape")
    except OSError:
        return None


def record(kind: str, key: str, content: str) -> None:
    """Remember a content under a key of `key_of`; where the folder cannot be written, nothing is remembered."""
    folder = _folder(create=True)
    if folder is None or recall(kind, key) == content:
        return
    with contextlib.suppress(OSError):
        (folder / kind).mkdir(mode=0o700, exist_ok=True)
        _write(folder / kind / key, content.encode(errors="surrogateescape"))


def _folder(*, create: bool = False) -> Path | None:
    """The folder of what is remembered; None where there is none, or others may write to it."""
    base = os.environ.get("XDG_STATE_HOME", "")
    try:
        folder = (Path(base) if Path(base).is_absolute() else Path.home() / ".local" / "state") / "kdnas"
        if create:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not folder.is_dir():
            return None
        status = folder.stat()
    except (RuntimeError, OSError):
        return None
    own = not hasattr(os, "getuid") or (status.st_uid == os.getuid() and not status.st_mode & 0o022)
    return folder if own else None


def _secret(folder: Path | None) -> bytes:
    """This user's key, made when first needed; without a folder one of this process."""
    with contextlib.suppress(OSError):
        if folder is not None:
            path = folder / _SECRET
            if not path.exists():
                _write(path, secrets.token_bytes(32), replace=False)
            return path.read_bytes()
    return _process_secret()


@functools.cache
def _process_secret() -> bytes:
    return secrets.token_bytes(32)


def _write(path: Path, content: bytes, *, replace: bool = True) -> None:
    """Write a file that is whole whenever it is there, with mode 600; by default in place of an earlier one."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as handle:
            handle.write(content)
        with contextlib.suppress(OSError):
            if not replace:
                os.link(draft, path)
                return
        if replace or not path.exists():  # also where the file system has no links
            draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
