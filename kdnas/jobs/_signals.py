"""What ends a command from outside: signals, as Ctrl-C does, and the disk."""

import contextlib
import errno
import signal
import threading
from collections.abc import Iterator
from typing import Any, NoReturn, final

_GOES_ON = "the same command goes on from the last checkpoint."
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@final
class Stopped(KeyboardInterrupt):
    """A signal asked the command to end.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextlib.contextmanager
def stopping() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise `Stopped`, unless they are handled or ignored already."""
    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    numbers = [n for name in names if signal.getsignal(n := getattr(signal, name)) is signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    try:
        for number in numbers:
            signal.signal(number, _stop)
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _stop(number: int, frame: Any) -> NoReturn:
    del frame
    raise Stopped(number)


def ending(stop: KeyboardInterrupt) -> tuple[str, int]:
    """What is said of a command that was stopped, and its exit code."""
    if isinstance(stop, Stopped):
        return f"stopped by {stop}; {_GOES_ON}", 128 + stop.number
    return f"stopped; {_GOES_ON}", 130


def disk_error(error: OSError) -> str:
    """A sentence on an error of the operating system, with the file where it is known."""
    place = f"{error.filename}: " if error.filename else ""
    advice = "Make room; the same command goes on." if error.errno in _FULL else "Check the path and the disk."
    return f"{place}{error.strerror or error}. {advice}"
