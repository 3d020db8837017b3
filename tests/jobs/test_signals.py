import errno
import os
import signal
import threading

import pytest

from kdnas.cli.commands import COMMANDS, main
from kdnas.jobs._signals import disk_error, stopping
from kdnas.runs.lock import command, hold


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_ends_a_command_like_ctrl_c_and_says_so(tmp_path, monkeypatch, capsys, name):
    def stopped():
        """Stop itself."""
        with command():
            hold(tmp_path / "student")
            os.kill(os.getpid(), getattr(signal, name))
        raise AssertionError

    monkeypatch.setitem(COMMANDS, "list", COMMANDS["list"]._replace(function=stopped))
    before = signal.signal(getattr(signal, name), signal.SIG_DFL)  # nohup ignores SIGHUP, and so do its children
    try:
        with pytest.raises(SystemExit) as end:
            main(["list"])
        assert signal.getsignal(getattr(signal, name)) is signal.SIG_DFL
    finally:
        signal.signal(getattr(signal, name), before)
    assert end.value.code == 128 + getattr(signal, name)
    assert f"kdnas list: stopped by {name}; the same command goes on" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())  # the lock is released


def test_a_signal_that_is_ignored_stays_ignored_and_a_thread_sets_none():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    thread = threading.Thread(target=stopping().__enter__)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_full_disk_is_a_sentence_with_the_file():
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "RUN/checkpoint.safetensors")
    assert disk_error(error) == (
        "RUN/checkpoint.safetensors: No space left on device. Make room; the same command goes on."
    )
