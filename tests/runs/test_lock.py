"""Locks of runs: who has one, who may take it over, and that every command that writes needs it."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kdnas.cli.commands import COMMANDS, main
from kdnas.runs import lock
from kdnas.runs.folder import RunFolder
from kdnas.runs.lock import Busy, command, hold

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def other():
    """Another process, which does nothing."""
    process = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def record(pid, **changes):
    return lock.own_record() | {"pid": pid, "started": lock._started(pid), "command": "kdnas search"} | changes


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A finished run and its teacher."""
    shutil.copytree(GOLDEN, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def test_a_command_holds_what_it_writes_until_it_ends(run):
    with command():
        assert hold(run) and not hold(run / "students" / "student")
        with command():
            assert not hold(run / "new")
        assert json.loads((run / ".lock").read_text())["pid"] == os.getpid()
        assert hold(run.parent / "elsewhere") and (run.parent / ".elsewhere.lock").exists()
    assert not list(run.parent.rglob("*.lock"))


def test_the_second_command_is_told_who_the_first_is(run, other):
    (run / ".lock").write_text(json.dumps(record(other.pid, since="2026-01-02 03:04:05+00:00")))
    words = rf"run is being written by `kdnas search` \(process {other.pid} on .+, since 2026-01-02 03:04:05\+00:00\)"
    for path in (run, run / "students" / "student"):
        with command(), pytest.raises(Busy, match=words):
            hold(path)
    with pytest.raises(Busy, match=words):
        RunFolder(run).save()


@pytest.mark.parametrize("changes", [{"started": "boot 1"}, {"pid": 2**22 + 1}, {"started": ""}])
def test_the_lock_of_a_dead_process_is_taken_over(run, other, changes):
    (run / ".lock").write_text(json.dumps(record(other.pid) | changes))
    with command():
        assert hold(run)
        assert json.loads((run / ".lock").read_text())["pid"] == os.getpid()
    assert not list(run.glob(".lock*"))


def test_a_killed_process_that_nobody_has_waited_for_is_dead(run):
    process = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
    content = json.dumps(record(process.pid))
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    (run / ".lock").write_text(content)
    with command():
        assert hold(run)
    process.wait()


def test_a_process_of_another_user_that_the_system_hides_is_alive(run, other, monkeypatch):
    """As on machines where /proc shows everybody their own processes only."""
    (run / ".lock").write_text(json.dumps(record(other.pid)))
    monkeypatch.setattr(lock, "_started", lambda pid: "now" if pid == os.getpid() else "")

    def refuse(pid, number):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "kill", refuse)
    with command(), pytest.raises(Busy, match=f"process {other.pid}"):
        hold(run)


@pytest.mark.parametrize("changes", [{"host": "elsewhere"}, {"machine": "pid:[1]"}])
def test_a_process_of_another_machine_cannot_be_judged(run, changes):
    (run / ".lock").write_text(json.dumps(record(2**22 + 1, started="x", **changes)))
    with command(), pytest.raises(Busy, match=r"cannot be seen from .*, remove .*\.lock"):
        hold(run)


def test_a_process_that_is_told_of_shares_its_lock_and_one_that_has_ended_elsewhere_loses_it(run, other, monkeypatch):
    theirs = record(other.pid)
    (run / ".lock").write_text(json.dumps(theirs))
    assert lock.is_locked_by(run, theirs) and not lock.is_locked_by(run, record(other.pid, host="elsewhere"))
    monkeypatch.setattr(lock, "_companions", set())
    lock.accompany(theirs)
    with command():
        assert not hold(run)
    assert lock.is_locked_by(run, theirs)
    far = record(other.pid, host="elsewhere")
    (run / ".lock").write_text(json.dumps(far))
    lock.believe(far, ended=True)
    with command():
        assert hold(run)
    (run / ".lock").write_text(json.dumps(far))
    lock.believe(far, ended=False)
    with command(), pytest.raises(Busy, match="elsewhere"):
        hold(run)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"pid": 1}', "[" * 100_000])
def test_a_file_that_is_no_lock_is_named(run, content):
    (run / ".lock").write_text(content)
    with command(), pytest.raises(Busy, match=r"\.lock is no lock of kdnas"):
        hold(run)


@pytest.mark.parametrize(
    "make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("nowhere"), lambda path: path.symlink_to(path)]
)
def test_what_is_no_regular_file_is_no_lock_and_nothing_waits_for_it(run, make):
    make(run / ".lock")
    with command(), pytest.raises(Busy, match=r"\.lock is no lock of kdnas"):
        hold(run)


def test_a_process_that_this_one_started_shares_the_lock(run):
    with command():
        hold(run)
        pid = os.fork()
        if not pid:
            lock._locks.clear()
            try:
                os._exit(hold(run / "students"))
            finally:
                os._exit(9)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.parametrize("links", [True, False])
def test_of_several_claimants_of_a_dead_lock_one_gets_it(tmp_path, monkeypatch, links):
    (tmp_path / "run.json").touch()
    if not links:

        def refuse(*_):
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
    for _ in range(10):
        (tmp_path / ".lock").write_text(json.dumps(record(2**22 + 1, started="x")))
        results, ready = os.pipe(), os.pipe()
        children = []
        for _ in range(6):
            if not (pid := os.fork()):
                os.close(ready[1])
                os.read(ready[0], 1)
                with command():
                    try:
                        os.write(results[1], b"+" if hold(tmp_path) else b"-")
                    except Busy:
                        os.write(results[1], b"-")
                    signal.pause()
            children.append(pid)
        os.close(ready[1])  # all begin now
        told = b""
        while len(told) < len(children):
            told += os.read(results[0], 16)
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        for number in (results[0], results[1], ready[0]):
            os.close(number)
        assert told.count(b"+") == 1
        # The claimants were killed; the next one gets it, and their remains are gone.
        with command():
            assert hold(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json"]


def test_an_interruption_while_a_dead_lock_is_taken_over_leaves_nothing(run, monkeypatch):
    for number in range(12):
        (run / ".lock").write_text(json.dumps(record(2**22 + 1, started="x")))
        calls = iter(range(100))

        def interrupted(path, call=lock._read, last=number, calls=calls):
            if next(calls) == last:
                raise KeyboardInterrupt
            return call(path)

        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt), command():
            patch.setattr(lock, "_read", interrupted)
            hold(run)
        assert [path.name for path in run.glob(".lock*") if json.loads(path.read_text())["pid"] == os.getpid()] == []


def test_interruptions_while_locks_are_released_leave_none(run, monkeypatch):
    read, count = lock._read, iter(range(100))

    def interrupted(path):
        if next(count) in (0, 1, 3):
            raise KeyboardInterrupt
        return read(path)

    with pytest.raises(KeyboardInterrupt), command():
        assert hold(run) and hold(run.parent / "elsewhere")
        monkeypatch.setattr(lock, "_read", interrupted)
    assert not list(run.parent.rglob("*.lock*"))


@pytest.mark.parametrize("place", ["_linked", "_claim", "_read"])
def test_an_interruption_while_it_is_locked_leaves_nothing(run, monkeypatch, place):
    call = getattr(lock, place)

    def interrupted(*given):
        monkeypatch.undo()
        call(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr(lock, place, interrupted)
    folder = run.resolve()
    with pytest.raises(KeyboardInterrupt), command():
        hold(folder)
        command_ended = hold(folder)  # of `_read`, which comes at the end
        assert not command_ended
    if place == "_read":
        with command():
            hold(folder)
    assert not list(folder.glob(".lock*"))


def test_what_a_kill_left_before_the_lock_was_there_is_removed(run):
    (run / ".lock.0123456789abcdef").write_text(json.dumps(record(2**22 + 1, started="x", id="0123456789abcdef")))
    with command():
        assert hold(run)
        assert [path.name for path in run.glob(".lock*")] == [".lock"]


def test_a_new_run_is_no_place_for_a_folder_that_another_command_makes(tmp_path, other):
    """One would take the place of the other at its end."""
    with command():
        RunFolder.create(tmp_path / "new", {"steps": 3}, 0)
        assert (tmp_path / ".new.lock").exists()
    (tmp_path / ".other.lock").write_text(json.dumps(record(other.pid, command="kdnas convert")))
    with command(), pytest.raises(Busy, match="other is being written by `kdnas convert`"):
        RunFolder.create(tmp_path / "other", {"steps": 3}, 0)
    with command(), pytest.raises(Busy, match="other is being written by `kdnas convert`"):
        hold(tmp_path / "other" / "students" / "mine")
    assert not (tmp_path / "other").exists()


def test_a_link_to_a_run_is_the_run(run, other):
    (run.parent / "link").symlink_to(run)
    (run / ".lock").write_text(json.dumps(record(other.pid)))
    with command(), pytest.raises(Busy, match=f"process {other.pid}"):
        hold(run.parent / "link" / "students" / "new")


def test_a_file_system_that_cannot_lock_is_named(run, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(os, "link", refuse)
    with command(), pytest.raises(OSError, match=r"No locks available.*\.lock"):
        hold(run)
    assert not list(run.glob(".lock*"))


def test_a_run_that_another_process_has_just_begun_is_not_replaced(tmp_path, other):
    RunFolder.create(tmp_path, {"steps": 3}, 0)
    (tmp_path / ".lock").write_text(json.dumps(record(other.pid)))
    with command(), pytest.raises(Busy):
        RunFolder.create(tmp_path, {"steps": 4}, 0)
    (tmp_path / ".lock").unlink()
    assert RunFolder(tmp_path).is_blank
    with command():
        assert RunFolder.create(tmp_path, {"steps": 4}, 0).manifest["job"] == {"steps": 4}


def test_what_was_read_before_the_lock_is_not_written_back(run):
    opened, second = RunFolder(run), RunFolder(run)
    with command():
        second.finish("later", seconds=1.0)
    with command(), pytest.raises(Busy, match="was written by another command meanwhile"):
        opened.finish("other", seconds=1.0)
    assert RunFolder(run).phase("later") and not RunFolder(run).phase("other")


DATA = ["--data", "digits"]
WRITERS = {
    "demo": ["--out", "run"],
    "run": [*DATA, "--space", "toy", "--steps", "1", "--out", "run"],
    "fit": [*DATA, "--steps", "1", "--out", "run"],
    "train": ["demo", "--out", "run"],
    "search": ["run"],
    "finals": ["run"],
    "why": ["run", "000"],
    "convert": ["checkpoint:teacher", "--out", "run/converted"],
    "export": ["run"],
    "retrain": ["run/students/place-1"],
    "prune": [*DATA, "--budget", "macs=1k", "--out", "run"],
    "quantize": ["run/students/place-1"],
    "compare": [*DATA, "--out", "compared"],
    "grow": [*DATA, "--space", "toy", "--out", "run"],
}
READERS = {"report", "list", "losses", "taps", "rank-check", "doctor", "plan", "latency", "push", "track"}


def test_every_command_is_a_reader_or_a_writer():
    assert WRITERS.keys() | READERS == COMMANDS.keys() and not WRITERS.keys() & READERS


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", WRITERS)
def test_no_command_writes_a_run_that_another_process_writes(run, other, capsys, name):
    compared = run.parent / "compared"
    compared.mkdir()
    (compared / "compare.json").write_text("{}")
    for folder in (run, compared):
        (folder / ".lock").write_text(json.dumps(record(other.pid)))
    before = contents(run.parent)
    with pytest.raises(SystemExit) as end:
        main([name, *WRITERS[name]])
    assert end.value.code == 2
    assert f"is being written by `kdnas search` (process {other.pid} on" in capsys.readouterr().err
    assert contents(run.parent) == before


@pytest.mark.parametrize("arguments", [["report", "run"], ["list", "losses"]])
def test_readers_need_no_lock(run, other, arguments):
    (run / ".lock").write_text(json.dumps(record(other.pid)))
    main(arguments)
    assert json.loads((run / ".lock").read_text())["pid"] == other.pid
