"""The images of coming steps, decoded and augmented by processes of their own while the device computes."""

import contextlib
import ctypes
import dataclasses
import multiprocessing
import os
import pickle
import signal
import sys
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kdnas.data.augmentation import EVERY
from kdnas.data.base import Data
from kdnas.data.decoded import store
from kdnas.ranks.team import neighbours

_DECODERS: ContextVar[tuple[int | None, int]] = ContextVar("decoders", default=(None, 1))
_MOST = 8  # by default; more rarely help, and each holds batches in memory
_AHEAD = 2  # batches that each process has ready
_DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux's prctl
_START = "fork" if sys.platform.startswith("linux") else None  # as usual elsewhere: the data are copied
_SENT = (ValueError, OSError, MemoryError)


@contextlib.contextmanager
def decoding(number: int | None, beside: int = 1) -> Iterator[None]:
    """Inside, every training has so many processes that decode; None leaves it as it is.

    Args:
        number: of processes.
        beside: number of processes with trainings of their own that share this machine's cores.
    """
    before = _DECODERS.get()
    token = _DECODERS.set((before[0] if number is None else number, before[1] * beside))
    try:
        yield
    finally:
        _DECODERS.reset(token)


def asked() -> int | None:
    """The number that was asked for."""
    return _DECODERS.get()[0]


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def num_decoders(device: torch.device, *, decodes: bool = True) -> int:
    """The number of processes that decode for a training: that of `decoding`, or of the cores that compute nothing.

    Args:
        device: that computes.
        decodes: whether reading an image takes long; where not, none is needed.

    Raises:
        ValueError: some are asked for in a process that may start none.
    """
    (number, beside), is_daemon = _DECODERS.get(), multiprocessing.current_process().daemon
    if number and is_daemon:
        raise ValueError(f"`decoders` must be 0 in a daemon of multiprocessing, which may start none, got {number}.")
    if number is not None:
        return number
    if not decodes or _START != "fork" or is_daemon:  # without a fork each process imports torch and copies the data
        return 0
    busy = torch.get_num_threads() if device.type == "cpu" else 1
    return max(0, min(_MOST, cores() // (beside * neighbours()) - busy))


@final
@dataclass(frozen=True, eq=False)
class Steps(Dataset[Any]):
    """The images of each step of a training: a function of the seed and the step's number alone.

    Attributes:
        data: its train part gives the batches.
        seed: of order and augmentation.
        batch_size: images of a step.
        views: number of fixed views of each image, which take turns by epoch; 0 for another augmentation each step.
        rows: which images of a batch are taken.
    """

    data: Data
    seed: int
    batch_size: int
    views: int = 0
    rows: slice = field(default_factory=lambda: EVERY)

    @property
    def size(self) -> int:
        """Images of a whole batch."""
        return min(self.batch_size, len(self.data.train))

    def indices(self, step: int) -> Tensor:
        """The whole batch's images, by their numbers in the train part."""
        return self.data.indices(self.seed, step, self.batch_size)

    def view(self, step: int) -> int:
        """The view of a step."""
        return step // (len(self.data.train) // self.size) % self.views if self.views else 0

    def pixels(self, step: int) -> Tensor:
        """Augmented images in [0, 1] of the rows that are taken."""
        indices = self.indices(step)
        if self.views:
            return self.data.view(indices[self.rows], self.seed, self.view(step))
        return self.data.pixels(indices, self.seed, step, self.rows)

    def labels(self, step: int) -> Tensor:
        """The labels of the rows that are taken, which follow their images where the task's do."""
        indices = self.indices(step)
        if self.views:
            return self.data.view_labels(indices[self.rows], self.seed, self.view(step))
        return self.data.labels(indices, self.seed, step, self.rows)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.pixels(index)
        except _SENT as error:  # as a value: torch would put its traceback into the message
            return error if type(error).__module__ == "builtins" else ValueError(str(error))


@final
class Feed:
    """The images of one step after the other; those of the next ones are made ready by processes of their own.

    The images are the same for any number of processes, and from whichever step it begins. A copy of this object, as
    other processes get, begins anew.

    Args:
        steps: what the images are.
        end: number of the step before which nothing more is made ready.
        decoders: number of processes; 0 makes the images here, when they are asked for.
        pinned: put them into memory from which a GPU copies while it computes.
    """

    def __init__(self, steps: Steps, end: int, decoders: int, *, pinned: bool = False) -> None:
        self.steps, self.end, self.decoders, self.pinned = steps, end, decoders, pinned
        self._ready: Iterator[Any] | None = None
        self._next = 0

    def __call__(self, step: int) -> Tensor:
        """The images of a step.

        Raises:
            ValueError: an image cannot be read, or a process that decodes was killed.
        """
        if not self.decoders or step >= self.end:
            return self.steps.pixels(step)
        if self._ready is None or step != self._next:
            self.close()
            self._ready = self._begun(step)
        try:
            images = next(self._ready)
        except RuntimeError as error:
            self.close()
            if "exited unexpectedly" not in str(error):
                raise
            raise ValueError(
                f"a process that decodes the images of step {step} was killed, perhaps for memory or for shared memory "
                f"(/dev/shm), got `decoders` {self.decoders}. Give fewer --decoders; the same command goes on."
            ) from error
        self._next = step + 1
        if isinstance(images, Exception):
            self.close()
            raise images
        return images  # type: ignore[no-any-return]

    def taking(self, rows: slice) -> "Feed":
        """The same of other rows; itself where these are its own."""
        if rows == self.steps.rows:
            return self
        return Feed(dataclasses.replace(self.steps, rows=rows), self.end, self.decoders, pinned=self.pinned)

    def close(self) -> None:
        """End the processes."""
        self._ready = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_ready": None}

    def _begun(self, step: int) -> Iterator[Any]:
        """The images from a step on."""
        if store() is not None:  # stored by this process: those that decode only read
            self.steps.data.train.take(self.steps.indices(step)[:1])
        # torch's handler would raise in the midst of whatever runs when a process dies; `next` finds it out as well.
        handler = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
        try:
            with warnings.catch_warnings():
                # Of more processes than cores, which a person asked for; and of forks, by later versions of Python.
                warnings.simplefilter("ignore")
                loader: DataLoader[Any] = DataLoader(
                    self.steps,
                    sampler=range(step, self.end),
                    batch_size=None,
                    num_workers=self.decoders,
                    prefetch_factor=_AHEAD,
                    pin_memory=self.pinned,
                    worker_init_fn=_begin,
                    multiprocessing_context=_START,
                    generator=torch.Generator(),  # else it draws from the global one, as dropout does
                )
                return iter(loader)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(
                f"the data cannot be sent to the processes that decode: {error}. Give --decoders 0, or define what it "
                "names at the top of a module."
            ) from error
        finally:
            with contextlib.suppress(ValueError):  # not in the main thread, where torch sets none
                if handler is not None:
                    signal.signal(signal.SIGCHLD, handler)


def _begin(number: int) -> None:
    """Leave signals to the process that was started by the user, and end with it, however it ends."""
    del number
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in ("SIGTERM", "SIGHUP"):
        signal.signal(getattr(signal, name, signal.SIGTERM), signal.SIG_DFL)
    if sys.platform.startswith("linux"):
        # Else it would hold open what it has inherited, such as connections to other processes, for seconds.
        ctypes.CDLL(None).prctl(_DIES_WITH_PARENT, signal.SIGKILL)
