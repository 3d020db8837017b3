"""Processes that train or score networks of a run side by side, on one thread or device each; the parent records."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TextIO, final

import torch

from kdnas.data.decoded import store
from kdnas.data.feeding import asked
from kdnas.jobs._memory import IN_MEMORY
from kdnas.jobs._run import Run
from kdnas.network import default_device
from kdnas.ranks.team import number
from kdnas.runs.lock import command, hold
from kdnas.values import WorkerCount, check_value

_TRIES = 2  # of a request whose worker is killed
_QUIET = 0.5  # seconds between a worker's messages of its progress
_START = "from kdnas.jobs._workers import serve; serve()"

Message = dict[str, Any]


def default_workers(run: Run) -> int:
    """How many trainings of a run go side by side: one per device, or per thread that torch would use on a CPU.

    One where the processes of `torchrun` share every training, and where the run's teacher or data are objects of this
    process, which no other process has.
    """
    device = default_device()
    if number() > 1 or IN_MEMORY in json.dumps(run.storage.manifest["job"]):
        return 1
    if device.type == "cpu":
        return torch.get_num_threads()
    return torch.cuda.device_count() if device.type == "cuda" and device.index is None else 1


def check_workers(run: Run, count: int | None) -> int:
    """The number of workers asked for, or the default.

    Raises:
        ValueError: several, where the run's teacher or data are objects of this process; or too many.
    """
    check_value("workers", count, WorkerCount | None)
    if count is not None and count > 1 and IN_MEMORY in json.dumps(run.storage.manifest["job"]):
        raise ValueError(
            f"`workers` must be 1 where the teacher or the data are objects of this process, got {count}. Drop it, or "
            "give them by name."
        )
    return count or default_workers(run)


@final
@dataclass
class Workers:
    """Up to `count` processes that answer requests; they end with the block, and with this process, however it ends.

    A worker reads lines of JSON from its standard input and ends where that is closed. What it tells is acknowledged
    line by line, so that it saves no state whose rows this process has not recorded.

    Attributes:
        run: the run; each worker opens it for itself.
        count: of processes at a time; they are started when there is work for them.
    """

    run: Run
    count: int
    _idle: "queue.SimpleQueue[_Worker]" = field(default_factory=queue.SimpleQueue, init=False)
    _started: list["_Worker"] = field(default_factory=list, init=False)
    _stack: ExitStack = field(default_factory=ExitStack, init=False)
    _mutex: threading.Lock = field(default_factory=threading.Lock, init=False)
    _ended: bool = field(default=False, init=False)
    _device: torch.device = field(default_factory=default_device, init=False)  # threads do not know it
    _decoders: int | None = field(default_factory=asked, init=False)
    _decoded: Path | None = field(default_factory=store, init=False)

    def __enter__(self) -> Self:
        if self.count > 1:
            self._stack.enter_context(command())
            hold(self.run.folder)  # the processes that it starts share this lock
        return self

    def __exit__(self, *error: object) -> None:
        self._end()
        for worker in self._started:
            worker.close()
        self._stack.close()

    @property
    def is_apart(self) -> bool:
        """See `Answers`: this process started them."""
        return False

    def answers(self, requests: Sequence[Message], tell: Callable[[Message], None]) -> list[Message]:
        """The last message of every request, in their order.

        Args:
            requests: what `Trainings` or `SideBySide` asks of a worker; `kind` says which, `name` what it is about.
            tell: receives every other message, one at a time.

        Raises:
            ValueError: a worker says so, or was killed twice.
        """
        with ThreadPoolExecutor(self.count) as threads:
            try:
                return list(threads.map(lambda request: self._answer(request, tell), requests))
            except BaseException:
                self._end()  # threads that wait for an answer go on to the end of the file
                threads.shutdown(cancel_futures=True)
                raise

    def _answer(self, request: Message, tell: Callable[[Message], None]) -> Message:
        for _ in range(_TRIES):
            worker = self._free()
            for message in worker.conversation(request):
                if "end" in message or "refusal" in message:
                    self._idle.put(worker)
                    if "refusal" in message:
                        raise ValueError(message["refusal"])
                    return message
                if "error" in message:
                    raise RuntimeError(f"a worker failed:\n{message['error']}")
                with self._mutex:
                    tell(message)
            if self._ended:
                break
        raise ValueError(
            f"the process that works on {request['name']} was killed {_TRIES} times, perhaps for memory. Give fewer "
            "--workers; the same command goes on."
        )

    def _free(self) -> "_Worker":
        try:
            return self._idle.get_nowait()
        except queue.Empty:
            with self._mutex:
                if self._ended:
                    raise ValueError("the command has ended.") from None
                decoded = None if self._decoded is None else str(self._decoded)
                decoders = {"decoders": self._decoders, "beside": self.count, "decoded": decoded}
                worker = _Worker(self.run, self._device, len(self._started), decoders)
                self._started.append(worker)
                return worker

    def _end(self) -> None:
        with self._mutex:
            self._ended = True
            for worker in self._started:
                worker.kill()


@final
class _Worker:
    """A process, and the lines that go to and fro."""

    def __init__(self, run: Run, device: torch.device, number: int, decoders: Message) -> None:
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", number % torch.cuda.device_count())
        paths = os.pathsep.join(str(Path(path).resolve()) for path in sys.path if path)
        one = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **one, "PYTHONPATH": paths},
            text=True,
            encoding="utf-8",
        )
        first = {"folder": str(run.folder.resolve()), "device": str(device), "renamed": run.storage.renamed}
        self._write(first | decoders)

    def conversation(self, request: Message) -> Iterator[Message]:
        """What the process answers; nothing more once it has ended."""
        assert self.process.stdout is not None
        self._write(request)
        for line in self.process.stdout:
            message = json.loads(line)
            yield message
            if not {"step", "end", "refusal", "error"} & set(message):
                self._write({"recorded": True})

    def kill(self) -> None:
        """End the process; whoever reads its answers comes to their end."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """Close its pipes."""
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):  # what was left to be written
                pipe.close()

    def _write(self, message: Message) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # it was killed; the end of its answers says so
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()


@final
class Wire:
    """A worker's side: what it records goes to the process that leads.

    Args:
        out: takes the messages, one a line.
        acknowledged: returns once the last message is safe.
    """

    def __init__(self, out: TextIO, acknowledged: Callable[[], object]) -> None:
        self._out, self._acknowledged, self._told = out, acknowledged, 0.0

    def send(self, **message: Any) -> None:
        """Say something that needs no acknowledgement."""
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()

    def ask(self, **message: Any) -> None:
        """Have something recorded, and wait until it is."""
        self.send(**message)
        self._acknowledged()

    def step(self, name: str, index: int) -> None:
        """Say how far a training is, now and then."""
        if time.monotonic() - self._told > _QUIET:
            self._told = time.monotonic()
            self.send(step=index, name=name)

    def metrics(self, phase: str, before: int | None = None) -> "_RemoteMetrics":
        """As `RunFolder.metrics`."""
        self.ask(metrics=phase, before=before)
        return _RemoteMetrics(self, phase)


@final
@dataclass(frozen=True)
class _RemoteMetrics:
    wire: Wire
    phase: str

    def write(self, **record: Any) -> None:
        """As `Metrics.write`."""
        self.wire.ask(line=record, phase=self.phase)


def serve() -> None:
    """Answer the requests on standard input until it is closed."""
    from kdnas.data.decoded import stored_in
    from kdnas.data.feeding import decoding
    from kdnas.jobs import _scoring, _trainings
    from kdnas.network import on_device

    answers = {"training": _trainings.answer, "scores": _scoring.answer}

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no message
    torch.set_num_threads(1)
    lines: queue.SimpleQueue[Message] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(lines,), daemon=True).start()
    first, wire = lines.get(), Wire(out, lines.get)
    decodes = decoding(first["decoders"], first["beside"])
    with on_device(first["device"]), decodes, stored_in(first["decoded"]):
        run = Run(first["folder"], trust=True)  # the process that started this one has admitted it
        if first["renamed"]:
            run.storage.name_again(first["renamed"])
        while True:
            request = lines.get()
            _answer(run, request, wire, answers[request["kind"]])


def _listen(lines: "queue.SimpleQueue[Message]") -> None:
    for line in sys.stdin:
        lines.put(json.loads(line))
    os._exit(1)  # nobody is there any more: another process may go on with the run


def _answer(run: Run, request: Mapping[str, Any], wire: Wire, answer: Callable[[Run, Any, Wire], Message]) -> None:
    from kdnas.trust import trusting

    try:
        with trusting(True):
            wire.send(end=answer(run, request, wire))
    except ValueError as error:
        wire.send(refusal=str(error))
    except Exception:
        wire.send(error=traceback.format_exc())
