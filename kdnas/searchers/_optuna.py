"""Optuna's log, which all threads of a process share."""

import contextlib
import threading
from collections.abc import Iterator

import optuna

_lock = threading.Lock()
_levels: list[int] = []  # one for each `quiet` that is open; the first is the level from outside


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, Optuna logs errors only; as before once no thread is inside any more, in whatever order they leave."""
    with _lock:
        _levels.append(optuna.logging.get_verbosity())
        optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        with _lock:
            level = _levels.pop()
            if not _levels:
                optuna.logging.set_verbosity(level)
