"""The processes that `torchrun` starts: the first runs the command, the others follow its calls."""

import contextlib
import io
import json
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from importlib.metadata import version
from typing import Any, final

from kdnas.ranks import pulse
from kdnas.runs.files import plain

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LETTER = 4096  # bytes of a message between two processes
_CHUNK = 2**28  # bytes of one broadcast
_FOREVER = timedelta(days=365)
PATIENCE = timedelta(seconds=8)
"""How long the tensors of one step may be waited for: processes that take the same step are never so far apart."""
_AGAIN = "Start all processes again: the same command goes on from the last checkpoint."


class Lost(ValueError):
    """Another process of the training has ended, or does something else."""


class Unreachable(RuntimeError):
    """A process did not take part in an exchange."""


@final
class Team:
    """This process and the others.

    Attributes:
        rank: number of this process; 0 leads.
        size: number of processes.
        tensors: the group in which tensors are exchanged.
        pulse: of this process and the others.
        inside: whether a call of all processes is under way.
        per_process: what each process has for itself; see `Recipe.per_process`.
        notes: what this process has done in the call, which must be the same in all.
        is_careful: whether the processes meet before each exchange of tensors: one that computes something for the
            first time may be slow, and one that exchanges something else is found at once.
    """

    def __init__(self, rank: int, size: int, tensors: Any, store: Any) -> None:
        self.rank, self.size, self.tensors = rank, size, tensors
        self.pulse = pulse.Pulse(rank, size, store, self._break_off)
        self.inside, self.per_process = False, "nothing"
        self.notes: dict[str, Any] = {}
        self.is_careful = False
        self._loss: Lost | None = None
        self._letters: dict[int, dict[str, Any]] = {}  # to the leader, of a meeting that did not come about
        self._problem: str | None = None  # the leader's answer to such a meeting

    def lead(self, function: Callable[..., Any], args: tuple[Any, ...], patience: timedelta) -> Any:
        """Call a function in all processes; the leader's result."""
        if self._loss is not None:
            raise self._loss
        content = _packed(function, args)
        with self._losing():
            for other in range(1, self.size):
                self._send({"bytes": len(content)}, other)
            self._broadcast(content)
        return self._perform(function, args, patience)

    def follow(self) -> None:
        """Do what the leader calls, until it ends.

        Raises:
            Lost: the leader, or another process, has ended or does something else.
        """
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # who waits for another hears no handler: end at once
                signal.signal(getattr(signal, name, signal.SIGINT), signal.SIG_DFL)
        while True:
            with self._losing():
                order = self._receive(0, _FOREVER)
                if "bytes" not in order:
                    return
                content = self._broadcast(bytes(order["bytes"]))
            with contextlib.suppress(Exception):
                self._perform(*_unpacked(content), _FOREVER)
            if self._loss is not None:
                raise self._loss

    def end(self) -> None:
        """Release the others."""
        import torch.distributed as dist

        for other in range(1, self.size):
            self._releases(other)
        self.pulse.stop()
        if self._loss is None:
            dist.destroy_process_group()

    def meet(self, purpose: str) -> None:
        """Wait until all processes have come here, however long that takes.

        Raises:
            Unreachable: a process has ended, or has come somewhere else.
        """
        if self.rank:
            self._send({"purpose": purpose, "notes": self.notes}, 0)
            self._problem = self._receive(0, _FOREVER).get("problem")
            if self._problem is not None:
                raise Unreachable(self._problem)
            return
        self._letters = {other: self._receive(other, _FOREVER) for other in range(1, self.size)}
        for other, letter in self._letters.items():
            if letter.get("purpose") != purpose:
                theirs = letter.get("purpose", "its end")
                raise Unreachable(f"process 0 has come to {purpose}, process {other} to {theirs}")
        for other in self._letters:
            self._send({}, other)
        self._letters = {}

    def exchange(self, tensor: Any, operation: Callable[[], Any]) -> None:
        """Do an operation of `torch.distributed` on a tensor.

        Raises:
            Unreachable: it failed.
        """
        if self.is_careful:
            self.meet(f"a tensor of {list(tensor.shape)}")
        _reached(operation)

    def _perform(self, function: Callable[..., Any], args: tuple[Any, ...], patience: timedelta) -> Any:
        """Call the function, then compare how it went in all processes."""
        self.notes, self.inside, self._problem = {}, True, None
        result, error = None, None
        try:
            result = function(*args)
        except Exception as failure:
            error = failure
        finally:
            self.inside = self.is_careful = False
        problem = self._verdict(error, patience)
        if problem:
            self._loss = Lost(problem)
            raise self._loss from error
        if error is not None:
            raise error
        return result

    def _verdict(self, error: Exception | None, patience: timedelta) -> str:
        """A sentence on what is wrong with another process; empty if nothing is."""
        text = "" if error is None else plain(f"{error}", 1000)
        status: dict[str, Any] = {"failed": error is not None, "away": isinstance(error, Unreachable), "error": text}
        status["notes"] = self.notes
        if self._problem is not None:
            return self._problem
        if self.rank:
            with self._losing():
                self._send(status, 0)
                return str(self._receive(0, _FOREVER)["problem"])
        states: dict[int, Mapping[str, Any]] = {0: status}
        missing: dict[int, str] = {}
        for other in range(1, self.size):
            try:
                states[other] = self._letters.pop(other, None) or self._receive(other, patience)
            except Unreachable as failure:
                timed = any(word in str(failure).lower() for word in ("timed out", "timeout"))
                missing[other] = "does not answer" if timed else "has ended"
        silence = self._silence() if missing else ""
        problem = silence or _problem(states, missing, status["notes"].get("step"))
        for other in states:
            if other:
                with contextlib.suppress(Unreachable):
                    self._send({"problem": problem}, other)
        return problem

    @contextlib.contextmanager
    def _losing(self) -> Iterator[None]:
        """Inside, a process that cannot be reached is a sentence."""
        try:
            yield
        except Unreachable as error:
            # The leader releases the others: whom a letter does not reach has ended.
            others = [0] if self.rank else [other for other in range(1, self.size) if not self._releases(other)]
            whom = " and ".join(map(str, others or [1]))
            self._loss = Lost(self._silence() or f"process {whom} of {self.size} has ended. {_AGAIN}")
            raise self._loss from error

    def _silence(self) -> str:
        """A sentence on processes that give no sign of life; empty if all do."""
        whom = " and ".join(map(str, self.pulse.silent()))
        seconds = round(pulse.BEAT * pulse.SILENCE)
        return f"process {whom} of {self.size} was not heard of for {seconds} seconds. {_AGAIN}" if whom else ""

    def _break_off(self) -> None:
        """End whatever this process waits for: one time limit that is exceeded closes all connections of the group."""
        import torch
        import torch.distributed as dist

        with contextlib.suppress(RuntimeError):
            dist.irecv(torch.empty(1, dtype=torch.uint8), int(not self.rank), tag=1).wait(timedelta(milliseconds=1))  # type: ignore[union-attr]

    def _releases(self, other: int) -> bool:
        try:
            self._send({}, other)
        except Unreachable:
            return False
        return True

    def _send(self, message: Mapping[str, Any], other: int) -> None:
        import torch
        import torch.distributed as dist

        content = json.dumps(message).encode()[:_LETTER].ljust(_LETTER)
        letter = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        _reached(lambda: dist.isend(letter, other).wait(PATIENCE))  # type: ignore[union-attr]

    def _receive(self, other: int, patience: timedelta) -> dict[str, Any]:
        import torch
        import torch.distributed as dist

        letter = torch.empty(_LETTER, dtype=torch.uint8)
        _reached(lambda: dist.irecv(letter, other).wait(patience))  # type: ignore[union-attr]
        try:
            return dict(json.loads(letter.numpy().tobytes()))
        except ValueError as error:
            raise Unreachable(f"process {other} sent something else ({error})") from error

    def _broadcast(self, content: bytes) -> bytes:
        """The leader's bytes."""
        import torch
        import torch.distributed as dist

        whole = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        for chunk in whole.split(_CHUNK):
            work = dist.broadcast(chunk, 0, async_op=True)
            _reached(lambda work=work: work.wait(_FOREVER))  # type: ignore[union-attr]
        return whole.numpy().tobytes()


def _reached(operation: Callable[[], Any]) -> None:
    try:
        operation()
    except RuntimeError as error:
        raise Unreachable(str(error)) from error


_TEAM: list[Team] = []  # of this process; empty where it is the only one


def present() -> Team | None:
    """The processes, inside of a call of all; None elsewhere, and where there is one process."""
    return _TEAM[0] if _TEAM and _TEAM[0].inside else None


def leads() -> bool:
    """Whether there are processes that follow this one, which are not in a call now."""
    return bool(_TEAM) and _TEAM[0].rank == 0 and not _TEAM[0].inside


def number() -> int:
    """The number of processes that share every training."""
    return _TEAM[0].size if _TEAM else 1


def neighbours() -> int:
    """The number of those that run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", number())) if number() > 1 else 1


def everywhere(function: Callable[..., Any], *args: Any, patience: timedelta = _FOREVER) -> Any:
    """Call a function in all processes, with copies of the arguments, and return the leader's result.

    Args:
        function: importable by its name.
        *args: anything that pickle takes.
        patience: how long after the leader another process may be ready.

    Raises:
        Lost: another process has ended, raised an error, or its notes are others than the leader's.
        ValueError: an argument cannot be pickled.
    """
    return _TEAM[0].lead(function, args, patience) if leads() else function(*args)


def meet(purpose: str, *, careful: bool = False) -> None:
    """Wait in a call until all processes have come here, however long that takes.

    Args:
        purpose: what for, for the message where another process comes somewhere else.
        careful: meet before every exchange of tensors, too, until the call ends.
    """
    team = present()
    if team is not None:
        team.meet(purpose)
        team.is_careful = careful


def note(name: str, value: Any) -> None:
    """Record what this process does in the present call; a process in which it is something else ends the training.

    Args:
        name: what the value is, in the plural or with its article, for the message.
        value: a number, a text or a list of them, of at most a thousand characters.
    """
    team = present()
    if team is not None:
        team.notes[name] = value


def agree(name: str, value: str) -> None:
    """Wait in a call until all processes have come here with the same value; nothing where those are their own.

    Tensors of other sizes than a process expects would end it without a word, so what decides on them is agreed first.
    """
    team = present()
    if team is not None and team.per_process not in ("architectures", "blocks"):
        team.notes[name] = value
        team.meet(f"{name} {value}")


@contextlib.contextmanager
def joined() -> Iterator[bool]:
    """Inside, the processes of `torchrun` share every training: the first goes on, the others first follow it.

    In the first process, and where there is only one, this gives True. In every other one it gives False when the first
    has ended. The variables of `torchrun` are removed, so that programs started from here are processes of their own.

    Raises:
        Lost: in a process that follows, when another one has ended or does something else.
        ValueError: the processes are of several versions of kdnas or torch.

    Example:
        >>> with joined() as is_first:
        ...     print(is_first)
        True
    """
    if any(name not in os.environ for name in _VARIABLES) or int(os.environ["WORLD_SIZE"]) < 2:
        yield True
        return
    team = _team()
    _TEAM[:] = [team]
    try:
        if team.rank:
            team.follow()
            yield False
        else:
            everywhere(_same_versions)
            yield True
    finally:
        _TEAM.clear()
        team.pulse.stop() if team.rank else team.end()


def _team() -> Team:
    import torch
    import torch.distributed as dist

    store, rank, size = next(dist.rendezvous("env://"))
    local = int(os.environ.get("LOCAL_RANK", rank))
    backend = "gloo"
    if torch.cuda.is_available() and torch.cuda.device_count() > local:
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    tensors = dist.new_group(backend=backend, timeout=PATIENCE)
    for name in (*_VARIABLES, "LOCAL_RANK"):
        os.environ.pop(name, None)
    return Team(rank, size, tensors, dist.PrefixStore("pulse", store.clone()))


def _same_versions() -> None:
    note("versions", [f"{name} {version(name)}" for name in ("kdnas", "torch")])


def _packed(function: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    import torch

    if all(isinstance(value, bool | int | float | str) for value in args):
        return pickle.dumps((function, args))
    buffer = io.BytesIO()
    try:
        torch.save((function, args), buffer, pickle_protocol=pickle.HIGHEST_PROTOCOL)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"the training cannot be sent to the other processes: {error}. Define what it names at the top of a "
            "module, or start one process."
        ) from error
    return buffer.getvalue()


def _unpacked(content: bytes) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    import torch

    if not content.startswith(b"PK"):
        return pickle.loads(content)  # type: ignore[no-any-return]
    place = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    kinds = lambda storage, location: storage if location == "cpu" else storage.cuda(place)  # noqa: E731
    return torch.load(io.BytesIO(content), map_location=kinds, weights_only=False)  # type: ignore[no-any-return]


def _problem(states: Mapping[int, Mapping[str, Any]], missing: Mapping[int, str], step: int | None) -> str:
    """A sentence that names the process with which something is wrong; empty if nothing is."""
    at = "" if step is None else f" at step {step}"
    if missing:
        words = [f"process {other} of {len(states) + len(missing)} {reason}" for other, reason in missing.items()]
        return f"{', and '.join(words)}{at}. {_AGAIN}"
    # A process that came to a meeting sent no outcome: it has not failed by itself.
    states = {other: {"failed": True, "away": True, "error": "", **state} for other, state in states.items()}
    for other, state in states.items():
        if state["failed"] and not state["away"]:  # the leader's own error is raised as it is
            return f"process {other}{at}: {state['error']}" if other else ""
    for other, state in states.items():
        for name, value in states[0]["notes"].items():
            theirs = state["notes"].get(name, value)
            if value != theirs:
                return (
                    f"process {other} differs from process 0 in its {name}{at}: {_shown(theirs)} there, "
                    f"{_shown(value)} in process 0. All must run the same versions on machines of one type. {_AGAIN}"
                )
    errors = [state["error"] for state in states.values() if state["away"]]
    return f"the processes do not exchange the same tensors{at} ({max(errors, key=len)}). {_AGAIN}" if errors else ""


def _shown(value: Any) -> str:
    return plain(", ".join(map(str, value)) if isinstance(value, list) else str(value), 120)
