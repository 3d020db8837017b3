"""Networks of a run that are trained by themselves, each once: a row per mark, a student folder, a paused state."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, final

import torch

from kdnas.architecture import Architecture
from kdnas.evaluation import accuracy
from kdnas.jobs._preflight import training_seconds
from kdnas.jobs._run import Run
from kdnas.jobs._workers import Message, Wire
from kdnas.jobs.export import card_of, inherited
from kdnas.jobs.retrain import training_of
from kdnas.network import Network, without_weights
from kdnas.randomness import initialised
from kdnas.runs.checkpoint import load_state
from kdnas.runs.folder import STUDENTS, TRAININGS, Metrics
from kdnas.runs.progress import Bar, progress
from kdnas.runs.steps import digest_of
from kdnas.settings import SHARES, Retrain
from kdnas.students.card import FINGERPRINT, input_of
from kdnas.students.folder import write_student
from kdnas.tables import structure, unstructure
from kdnas.training.driver import Recorder, train_with_checkpoints
from kdnas.training.loop import Training
from kdnas.values import Amount, Index, Seed

_PAUSED = "trainings"  # folder of the states with which trainings go on


class Answers(Protocol):
    """Other processes, which take trainings to their marks; see `Workers` and `SharedAnswers`."""

    @property
    def count(self) -> int:
        """The number of processes."""
        ...

    @property
    def is_apart(self) -> bool:
        """Whether this process did not start them: they may be at work already, and leave files of what they record."""
        ...

    def answers(self, requests: Sequence[Message], tell: Callable[[Message], None]) -> list[Message]:
        """The last message of every request; `tell` receives the others."""
        ...


def marks(steps: int) -> tuple[int, ...]:
    """Numbers of steps after which every training is measured on the search part, ascending."""
    return tuple(sorted({max(1, int(steps * share)) for share in SHARES}))


def with_length(settings: Retrain, steps: int, seed: int = 0) -> Retrain:
    """The training of another length, whose learning rate falls to its floor within it, with a seed added."""
    recipe = dataclasses.replace(settings.recipe, steps=steps, seed=settings.recipe.seed + seed)
    return dataclasses.replace(settings, recipe=recipe)


@final
@dataclass(frozen=True)
class TrainingRow:
    """A line of `trainings.jsonl`: one network's training at one of its marks.

    Attributes:
        name: of the student folder, and of the phase in the metrics.
        code: of the architecture.
        settings: digest of the training's settings.
        seed: of the training.
        step: number of steps taken; 0 where the name was given.
        steps: number of steps of the whole training.
        accuracy: on the search part; None where nothing was measured.
        seconds: of all steps so far.
        problem: why the training ended early, such as a loss that is not finite; empty if it did not.
    """

    name: str
    code: str
    settings: str
    seed: Seed
    step: Index
    steps: Index
    accuracy: float | None = None
    seconds: Amount = 0.0
    problem: str = ""


class Job(NamedTuple):
    """A training to be taken to a mark.

    Attributes:
        role: what a network that has no training yet is named after: `ROLE-N`.
        architecture: the network.
        settings: distiller, recipe and initial weights.
        step: one of `marks(steps)`; None for the last.
    """

    role: str
    architecture: Architecture
    settings: Retrain
    step: int | None = None


@final
@dataclass
class Trainings:
    """All trainings of a run's networks; what is trained is never trained again.

    A training is known by its architecture and its settings, seed included. It pauses at a mark, and a later call, also
    of another process, goes on from there, bit for bit as if it had not paused. On a CPU it has one thread, here as in
    a worker, so that its numbers depend on neither.

    Attributes:
        run: the run; its data, teacher and supernet are those of every training.
        workers: other processes that train side by side; None trains here, one after another.
        rows: the lines of `trainings.jsonl`, those of one training side by side.
    """

    run: Run
    workers: Answers | None = None
    rows: list[TrainingRow] = field(init=False)

    def __post_init__(self) -> None:
        names = [known.name for known in dataclasses.fields(TrainingRow)]
        lines = self.run.storage.lines(TRAININGS, TrainingRow)
        self.rows = [TrainingRow(**{name: line[name] for name in names if name in line}) for line in lines]
        self._sort()

    def train(self, role: str, architecture: Architecture, settings: Retrain, step: int | None = None) -> TrainingRow:
        """Train one network up to a mark; see `train_all`."""
        return self.train_all([Job(role, architecture, settings, step)])[0]

    def train_all(self, jobs: Sequence[Job]) -> list[TrainingRow]:
        """Train networks up to their marks, and measure them there; at each earlier mark too.

        Args:
            jobs: the trainings; those of one network and settings are one training.

        Returns:
            A row per job, at its mark; one with a `problem` where a loss was not finite.

        Raises:
            ValueError: the distiller or the teacher does not fit, or a worker was killed twice.
        """
        for job in jobs:
            if not self.of(job.architecture, job.settings):
                self._begin(job)
        workers, missing = self.workers, self._missing(jobs)
        if workers is not None and workers.is_apart:
            if missing:
                self._share(missing, workers)
        else:
            for job in missing:  # a command of processes on several hosts may have been stopped
                _Record(self).logs(self.of(job.architecture, job.settings)[0].name)
            missing = self._missing(missing)
            if workers is not None and workers.count > 1 and len(missing) > 1:
                self._share(missing, workers)
            else:
                for job in missing:
                    self._advance(job)
        rows = [self._row(job) for job in jobs]
        return [row for row in rows if row is not None]

    def _missing(self, jobs: Sequence[Job]) -> list[Job]:
        """Those without a row at their mark, each training up to the last of them."""
        missing = [job for job in jobs if self._row(job) is None]
        return list({_key(job): job for job in sorted(missing, key=_mark)}.values())

    def _row(self, job: Job) -> TrainingRow | None:
        """The row at a job's mark, or that of the problem that ended its training."""
        own = self.of(job.architecture, job.settings)
        return next((row for row in own if row.step == _mark(job) or row.problem), None)

    def _share(self, jobs: Sequence[Job], workers: Answers) -> None:
        """Have jobs done by the workers, and record what they tell."""
        requests = [
            {
                "kind": "training",
                "name": self.of(job.architecture, job.settings)[0].name,
                "code": self.run.space.code(job.architecture),
                "settings": unstructure(job.settings),
                "step": job.step,
                "rows": [dataclasses.asdict(row) for row in self.of(job.architecture, job.settings)],
            }
            for job in jobs
        ]
        steps = {request["name"]: request["rows"][-1]["step"] for request in requests}
        if workers.is_apart:  # what is trained here has a bar of its own
            workers.answers(requests, _Record(self))
        else:
            total = sum(map(_mark, jobs))
            with progress(f"{len(jobs)} trainings", total, sum(steps.values())) as bar:
                workers.answers(requests, _Record(self, steps, bar))
                bar.update(total)
        self._sort()

    def _sort(self) -> None:
        """Order rows by the first one of their training: workers record in the order in which they come to marks."""
        first = {row.name: place for place, row in reversed(list(enumerate(self.rows)))}
        self.rows.sort(key=lambda row: (first[row.name], row.step))

    def of(self, architecture: Architecture, settings: Retrain) -> list[TrainingRow]:
        """The rows of a training, in the order of its steps; none where it has not begun."""
        key = self.run.space.code(architecture), _digest(settings)
        return [row for row in self.rows if (row.code, row.settings) == key]

    def seconds_of(self, architecture: Architecture, settings: Retrain) -> float:
        """Rough seconds of the training of a network."""
        network = initialised(lambda: Network(self.run.space.blueprint(architecture)), 0)
        return training_seconds(network, settings.recipe, self.run.teacher, self.run.data)

    def folder(self, row: TrainingRow) -> Path:
        """The student folder of a training."""
        return self.run.storage.path(STUDENTS, row.name)

    def deliver(
        self, row: TrainingRow, architecture: Architecture, settings: Retrain, out: Path, *, deploy: bool, **origin: Any
    ) -> dict[str, float]:
        """Write a whole training's student to another folder, in every form; see `write_student`.

        Args:
            row: the training.
            architecture: its network.
            settings: its settings.
            out: the folder.
            deploy: whether to write every form.
            **origin: further facts for the card.
        """
        training = self.training(architecture, settings)
        training.load(load_state(self._state(row.name))["training"])
        return self._write(out, training, architecture, settings, row, deploy=deploy, **origin)

    def _begin(self, job: Job) -> None:
        """Name a new training."""
        number = 1 + len({row.name for row in self.rows if row.name.rpartition("-")[0] == job.role})
        code, recipe = self.run.space.code(job.architecture), job.settings.recipe
        self.add(TrainingRow(f"{job.role}-{number}", code, _digest(job.settings), recipe.seed, 0, recipe.steps))

    def _advance(self, job: Job) -> None:
        """Train up to a mark here."""
        own = self.of(job.architecture, job.settings)
        with one_thread():
            self.advance(own, job, self.run.storage, self.add)

    def advance(
        self,
        own: Sequence[TrainingRow],
        job: Job,
        recorder: Recorder,
        add: Callable[[TrainingRow], None],
        watch: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Train up to a mark, write the student as it is there, and record this mark and those before it.

        Args:
            own: the rows of the training so far.
            job: the training.
            recorder: of metrics.
            add: records a row; returns when it is on the disk.
            watch: called with the number of steps after each.
        """
        architecture, settings = job.architecture, job.settings
        end = _mark(job)
        training, data = self.training(architecture, settings), self.run.data
        network, begun = _network(training), own[-1]
        state = self._state(begun.name)
        state.parent.mkdir(exist_ok=True)
        missing = set(marks(settings.recipe.steps)) - {row.step for row in own} - {end}
        began = time.perf_counter()
        measure = lambda: {"accuracy": accuracy(network, data.search, data)}  # noqa: E731

        def record(step: int) -> None:
            watch(step)
            if step in missing:
                seconds = round(begun.seconds + time.perf_counter() - began, 3)
                add(dataclasses.replace(begun, step=step, seconds=seconds, **measure()))

        try:
            seconds = train_with_checkpoints(training, begun.name, state, recorder, measure, record, until=end)
        except FloatingPointError as error:
            row = dataclasses.replace(begun, step=training.index, accuracy=None, problem=str(error))
        else:
            row = dataclasses.replace(begun, step=end, seconds=seconds, **measure())
            self._write(self.folder(row), training, architecture, settings, row, deploy=False)
        add(row)

    def _write(
        self,
        out: Path,
        training: Training,
        architecture: Architecture,
        settings: Retrain,
        row: TrainingRow,
        *,
        deploy: bool,
        **origin: Any,
    ) -> dict[str, float]:
        run = self.run
        network = _network(training).cpu().eval()
        facts = {"training": row.name, "steps": row.step, "seconds": row.seconds, "search_accuracy": row.accuracy}
        facts |= {"retrained": unstructure(settings), FINGERPRINT: run.storage.manifest.get("data"), **origin}
        card = card_of(run, network, architecture, facts)
        card = dataclasses.replace(card, preprocessing=input_of(network, run.data))
        extras = partial(training.distiller.cpu().export_extras, network, run.data)
        return write_student(out, network, card, deploy=deploy, more=extras)

    def training(self, architecture: Architecture, settings: Retrain) -> Training:
        """The training before its first step."""
        run = self.run
        if settings.weights == "inherited":
            network = inherited(run, architecture)
        else:
            network = without_weights(run.space.blueprint(architecture))  # `training_of` draws them
        return training_of(network, settings, run.data, lambda: run.teacher)

    def _state(self, name: str) -> Path:
        return self.run.storage.path(_PAUSED, f"{name}.safetensors")

    def add(self, row: TrainingRow) -> None:
        """Record a row."""
        self.run.storage.add(TRAININGS, [dataclasses.asdict(row)])
        self.rows.append(row)


@final
@dataclass
class _Record:
    """Records what other processes tell of their trainings.

    Attributes:
        trainings: of the run.
        steps: that each has taken, by name.
        bar: shows their sum.
    """

    trainings: Trainings
    steps: dict[str, int] = field(default_factory=dict)
    bar: Bar | None = None
    _metrics: dict[str, Metrics] = field(default_factory=dict)

    def __call__(self, message: Message) -> None:
        if "row" in message:
            row, rows = TrainingRow(**message["row"]), self.trainings.rows
            if (row.name, row.step) not in {(known.name, known.step) for known in rows}:
                self.trainings.add(row)
        elif "metrics" in message:
            phase = message["metrics"]
            self._metrics[phase] = self.trainings.run.storage.metrics(phase, message["before"])
        elif "line" in message:
            self._metrics[message["phase"]].write(**message["line"])
        elif "logs" in message:
            self.logs(message["logs"])
        elif self.bar is not None:
            self.steps[message["name"]] = message["step"]
            notes = ", ".join(f"{name} {step}" for name, step in self.steps.items())
            self.bar.update(sum(self.steps.values()), notes)

    def logs(self, name: str) -> None:
        """Record what is in the files of a training, in which nobody writes any more, and remove them."""
        for path in sorted(self.trainings.run.storage.path(_PAUSED).glob(f"{name}.*.log")):
            for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
                if line.endswith("\n"):  # else a kill cut it short
                    self(json.loads(line))
            path.unlink()


def log_of(run: Run, name: str, number: int) -> Path:
    """Where a process that the run's writer did not start puts what is to be recorded of a training.

    Args:
        run: the run.
        name: of the training.
        number: of the claim; later ones have larger numbers.
    """
    return run.storage.path(_PAUSED, f"{name}.{number:08}.log")


def answer(run: Run, request: Mapping[str, Any], wire: Wire) -> dict[str, Any]:
    """What a worker does with a request of `Trainings`."""
    architecture, settings = run.space.parse(request["code"]), structure(request["settings"], Retrain)
    rows = [TrainingRow(**row) for row in request["rows"]]
    Trainings(run).advance(
        rows,
        Job("", architecture, settings, request["step"]),
        wire,
        lambda row: wire.ask(row=dataclasses.asdict(row)),
        lambda step: wire.step(request["name"], step),
    )
    return {}


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch computes on one thread of the CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _mark(job: Job) -> int:
    return job.step or job.settings.recipe.steps


def _key(job: Job) -> tuple[Architecture, str]:
    return job.architecture, _digest(job.settings)


def _network(training: Training) -> Network:
    assert isinstance(training.model, Network)
    return training.model


def _digest(settings: Retrain) -> str:
    return digest_of(unstructure(settings))[:16]
