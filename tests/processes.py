"""Several processes of one training, as `torchrun` starts them, by copying the process of the test."""

import multiprocessing
import os
import pickle
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from kdnas.ranks.team import joined


@contextmanager
def started(lead: Callable[[], Any], count: int = 2) -> Iterator[tuple[list[BaseProcess], list[Connection]]]:
    """Processes, of which the first calls `lead`, and what each sends when it ends: a result or a text."""
    _import_lazily()
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    ends = [fork.Pipe(duplex=False) for _ in range(count)]
    processes = [
        fork.Process(target=_run, args=(rank, count, port, lead, ends[rank][1]), daemon=True) for rank in range(count)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of copies of a process with threads, which here all wait
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


@cache
def _import_lazily() -> None:
    """Have torch import what it imports at the first step of an optimizer, once and not in every copy."""
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.sum().backward()
    torch.optim.SGD([weight], lr=0.1, momentum=0.9, nesterov=True).step()


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


def _run(rank: int, count: int, port: int, lead: Callable[[], Any], writer: Connection) -> None:
    place = {"RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": rank}
    os.environ.update({name: str(value) for name, value in place.items()})
    try:
        with joined() as is_first:
            result = lead() if is_first else None
    except Exception as error:
        result = error
    writer.send_bytes(pickle.dumps(result))  # tensors too, by value
    writer.close()
    os._exit(0)  # the copy has no business with the test's own end
