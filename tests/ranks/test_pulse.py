"""A frozen process is found by the others, which say which one it is."""

import os
import signal

import pytest

from kdnas.ranks import pulse, tensors
from kdnas.ranks.team import everywhere, meet
from tests import processes
from tests.processes import outcome, started


def quick():
    pulse.BEAT = 0.1


def freeze(rank):
    if tensors.rank() == rank:
        os.kill(os.getpid(), signal.SIGSTOP)
    meet("a test")


@pytest.mark.parametrize(("rank", "count"), [(0, 2), (1, 3)])
def test_a_frozen_process_ends_the_others_with_a_sentence_that_names_it(monkeypatch, rank, count):
    monkeypatch.setattr(processes, "prepare", quick)
    with started(lambda: everywhere(freeze, rank), count) as (_, readers):
        for reader in [reader for number, reader in enumerate(readers) if number != rank]:
            assert reader.poll(60), "a process waits for one that is frozen"
            assert f"process {rank} of {count} was not heard of for 3 seconds. Start all" in str(outcome(reader))
