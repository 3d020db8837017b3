"""SIGKILL in the midst of a command, at a place in the code, so that no kill is too early or too late on any machine.

The processes that are killed are copies of one that has imported everything once.
"""

import contextlib
import signal
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

import kdnas.conversion.removal
import kdnas.distillers.quantization_aware
import kdnas.jobs.search
import kdnas.students.forms
import kdnas.training.driver
from kdnas.cli.commands import main
from kdnas.students.source import load_source
from tests.processes import CONTEXT

PLACE = """
{given} as place
call = place.{name}
def wrapped(*given, **options):
    if {here}:
        {then}
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)
    return call(*given, **options)
place.{name} = wrapped
"""
CHECKPOINT = {"given": "import kdnas.training.driver", "name": "save_state"}
"""Where a training dies: what it recorded of its last step is written, the checkpoint of that step is not."""


@pytest.fixture(scope="module", autouse=True)
def no_graph() -> Iterator[None]:
    """ONNX graphs take seconds, that of integers half a minute, and no kill is about them."""
    with pytest.MonkeyPatch.context() as patch:
        _leave_out_graphs(patch)
        yield


def _leave_out_graphs(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(kdnas.students.forms, "graph_of", lambda *_, **__: b"")
    patch.setattr(kdnas.distillers.quantization_aware, "write_trained", lambda *_: {})
    patch.setattr(kdnas.students.forms, "load_graph", lambda path: load_source(path.parent))


def killed(arguments: Sequence[str] | str, here: str, *, given: str, name: str, then: str = "pass") -> None:
    """Run a command in another process, which dies at the first call of a function that `here` describes.

    Checkpoints are written after every step, and lines after every score.

    Args:
        arguments: of the command line; or code to execute.
        here: an expression of the call's positional arguments, `given`.
        given: statement that imports what has the function, such as `import kdnas.jobs.prune`.
        name: of the function, such as `Job._store`.
        then: a statement to execute right before.
    """
    place = PLACE.format(given=given, name=name, here=here, then=then)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        process = CONTEXT.Process(target=_run, args=(place, arguments, str(log)))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL, f"it ended before it could be killed: {log.read_text()[-2000:]}"
        process.close()


def _run(place: str, arguments: Sequence[str] | str, log: str) -> None:
    torch.set_num_threads(1)
    kdnas.training.driver.CHECKPOINT_SECONDS = kdnas.jobs.search.FLUSH_SECONDS = 0.0
    _leave_out_graphs(pytest.MonkeyPatch())
    with Path(log).open("w") as file, contextlib.redirect_stderr(file), contextlib.redirect_stdout(file):
        exec(place, {})
        if isinstance(arguments, str):
            exec(arguments, {})
        else:
            main(arguments)


def drafts(folder: Path) -> list[str]:
    """The unfinished files in a folder."""
    return sorted(p.name for p in folder.rglob("*") if "draft" in p.name and not p.name.startswith(".run.json"))
