"""One thread per test process: several torch processes with more fight for the cores."""

import functools
import gc
import logging
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)
# Torch's compiler alone has half a million objects; to look through them often takes a twelfth of the whole time.
gc.set_threshold(50_000, 10, 10)


LONG = (
    "test_killed_schemes",
    "test_docs",
    "test_every_command",
    "test_every_space",
    "test_folder",
    "test_quantization_aware",
    "test_compare",
    "test_every_distiller",
)
"""Files that take the most time: with `--dist loadfile`, whoever gets one last would end alone."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; the order is otherwise kept."""
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def log(caplog, monkeypatch):
    """What kdnas logs, whether or not the command line's handler is installed."""
    monkeypatch.setattr(logging.getLogger("kdnas"), "propagate", True)
    caplog.set_level(logging.INFO, "kdnas")
    return caplog


@functools.cache
def _keep_registry() -> None:
    from torch.onnx._internal.exporter._registration import ONNXRegistry  # slow to import

    ONNXRegistry.from_torchlib = staticmethod(functools.cache(ONNXRegistry.from_torchlib))


@pytest.fixture(autouse=True, scope="session")
def _one_registry():
    """torch.onnx reads the source of its five hundred functions anew for each graph, a third of the time; here once."""
    export = torch.onnx.export
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "export", lambda *given, **options: _keep_registry() or export(*given, **options))
        yield


@pytest.fixture(autouse=True, scope="session")
def _state(tmp_path_factory):
    """What kdnas remembers between commands lies in a folder of the tests' own."""
    before = os.environ.get("XDG_STATE_HOME")
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))
    yield
    os.environ.pop("XDG_STATE_HOME")
    if before is not None:
        os.environ["XDG_STATE_HOME"] = before
