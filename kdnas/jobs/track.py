"""A run's metrics for trackers: one reader of `metrics.jsonl`, and a thin writer for each tracker."""

import importlib
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, final

from kdnas.report.content import mapping
from kdnas.report.side_by_side import flat
from kdnas.runs.files import Damaged, read_bytes, read_json, write_atomically, write_json, write_text
from kdnas.runs.folder import METRICS, Metric, RunFolder
from kdnas.runs.lock import command, hold
from kdnas.trust import check_links
from kdnas.values import Index

Tracker = Literal["tensorboard", "wandb", "mlflow"]
FOLDER = "tracking"
_ANEW = "Remove the folder to begin anew."
_MOST_ID = 64  # bytes
_POLL = 2.0  # seconds between two looks at the file
_NESTED = ("losses", "health", "terms")


class Sink(Protocol):
    """What writes to a tracker.

    `start` opens it with the run's settings, `write` takes the numbers of one line, `flush` brings them out of this
    process, `close` ends it.
    """

    def start(self, settings: Mapping[str, str]) -> None: ...  # noqa: D102

    def write(self, phase: str, step: int, numbers: Mapping[str, float]) -> None: ...  # noqa: D102

    def flush(self) -> None: ...  # noqa: D102

    def close(self) -> None: ...  # noqa: D102


def track(run: Path, tracker: Tracker, *, follow: bool = False, online: bool = False) -> dict[str, Any]:
    """Write a run's metrics and results to a tracker; the same call later writes what is new, and nothing twice.

    The tracker's files and the last step of each phase that it has are in `RUN/tracking/TRACKER`: removing that folder
    begins anew. After a kill or on a full disk, lines of the last two seconds, or of a call without `follow`, come
    again.

    Args:
        run: the run folder, whose training may be going on.
        tracker: which one.
        follow: go on until the run has a student, looking every two seconds.
        online: send to the tracker's server, as its own environment variables say, instead of writing files here.

    Returns:
        The number of lines that were written, and where they are.

    Raises:
        ValueError: no run there, the tracker's library is not installed, or another process tracks the run there.
    """
    storage = RunFolder(run, builds=False)
    place = storage.path(FOLDER, tracker)
    check_links(storage.folder, FOLDER)
    sink = _SINKS[tracker](place, f"{run.resolve().parent.name}/{run.resolve().name}", online)
    place.mkdir(parents=True, exist_ok=True)
    with command():
        hold(place, inside=True)
        return {"tracker": tracker, "lines": _write(storage, sink, place / "written.json", follow), "place": str(place)}


def _write(storage: RunFolder, sink: Sink, state: Path, follow: bool) -> int:
    """Write what is new, and note it whenever it has left this process; the number of lines."""
    written: dict[str, int] = read_json(state, dict[str, Index], _ANEW) if state.exists() else {}
    written.pop("format", None)
    sink.start(dict(flat(storage.manifest["job"])))
    count = 0
    try:
        while True:
            is_done = not follow or _has_student(storage.folder)  # asked before the lines are read: none is left
            before = count
            for phase, step, numbers in _lines(storage):
                if step > written.get(phase, -1):
                    sink.write(phase, step, numbers)
                    written[phase] = step
                    count += 1
            if is_done:
                break
            if count > before:
                sink.flush()
                write_json(state, written)
            time.sleep(_POLL)
        for name, numbers in _results(storage):
            sink.write(name, 0, numbers)
    finally:
        sink.close()
        write_json(state, written)
    return count


def _has_student(run: Path) -> bool:
    return RunFolder(run, builds=False).phase("student") is not None


def _lines(storage: RunFolder) -> Iterator[tuple[str, int, dict[str, float]]]:
    """Phase, step and numbers of every line, in the order of the file; of nested ones with the names joined."""
    for line in storage.lines(METRICS, Metric):
        numbers = {name: line[name] for name in line if name not in ("step", "total")}
        for name in _NESTED:
            numbers |= {f"{name}/{key}": value for key, value in mapping(numbers.pop(name, None)).items()}
        for name in [name for name, value in numbers.items() if isinstance(value, dict)]:
            numbers |= {f"{name}/{key}": value for key, value in numbers.pop(name).items()}
        yield line["phase"], line["step"], {name: value for name, value in numbers.items() if _is_number(value)}


def _results(storage: RunFolder) -> Iterator[tuple[str, dict[str, float]]]:
    """The rows of the closing table."""
    for row in storage.results()["rows"]:
        yield f"result/{row['name']}", {name: row[name] for name in row if _is_number(row.get(name))}


def _known(mark: Path) -> str:
    """The id of a tracker's run in a file."""
    text = read_bytes(mark, _ANEW, _MOST_ID).decode("ascii", "replace")
    if not text.isalnum():
        raise Damaged(mark, "holds no id", _ANEW)
    return text


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _library(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"--to {extra} needs a package that is not installed: pip install 'kdnas[{extra}]'."
        ) from error


@final
class TensorBoard:
    """Event files; tags are `PHASE/NAME`."""

    def __init__(self, place: Path, name: str, online: bool) -> None:
        if online:
            raise ValueError("`online` is for wandb and mlflow: tensorboard reads files. Drop it.")
        del name
        _library("tensorboard", "tensorboard")
        self._make, self._place = _library("torch.utils.tensorboard", "tensorboard").SummaryWriter, place

    def start(self, settings: Mapping[str, str]) -> None:
        """Open a new event file beside earlier ones."""
        self._writer = self._make(str(self._place))
        rows = "\n".join(f"| {key} | {value} |" for key, value in settings.items())
        self._writer.add_text("settings", f"| setting | value |\n| --- | --- |\n{rows}")

    def write(self, phase: str, step: int, numbers: Mapping[str, float]) -> None:
        """One scalar for each number."""
        for name, value in numbers.items():
            self._writer.add_scalar(f"{phase}/{name}", value, step)

    def flush(self) -> None:
        """Write what waits."""
        self._writer.flush()

    def close(self) -> None:
        """Write what waits, and end."""
        self._writer.close()


@final
class Wandb:
    """One run of Weights & Biases, with a step axis for each phase; offline files unless `online`."""

    def __init__(self, place: Path, name: str, online: bool) -> None:
        self._wandb = _library("wandb", "wandb")
        self._place, self._name, self._online = place, name, online

    def start(self, settings: Mapping[str, str]) -> None:
        """Open the run, or go on with it: its id is kept beside its files."""
        mark = self._place / "id"
        if not mark.exists():
            write_atomically(mark, lambda draft: write_text(draft, secrets.token_hex(4)))
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", "kdnas"),
            name=self._name,
            id=_known(mark),
            resume="allow",
            dir=str(self._place),
            mode="online" if self._online else "offline",
            config=dict(settings),
        )
        self._remove_links()
        self._known: set[str] = set()

    def write(self, phase: str, step: int, numbers: Mapping[str, float]) -> None:
        """One row, whose numbers are drawn over the phase's own steps."""
        if phase not in self._known:
            self._run.define_metric(f"{phase}/*", step_metric=f"{phase}/step")
            self._known.add(phase)
        self._run.log({f"{phase}/step": step, **{f"{phase}/{name}": value for name, value in numbers.items()}})

    def flush(self) -> None:
        """Nothing: rows go to a process of wandb's own."""

    def close(self) -> None:
        """End the run, or what of it is known."""
        self._run.finish()
        self._remove_links()

    def _remove_links(self) -> None:
        """Links to its own logs elsewhere: a run with a link that leads out of it is refused when it is read."""
        for path in self._place.rglob("*"):
            if path.is_symlink():
                path.unlink(missing_ok=True)


@final
class Mlflow:
    """One run of MLflow, in an SQLite file unless `online`; then where `MLFLOW_TRACKING_URI` says."""

    def __init__(self, place: Path, name: str, online: bool) -> None:
        self._entities = _library("mlflow.entities", "mlflow")
        client = _library("mlflow.tracking", "mlflow").MlflowClient
        self._place, self._name = place, name
        self._open: Callable[[], Any] = lambda: client(None if online else f"sqlite:///{place.resolve()}/mlflow.db")

    def start(self, settings: Mapping[str, str]) -> None:
        """Open the run, or go on with it: its id is kept beside the file."""
        self._client, mark = self._open(), self._place / "id"
        if mark.exists():
            self._id = _known(mark)
            return
        known = self._client.get_experiment_by_name("kdnas")
        experiment = known.experiment_id if known else self._client.create_experiment("kdnas")
        self._id = self._client.create_run(experiment, run_name=self._name).info.run_id
        write_atomically(mark, lambda draft: write_text(draft, self._id))
        for key, value in settings.items():
            self._client.log_param(self._id, key, value[:500])

    def write(self, phase: str, step: int, numbers: Mapping[str, float]) -> None:
        """One metric for each number."""
        now = int(time.time() * 1000)
        clean = {"".join(c if c.isalnum() or c in "_-. /" else "_" for c in name): v for name, v in numbers.items()}
        rows = [self._entities.Metric(f"{phase}/{name}", float(value), now, step) for name, value in clean.items()]
        self._client.log_batch(self._id, metrics=rows)

    def flush(self) -> None:
        """Nothing: each row is written at once."""

    def close(self) -> None:
        """Say that it has ended; a later call goes on all the same."""
        self._client.set_terminated(self._id)


_SINKS: dict[Tracker, Callable[[Path, str, bool], Sink]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": Mlflow,
}
