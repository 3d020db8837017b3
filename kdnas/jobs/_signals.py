"""What ends a command from outside: signals, as Ctrl-C does, memory and the disk."""

import contextlib
import re
import signal
import threading
from collections.abc import Iterator
from typing import Any, NoReturn, final

from kdnas.runs.files import FULL

_GOES_ON = "the same command goes on from the last checkpoint."
_OUT_OF_MEMORY = re.compile("out of memory|not enough memory|can't allocate memory", re.IGNORECASE)


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


def ending(error: BaseException) -> tuple[str, int] | None:
    """What is said of a command that was ended from outside, and its exit code; None for any other error."""
    if isinstance(error, KeyboardInterrupt):
        stop, code = (f" by {error}", 128 + error.number) if isinstance(error, Stopped) else ("", 130)
        return f"stopped{stop}; {_GOES_ON}", code
    if isinstance(error, RecursionError):
        return "something is nested too deeply. Use fewer levels.", 2
    if isinstance(error, OSError):
        return disk_error(error), 2
    if "Symlink loop" in str(error):
        return f"{error}. Remove that link.", 2
    if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error)):
        return "not enough memory. Lower --batch-size or --num-images, or use a smaller space.", 2
    return None


def disk_error(error: OSError) -> str:
    """A sentence on an error of the operating system, with the file where it is known."""
    place = f"{error.filename}: " if error.filename else ""
    advice = "Make room; the same command goes on." if error.errno in FULL else "Check the path and the disk."
    return f"{place}{error.strerror or error}. {advice}"
