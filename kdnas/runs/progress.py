"""Progress with time left: a bar on a terminal, log messages elsewhere."""

import contextlib
import importlib.util
import logging
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from rich.progress import Progress

_QUIET = 10.0  # seconds between messages
_log = logging.getLogger(__name__)


@final
class Bar:
    """One long job's progress."""

    def __init__(self, name: str, total: int, done: int, progress: "Progress | None") -> None:
        self._name, self._total, self._first, self._progress = name, total, done, progress
        self._began = self._logged = time.perf_counter()
        self._task = None if progress is None else progress.add_task(name, total=total, completed=done, note="")
        if progress is None:
            self._report(done, "")

    def update(self, done: int, note: str = "") -> None:
        """So many of the total are done."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done, note=note)
        elif done >= self._total or time.perf_counter() - self._logged >= _QUIET:
            self._report(done, note)

    def _report(self, done: int, note: str) -> None:
        self._logged = time.perf_counter()
        spent = self._logged - self._began
        left = spent / max(1, done - self._first) * (self._total - done)
        times = f"{spent:.0f} s, about {left:.0f} s left" if self._first < done < self._total else f"{spent:.0f} s"
        _log.info("%s", f"{self._name}: {done}/{self._total} ({times}) {note}".rstrip())


def _is_notebook() -> bool:
    """Whether this is the kernel of a notebook that can show what changes."""
    return "ipykernel" in sys.modules and importlib.util.find_spec("ipywidgets") is not None


@contextlib.contextmanager
def progress(name: str, total: int, done: int = 0) -> Iterator[Bar]:
    """A bar for one job on a terminal or in a notebook, unless the logger `kdnas` is silenced; log messages elsewhere.

    A notebook needs `ipywidgets` for it.

    Args:
        name: of the job.
        total: number of steps.
        done: steps that an earlier call has taken.
    """
    notebook = _is_notebook()
    if not ((notebook or sys.stderr.isatty()) and _log.isEnabledFor(logging.INFO)):
        yield Bar(name, total, done, None)
        return
    from rich.console import Console  # slow to import
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=not notebook, force_jupyter=notebook)) as bars:
        yield Bar(name, total, done, bars)
