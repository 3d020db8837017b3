"""Several processes of one training, as `torchrun` starts them: copies of one that has imported everything once.

Not of the test's own, as torch refuses gradients in a copy of a process that had threads for them.
"""

import multiprocessing
import os
import pickle
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import cloudpickle
import torch

from kdnas.ranks.team import joined

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.killing", "tests.faults", __name__])
# Imports torch's compiler, which a process needs for its first optimizer.
torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1)


def prepare() -> None:
    """What every process does first; tests put another function in its place."""


@contextmanager
def started(lead: Callable[[], Any], count: int = 2) -> Iterator[tuple[list[BaseProcess], list[Connection]]]:
    """Processes, of which the first calls `lead`, and what each sends when it ends: a result or a text."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    ends = [CONTEXT.Pipe(duplex=False) for _ in range(count)]
    work = cloudpickle.dumps((prepare, lead))
    processes: list[BaseProcess] = [
        CONTEXT.Process(target=_run, args=(rank, count, port, work, ends[rank][1]))  # no daemon: it may start others
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    for _, writer in ends:
        writer.close()
    try:
        yield processes, [reader for reader, _ in ends]
    finally:
        for process in processes:
            process.kill()
            process.join()


def together(lead: Callable[[], Any], count: int = 2) -> Any:
    """The result of a function that the first of several processes calls; an error in a process is one here."""
    with started(lead, count) as (_, readers):
        outcomes = [outcome(reader) for reader in readers]
    for each in outcomes:
        if isinstance(each, Exception):
            raise each
    return outcomes[0]


def outcome(reader: Connection) -> Any:
    """What a process has sent; None of one that was killed."""
    try:
        return pickle.loads(reader.recv_bytes())
    except EOFError:
        return None


def _run(rank: int, count: int, port: int, work: bytes, writer: Connection) -> None:
    place = {"RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": rank}
    os.environ.update({name: str(value) for name, value in place.items()})
    first, lead = pickle.loads(work)
    first()
    try:
        with joined() as is_first:
            result = lead() if is_first else None
    except Exception as error:
        result = error
    writer.send_bytes(pickle.dumps(result))  # tensors too, by value
    writer.close()
    os._exit(0)  # the copy has no business with the test's own end
