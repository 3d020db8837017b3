"""Signs of life: a process that is frozen, or whose machine has vanished, closes no connection."""

import contextlib
import threading
from collections.abc import Callable
from typing import Any, final

BEAT = 1.0
"""Seconds between two signs of life."""
SILENCE = 30
"""Beats after which a process is taken for lost."""
_NEARLY = 5  # beats by which one process notices a silence before another


@final
class Pulse:
    """Gives a sign of life at every beat, and listens to those of the others, until a process is silent.

    The clock is this process's own beats: while all are stopped, or the machine sleeps, none goes by. Signs are
    exchanged in one thread and beats counted in another, as a store that a silent process keeps does not answer.

    Args:
        rank: number of this process.
        size: number of processes.
        store: of `torch.distributed`, for this object alone.
        lose: called once, in a thread, when a process is silent.
    """

    def __init__(self, rank: int, size: int, store: Any, lose: Callable[[], None]) -> None:
        self._rank, self._store, self._lose = rank, store, lose
        self._beats, self._over = 0, threading.Event()
        self._heard = {other: 0 for other in range(size) if other != rank}  # at which beat
        threading.Thread(target=self._exchange, daemon=True).start()
        self._watching = threading.Thread(target=self._watch, daemon=True)
        self._watching.start()

    def silent(self, beats: int | None = None) -> list[int]:
        """The numbers of the processes of which nothing was heard for so many beats; by default about `SILENCE`."""
        least = SILENCE - _NEARLY if beats is None else beats
        return [other for other, beat in self._heard.items() if self._beats - beat >= least]

    def stop(self) -> None:
        """Give and expect no more signs."""
        self._over.set()
        self._watching.join()

    def _watch(self) -> None:
        while not self._over.wait(BEAT):
            self._beats += 1
            if self.silent(SILENCE):
                self._lose()
                return

    def _exchange(self) -> None:
        signs: dict[int, bytes] = {}
        with contextlib.suppress(RuntimeError):  # whoever kept the store has ended
            while True:
                self._store.set(f"{self._rank}", f"{self._beats}")
                for other, sign in zip(self._heard, self._store.multi_get([*map(str, self._heard)]), strict=True):
                    if signs.get(other) != sign:
                        signs[other], self._heard[other] = sign, self._beats
                if self._over.wait(BEAT):
                    return
