"""Where progress is shown."""

import importlib.util
import sys
from types import SimpleNamespace

import pytest

from kdnas.runs.progress import progress


@pytest.mark.parametrize(
    ("kernel", "widgets", "live"), [(False, True, False), (True, False, False), (True, True, True)]
)
def test_a_notebook_that_can_show_it_gets_a_live_bar(monkeypatch, log, kernel, widgets, live):
    made = []

    class Progress:
        def __init__(self, *columns, console):
            made.append(console)

        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *_: None  # noqa: E731
        add_task = lambda self, *_, **options: made.append(options["total"])  # noqa: E731
        update = lambda self, *_, **options: made.append(options)  # noqa: E731

    monkeypatch.setattr("rich.progress.Progress", Progress)
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: False, write=lambda _: None, flush=lambda: None))
    if kernel:
        monkeypatch.setitem(sys.modules, "ipykernel", SimpleNamespace())
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: object() if widgets and name == "ipywidgets" else None
    )
    with progress("train", 10) as bar:
        bar.update(10, "done")
    assert bool(made) == live
    if live:
        assert made[0].is_jupyter and made[1] == 10
    else:
        assert "train: 10/10" in log.text
