"""A copy of this process without root's right to ignore the modes of files."""

import contextlib
import ctypes
import io
import json
import os
from pathlib import Path

from kdnas.cli.commands import main
from kdnas.network import on_device

_VERSION = 0x20080522  # of the kernel's structure: two words of each set


def without_privileges(*arguments):
    """The exit code and the output of a command in a copy of this process that has no capabilities."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            assert libc.capset((ctypes.c_uint32 * 2)(_VERSION, 0), (ctypes.c_uint32 * 6)()) == 0
            code, output = 0, io.StringIO()
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                try:
                    with on_device("cpu"):  # a GPU that is in use cannot be used by a fork
                        main([str(argument) for argument in arguments])
                except SystemExit as end:
                    code = end.code
                except BaseException as error:
                    code = repr(error)
            os.write(writer, json.dumps([code, output.getvalue()]).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, encoding="utf-8") as handle:
        code, output = json.loads(handle.read())
    os.waitpid(pid, 0)
    return code, output


@contextlib.contextmanager
def read_only(folder):
    """Inside, a folder and all that it holds cannot be written by who has no privileges."""
    paths = [Path(folder), *Path(folder).rglob("*")]
    modes = [path.stat().st_mode & 0o777 for path in paths]
    for path, mode in zip(paths, modes, strict=True):
        path.chmod(mode & ~0o222)
    try:
        yield
    finally:
        for path, mode in zip(paths, modes, strict=True):
            path.chmod(mode)
