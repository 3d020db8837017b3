"""Commands in processes of their own, whose writing fails, stops or ends at a chosen place.

The places are what a process asks of the file system below a folder: files opened for writing, renamed, removed,
brought to the disk, folders made. They are counted by an audit hook, whoever asks.
"""

import contextlib
import errno
import io
import json
import os
import pickle
import re
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import cloudpickle
import numpy as np
import pytest
import scipy.stats  # noqa: F401 (what a search imports when it runs)
import torch
from safetensors import safe_open

import kdnas.jobs.search
import kdnas.training.driver
from kdnas.cli.commands import main
from kdnas.jobs import _arguments, _board, _contestants, track
from kdnas.jobs import compare as comparing
from kdnas.runs import lock
from kdnas.runs.files import append_lines
from kdnas.students import integers
from tests import toy
from tests.killing import _leave_out_graphs
from tests.processes import CONTEXT

_WRITES = {"os.rename": 2, "os.remove": 1, "os.mkdir": 1, "os.rmdir": 1, "os.link": 2}
"""Audited calls that change a folder, and how many of their arguments are paths."""

Fault = Callable[[int, str], None]

_ASIDE = re.compile(r"(?<=/)\.([^/]+)\.(?:new|old)(?=/|$)")
"""A folder on its way to its place, or from it."""


class Notes:
    """A tracker that is a file."""

    NAME = "notes"

    def __init__(self, place, *_):
        self.path, self.lines = place / self.NAME, []

    def start(self, settings):
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, *line):
        self.lines.append(json.dumps(line))

    def flush(self):
        append_lines(self.path, self.lines)
        self.lines = []

    close = flush


def prepare():
    """Small things in place of large ones, and one time of a step on any machine."""
    _arguments.load_experiment = lambda _: toy.experiment()
    comparing._Comparison.seconds_left = property(lambda _: 9000.0)
    comparing.timed_step = _contestants.timed_step = lambda *_: 1e6
    integers.integers_of = lambda *_: b"integers"
    integers._logits = lambda _, images: np.eye(3)[images.labels.numpy()]
    track._SINKS["tensorboard"] = Notes
    _board._PATIENCE = 0.0


class Outcome(NamedTuple):
    """How a command ended: its exit code, or the negative number of a signal; what it printed; its places."""

    code: int
    out: str
    err: str
    places: list[str]


def command(
    arguments: Sequence[str],
    folder: Path,
    fault: Fault | None = None,
    before: Callable[[], None] | None = None,
) -> Outcome:
    """Run a command in another process, whose working folder is `folder`.

    Args:
        arguments: of the command line.
        folder: below which places are counted.
        fault: called at each place with its number and its words, such as `open run.json`.
        before: called in that process before the command.
    """
    with started(arguments, folder, fault, before) as (process, reader):
        return outcome(process, reader)


@contextlib.contextmanager
def started(
    arguments: Sequence[str],
    folder: Path,
    fault: Fault | None = None,
    before: Callable[[], None] | None = None,
) -> Iterator[tuple[BaseProcess, Connection]]:
    """The process of a `command`, and where its outcome is read from; it ends with the block."""
    reader, writer = CONTEXT.Pipe(duplex=False)
    work = cloudpickle.dumps((list(arguments), str(folder), fault, before, dict(os.environ)))
    process = CONTEXT.Process(target=_run, args=(work, writer), daemon=True)
    process.start()
    writer.close()
    try:
        yield process, reader
    finally:
        process.kill()
        process.join()
        reader.close()


def outcome(process: BaseProcess, reader: Connection) -> Outcome:
    """Wait for the end of a command."""
    try:
        result = pickle.loads(reader.recv_bytes())
    except EOFError:
        process.join()
        return Outcome(process.exitcode, "", "", [])
    process.join()
    return result


def _run(work: bytes, writer: Connection) -> None:
    torch.set_num_threads(1)
    arguments, folder, fault, before, environment = pickle.loads(work)
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = ["kdnas", *arguments]
    kdnas.training.driver.CHECKPOINT_SECONDS = kdnas.jobs.search.FLUSH_SECONDS = 1e-9
    _leave_out_graphs(pytest.MonkeyPatch())
    if before is not None:
        before()
    places: list[str] = []
    _watch(os.path.realpath(folder), places, fault)
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(arguments)
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
            code = 1
    writer.send_bytes(pickle.dumps(Outcome(code, out.getvalue(), err.getvalue(), places)))
    writer.close()
    os._exit(0)


def _watch(folder: str, places: list[str], fault: Fault | None) -> None:
    """Note every place below a folder, and call the fault there."""

    def note(event: str, paths: list[str]) -> None:
        paths = [str(Path.cwd() / path) for path in paths]
        if any(f"{path}/".startswith(f"{folder}/") for path in paths):
            if not all(lock.is_locked(Path(_ASIDE.sub(r"\1", path))) for path in paths):
                event = f"unlocked {event}"
            places.append(f"{event} {' '.join(os.path.relpath(path, folder) for path in paths)}")
            if fault is not None:
                fault(len(places), places[-1])

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        paths: list[Any] = []
        if event == "open":
            path, _, flags = arguments
            is_write = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            paths = [path] if is_write else []
        elif event in _WRITES and not any(isinstance(a, int) and a >= 0 for a in arguments[1:]):  # no open folder
            paths = list(arguments[: _WRITES[event]])
        if paths:
            note(event, [os.fsdecode(path) for path in paths if not isinstance(path, int)])

    sync = os.fsync

    def noted_sync(number: int) -> None:
        note("os.fsync", [str(Path(f"/proc/self/fd/{number}").readlink())])
        sync(number)

    os.fsync = noted_sync
    sys.addaudithook(hook)


def kill(at: int) -> Fault:
    """Die at a place."""

    def fault(number: int, place: str) -> None:
        if number == at:
            os.kill(os.getpid(), signal.SIGKILL)

    return fault


def stop(at: int, number_of: int = signal.SIGTERM) -> Fault:
    """Be asked to end at a place."""

    def fault(number: int, place: str) -> None:
        if number == at:
            os.kill(os.getpid(), number_of)

    return fault


def full(at: int) -> Fault:
    """From a place on, no byte can be written to any file, by the system's own bound on their size."""

    def fault(number: int, place: str) -> None:
        if number == at:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    return fault


def refusing(at: int, number_of: int = errno.EROFS) -> Fault:
    """From a place on, every call fails with an error of the operating system."""

    def fault(number: int, place: str) -> None:
        if number >= at:
            raise OSError(number_of, os.strerror(number_of), place.split(" ")[-1])

    return fault


_TIMES = {"seconds", "created", "saved", "milliseconds", "checksum"}


def differences(one: Path, other: Path) -> list[str]:
    """What the files below two folders say differently, apart from how long it took and when it was."""
    mine, theirs = (dict(_values(folder)) for folder in (one, other))
    names = [name for name in {**mine, **theirs} if mine.get(name, "") != theirs.get(name, "")]
    return [f"{name}: {mine.get(name)!s:.80} and {theirs.get(name)!s:.80}" for name in names]


def _values(folder: Path) -> Iterator[tuple[str, Any]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield from _leaves(_content(path), str(path.relative_to(folder)))


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        yield name, value
    for key, inner in value.items() if isinstance(value, dict) else ():
        if key not in _TIMES:
            yield from _leaves(inner, f"{name} {key}")


def _content(path: Path) -> Any:
    if path.suffix == ".json":
        return json.loads(path.read_bytes())
    if path.suffix == ".jsonl":
        *lines, torn = path.read_bytes().split(b"\n")
        return [*map(json.loads, lines), torn]
    if path.name == Notes.NAME:  # after a kill, lines that were not noted yet come again
        return sorted(set(path.read_text().splitlines()))
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name).numpy().tobytes() for name in file.keys()}
    if path.suffix == ".md":
        return re.sub(r"\S+ \(\d+\)", "", path.read_text())
    return {".html": "a page", ".db": "a database"}.get(path.suffix) or path.read_bytes()


def check_synced(places: Sequence[str]) -> None:
    """What takes a place by being renamed is on the disk before, and its name after."""
    for number, place in enumerate(places):
        event, *paths = place.removeprefix("unlocked ").split(" ")
        if event == "os.rename" and not paths[1].endswith((".old", ".lock")):
            before, after = (
                [other.removeprefix("unlocked ") for other in part] for part in (places[:number], places[number:])
            )
            assert f"os.fsync {paths[0]}" in before, place
            assert f"os.fsync {Path(paths[1]).parent}" in after, place


def remains(folder: Path) -> list[str]:
    """Names below a folder that no finished command leaves: drafts, folders half-way, locks."""
    ends = (".draft", ".new", ".old", ".lock", ".over")
    return [
        str(path.relative_to(folder))
        for path in folder.rglob(".*")
        if path.name.endswith(ends) or ".lock." in path.name
    ]
