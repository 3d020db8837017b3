"""What a run will take, phase by phase, from a few measured steps; and settings that fit a given time."""

import dataclasses
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, final

import numpy as np
import torch

from kdnas.evaluation import accuracy, health
from kdnas.jobs._preflight.cost import duration, existing
from kdnas.jobs._rehearsal import phases, rehearsal, shortened
from kdnas.jobs._run import Run
from kdnas.jobs._trainings import Trainings
from kdnas.jobs.fit import member_training
from kdnas.jobs.search import search
from kdnas.jobs.train import supernet_training
from kdnas.network import Network
from kdnas.ranking.controls import TRAINING_FREE_ENTRIES
from kdnas.ranking.loop import Uninformative
from kdnas.runs.checkpoint import save_state
from kdnas.runs.entry import Entry
from kdnas.runs.folder import METRICS, RANKING, TEACHER, RunFolder
from kdnas.settings import Experiment, FitTeacher, Prune, Recipe, Retrain
from kdnas.specs import spec
from kdnas.supernet import Supernet
from kdnas.training.driver import CHECKPOINT_SECONDS, Cadence
from kdnas.training.loop import Training

STEPS, _EVALUATIONS = 6, 4  # of the rehearsal
_WARM, _TIMED, _WATCHED, _WEIGHED = 2, 10, 3, 1  # steps
_LIMIT = 20.0  # seconds that the steps of one training are timed
_LIKELY = 8  # networks that are timed in the place of the finalists, as far as _LIMIT allows
_ENOUGH = 2.0  # seconds of a search from which longer ones are predicted
_LEAST = 10  # steps of a training that is proposed
_SEARCHING = 0.25  # share of the time that is proposed for the search


class Pace(NamedTuple):
    """Seconds of the parts of a training.

    Attributes:
        step: a step.
        watched: what a step takes longer whose gradients are compared.
        evaluation: measuring accuracies once.
        saving: writing a checkpoint once.
        epoch: steps of an epoch.
        guarded: whether a guard watches the training.
        line: bytes of a line of the metrics.
        weighed: what a step takes longer in which the shares of the loss terms are measured.
    """

    step: float
    watched: float
    evaluation: float
    saving: float
    epoch: int
    guarded: bool
    line: int = 0
    weighed: float = 0.0

    def seconds(self, steps: int) -> float:
        """Of a training of so many steps.

        Example:
            >>> Pace(1.0, 2.0, 10.0, 0.5, 50, False).seconds(100)
            225.0
        """
        cadence = Cadence.of(steps, self.epoch, guarded=self.guarded)
        numbers = range(1, steps + 1)
        pure = steps * self.step + sum(map(cadence.compares, numbers)) * self.watched
        pure += sum(map(cadence.weighs, numbers)) * self.weighed
        pure += sum(map(cadence.evaluates, numbers)) * self.evaluation
        return pure + (pure // CHECKPOINT_SECONDS + 1) * self.saving

    def disk(self, steps: int) -> int:
        """Bytes that the metrics of a training of so many steps take.

        Example:
            >>> Pace(1.0, 2.0, 10.0, 0.5, 50, False, line=300).disk(1000)  # a line every 5 steps
            60000
        """
        cadence = Cadence.of(steps, self.epoch, guarded=self.guarded)
        return self.line * sum(map(cadence.records, range(1, steps + 1)))

    def beyond(self, steps: int, before: int) -> "More":
        """What a training of so many steps takes more than one of `before` steps."""
        return More(self.seconds(steps) - self.seconds(before), self.disk(steps) - self.disk(before))


class More(NamedTuple):
    """What a phase takes more than in the rehearsal.

    Attributes:
        seconds: of wall time.
        disk: bytes.
    """

    seconds: float = 0.0
    disk: float = 0.0

    def times(self, count: float) -> "More":
        """So many of it."""
        return More(count * self.seconds, count * self.disk)

    def plus(self, other: "More") -> "More":
        """Both."""
        return More(self.seconds + other.seconds, self.disk + other.disk)


class Searching(NamedTuple):
    """Seconds of a search by its number of candidates.

    Attributes:
        starting: that the first search of a process takes beside this: what is imported and made ready once.
        counts: candidates of the searches that were timed, rising.
        times: seconds of each.
        scoring: a candidate and one of the random search, without the controls of the first 50.
    """

    starting: float
    counts: tuple[int, ...]
    times: tuple[float, ...]
    scoring: float

    def seconds(self, count: int) -> float:
        """Of a search of so many candidates that is not the first one.

        Between two searches that were timed it is on the line through both. Beyond the last it goes on as between the
        last two up to 50 candidates, and by the scoring alone from there.

        Example:
            >>> searching = Searching(3.0, (4, 8), (1.0, 1.8), 0.1)
            >>> [round(searching.seconds(count), 3) for count in (4, 6, 8, 50, 100)]
            [1.0, 1.4, 1.8, 10.2, 15.2]
        """
        last, time = self.counts[-1], self.times[-1]
        if count <= last:
            return float(np.interp(count, self.counts, self.times))
        slope = self.scoring
        if len(self.counts) > 1:
            slope = max(slope, (time - self.times[-2]) / (last - self.counts[-2]))
        controlled = max(0, min(count, TRAINING_FREE_ENTRIES) - last)
        return time + controlled * slope + (count - last - controlled) * self.scoring


@final
@dataclasses.dataclass(frozen=True)
class Phase:
    """What a phase takes.

    Attributes:
        name: teacher, supernet, search, finals, or other: all checks and readings.
        seconds: of wall time.
        memory: largest number of bytes at once: of the device where that is a GPU, else of the process.
        disk: bytes that the run folder grows by.
    """

    name: str
    seconds: float
    memory: int
    disk: int


@final
@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run takes.

    Attributes:
        phases: in their order.
        free: bytes that the disk has left.
        proposal: settings that fit the time that was asked for, by the names of their options; empty without one.
        fitted: seconds that the run takes with them.
    """

    phases: tuple[Phase, ...]
    free: int
    proposal: dict[str, int] = dataclasses.field(default_factory=dict)
    fitted: float = 0.0

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return sum(phase.seconds for phase in self.phases)

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {**dataclasses.asdict(self), "seconds": self.seconds}


def plan(settings: Experiment | Prune, folder: Path, *, deploy: bool, seconds: float | None = None) -> Plan:
    """Time, memory and disk of every phase; and settings with which the run ends within a time.

    Every phase is run with a few steps and candidates in a temporary folder. What steps, evaluations, checkpoints and
    candidates take is measured apart, and what the run has more of them is added. The rehearsed supernet is hardly
    trained, so that its ranking says nothing of the finalists: they are taken for candidates that use much of the
    budget, the quarter of most MACs. Of a pruning, every training but the control is taken for one under the
    teacher; where trials choose the labels alone, it takes less.

    Args:
        settings: all settings.
        folder: where the run would be.
        deploy: whether every form of the student would be written.
        seconds: the time that there is.

    Raises:
        ValueError: as the phases; no settings fit the time; or layers are to be compiled.
    """
    from kdnas.jobs._plan_pruning import RehearsedPruning, recipes_of

    recipes = recipes_of(settings) if isinstance(settings, Prune) else _recipes(settings)
    if any(recipe.execution == "compiled" for recipe in recipes.values()):
        raise ValueError(
            "`execution` must be eager in a plan, got compiled: layers are compiled in the first steps, which do not "
            "tell the time of later ones."
        )
    with rehearsal() as place:
        if isinstance(settings, Prune):
            rehearsed: Rehearsed = RehearsedPruning.of(settings, place, deploy=deploy)
        else:
            rehearsed = RehearsedRun.of(settings, place, deploy=deploy)
    free = shutil.disk_usage(existing(folder)).free
    whole = Plan(rehearsed.phases(1.0, rehearsed.most), free)
    return whole if seconds is None else dataclasses.replace(whole, **_fitting(rehearsed, seconds))


class Rehearsed(Protocol):
    """What was measured of a run, and what follows from it."""

    @property
    def few(self) -> int:
        """Number of candidates of the rehearsal."""
        ...

    @property
    def most(self) -> int:
        """Number of candidates of the run."""
        ...

    @property
    def recipes(self) -> Mapping[str, Recipe]:
        """The recipes of the run by what they train."""
        ...

    def phases(self, scale: float, evaluations: int) -> tuple[Phase, ...]:
        """Every phase of the run with this share of its steps, and so many candidates."""
        ...

    def searching(self, evaluations: int) -> Phase:
        """The search of so many candidates."""
        ...


def run_phases(experiment: Experiment, folder: Path, *, deploy: bool) -> dict[str, Phase]:
    """Run an experiment in a folder, and measure its phases, by the names that they have in a plan."""
    meter, measured, names = Meter(folder), dict[str, Phase](), list[str]()
    for name, spent in phases(experiment, folder, deploy=deploy):
        if names:
            measured[names[-1]] = meter.phase(names[-1], spent)
        names.append(name)
    training, export, storage = measured["training"], measured["export"], RunFolder(folder)
    teacher, supernet = ((storage.phase(name) or {}).get("seconds", 0.0) for name in ("teacher", "train"))
    other = max(0.0, training.seconds - teacher - supernet) + export.seconds
    disk = size_of(storage.path(TEACHER))
    return {
        "teacher": dataclasses.replace(training, name="teacher", seconds=teacher, disk=disk),
        "supernet": dataclasses.replace(training, name="supernet", seconds=supernet, disk=training.disk - disk),
        "search": measured["search"],
        "finals": measured["finals"],
        "other": dataclasses.replace(export, name="other", seconds=other),
    }


@final
@dataclasses.dataclass(frozen=True)
class RehearsedRun:
    """What was measured.

    Attributes:
        experiment: the run's settings.
        short: those of the rehearsal.
        measured: seconds, memory and disk of each phase of the rehearsal.
        paces: of teacher, supernet, and of the students with and without a teacher.
        search: seconds of a search by its number of candidates.
        line: bytes of a line of the ranking.
        candidates: number of candidates that there are at most.
        size: parameters of likely finalists, by those of the finalists of the rehearsal.
    """

    experiment: Experiment
    short: Experiment
    measured: Mapping[str, Phase]
    paces: Mapping[str, Pace]
    search: Searching
    line: int
    candidates: int
    size: float = 1.0

    @classmethod
    def of(cls, experiment: Experiment, folder: Path, *, deploy: bool) -> "RehearsedRun":
        """Run every phase in small, in a folder."""
        short = shortened(experiment, STEPS, _EVALUATIONS, cheap=False)
        measured, run = run_phases(short, folder, deploy=deploy), Run(folder)
        count, line = run.space.count(), line_bytes(run.storage, RANKING)
        most = min(count, experiment.search.num_evaluations)
        searching = _searching(run, short, measured["search"].seconds, most)
        likely = likely_finalists(run.storage.ranking())
        rehearsed = [row["params"] for row in run.storage.results()["rows"] if "training" in row]
        return cls(
            experiment=experiment,
            short=short,
            measured=measured,
            paces=_paces(run, experiment, likely),
            search=searching,
            line=line,
            candidates=count,
            size=statistics.mean(entry.params for entry in likely) / statistics.mean(rehearsed),
        )

    @property
    def few(self) -> int:
        """Number of candidates of the rehearsal."""
        return self.short.search.num_evaluations

    @property
    def most(self) -> int:
        """Number of candidates of the run."""
        return self.experiment.search.num_evaluations

    @property
    def recipes(self) -> Mapping[str, Recipe]:
        """The recipes of the run by what they train."""
        return _recipes(self.experiment)

    def phases(self, scale: float, evaluations: int) -> tuple[Phase, ...]:
        """Every phase of the run with this share of its steps, and so many candidates."""
        more = {
            "teacher": self._teacher(scale),
            "supernet": self._more("supernet", scale),
            "finals": self._finals(scale),
        }
        with_weights = {
            name: dataclasses.replace(self.measured[name], disk=round(self.size * self.measured[name].disk))
            for name in ("finals", "other")  # nearly all that they write are students' weights and states
        }
        return longer({**self.measured, **with_weights, "search": self.searching(evaluations)}, more)

    def _teacher(self, scale: float) -> More:
        teacher = self.experiment.train.teacher
        return self._more("teacher", scale).times(teacher.members if isinstance(teacher, FitTeacher) else 0)

    def _finals(self, scale: float) -> More:
        finals = self.experiment.finals
        labels = finals.seeds * ("labels" in finals.controls)
        taught = sum(finals.trainings) - labels
        return self._more("student", scale).times(taught).plus(self._more("labels", scale).times(labels))

    def _more(self, name: str, scale: float) -> More:
        """What one training takes more than in the rehearsal."""
        if name not in self.paces:
            return More()
        long, short = (_recipes(e)[_KINDS[name]].steps for e in (self.experiment, self.short))
        return self.paces[name].beyond(max(1, round(scale * long)), short)

    def searching(self, evaluations: int) -> Phase:
        """The search of so many candidates, and the second one."""
        phase, few, searches = self.measured["search"], self.few, [evaluations]
        if self.experiment.second is not None:
            searches.append(self.experiment.second.num_evaluations)
        counts = [min(count, self.candidates) for count in searches]
        lines = (1 + self.short.search.control) * (counts[0] - few)
        return dataclasses.replace(
            phase,
            seconds=self.search.starting + sum(map(self.search.seconds, counts)),
            disk=phase.disk + lines * self.line,
        )


def longer(phases: Mapping[str, Phase], more: Mapping[str, More]) -> tuple[Phase, ...]:
    """Those phases that take time, with so much more each, by their names."""
    predicted = []
    for phase in phases.values():
        whole = More(phase.seconds, phase.disk).plus(more.get(phase.name, More()))
        predicted.append(dataclasses.replace(phase, seconds=whole.seconds, disk=round(whole.disk)))
    return tuple(phase for phase in predicted if phase.seconds > 0)


_KINDS = {"teacher": "teacher", "supernet": "supernet", "student": "students", "labels": "students"}


def _recipes(experiment: Experiment) -> dict[str, Recipe]:
    """The recipes of a run by what they train."""
    teacher = experiment.train.teacher
    fit = {"teacher": teacher.recipe} if isinstance(teacher, FitTeacher) else {}
    return fit | {"supernet": experiment.train.recipe, "students": experiment.retrain.recipe}


def _searching(run: Run, short: Experiment, before: float, most: int) -> Searching:
    """Time searches of the rehearsed run, each of twice as many candidates, until one takes a while.

    What several candidates share is computed once, so that more of them take less time each.

    Args:
        run: whose first searches are done.
        short: with the settings of these.
        before: seconds of these.
        most: candidates.
    """
    settings = dataclasses.replace(short.search, initial=0)
    counts, times, scored = [min(settings.num_evaluations, most)], list[float](), list[float]()
    while True:
        longer = dataclasses.replace(settings, num_evaluations=counts[-1])
        try:
            times.append(_timed(lambda longer=longer: search(run, longer)))
        except Uninformative:  # so little was trained; the run itself will say so where it is the case
            counts.pop()
            break
        number = len(run.storage.manifest["searches"])
        scored.append(sum(entry.seconds for entry in run.storage.ranking(number)))
        # What every search takes once, such as its evidence, is no part of what a candidate takes.
        if counts[-1] == most or times[-1] - times[0] > _ENOUGH or (len(times) > 1 and sum(times) > _LIMIT):
            break
        counts.append(min(most, 2 * counts[-1]))
    scoring = scored[-1] / counts[-1]
    if len(counts) > 1:
        scoring = max(0.0, scored[-1] - scored[-2]) / (counts[-1] - counts[-2])
    searches = 1 + (short.second is not None)
    return Searching(max(0.0, before - searches * times[0]), tuple(counts), tuple(times), scoring)


def likely_finalists(ranking: Sequence[Entry]) -> list[Entry]:
    """Of the quarter of a ranking that has most MACs, the first and up to seven more at equal distances."""
    quarter = sorted(ranking, key=lambda entry: -entry.macs)[: max(1, len(ranking) // 4)]
    return quarter[:: -(-len(quarter) // _LIKELY)]


def line_bytes(storage: RunFolder, name: str) -> int:
    """Mean number of bytes of the lines of a run's file."""
    lines = storage.path(name).read_bytes().splitlines(keepends=True)
    return sum(map(len, lines)) // max(1, len(lines))


def _paces(run: Run, experiment: Experiment, finalists: Sequence[Entry]) -> dict[str, Pace]:
    """The pace of every kind of training of a rehearsed run, with the run's own recipes, but for very few steps."""
    retrain = dataclasses.replace(experiment.retrain, recipe=_long(experiment.retrain.recipe))
    data, train = run.data, dataclasses.replace(experiment.train, recipe=_long(experiment.train.recipe))
    paces = {}
    if isinstance(train.teacher, FitTeacher):
        training = member_training(dataclasses.replace(train.teacher, recipe=_long(train.teacher.recipe)), data)
        paces["teacher"] = measured_pace(training, lambda: accuracy(_network(training), data.search, data))
    if train.distiller is not None:
        supernets = supernet_training(run, train)
        supernet = supernets.model
        assert isinstance(supernet, Supernet)
        paces["supernet"] = measured_pace(supernets, lambda: health(supernet, data), guarded=True)
    settings = {"student": retrain}
    if "labels" in experiment.finals.controls:
        settings["labels"] = dataclasses.replace(retrain, distiller=spec("kdnas.distillers.from_labels:FromLabels"))
    paces |= {name: _of_students(run, finalists, own) for name, own in settings.items()}
    line = line_bytes(run.storage, METRICS)
    return {name: pace._replace(line=line) for name, pace in paces.items()}


def _long(recipe: Recipe) -> Recipe:
    """The recipe with as many steps as are timed, or more."""
    return dataclasses.replace(recipe, steps=max(recipe.steps, _WARM + _TIMED + _WATCHED + _WEIGHED))


def _of_students(run: Run, entries: Sequence[Entry], settings: Retrain) -> Pace:
    """The mean pace of the slower half: of equal MACs scores prefer networks with more layers, which are slower."""
    paces, began = list[Pace](), time.perf_counter()
    for entry in entries:
        training = Trainings(run).training(entry.architecture, settings)
        evaluate = lambda training=training: accuracy(_network(training), run.data.search, run.data)  # noqa: E731
        paces.append(measured_pace(training, evaluate))
        if len(paces) > 1 and time.perf_counter() - began > _LIMIT:
            break
    return slower_half(paces)


def _network(training: Training) -> Network:
    assert isinstance(training.model, Network)
    return training.model


def slower_half(paces: Sequence[Pace]) -> Pace:
    """The mean of the slower half of some paces."""
    slower = sorted(paces, key=lambda pace: -pace.step)[: (len(paces) + 1) // 2]
    means = {
        name: statistics.mean(getattr(pace, name) for pace in slower)
        for name in ("step", "watched", "evaluation", "saving", "weighed")
    }
    return slower[0]._replace(**means)


def measured_pace(training: Training, evaluate: Callable[[], object], *, guarded: bool = False) -> Pace:
    """Time a few steps of a training, after two that are not timed."""
    began = time.perf_counter()
    for _ in range(_WARM):
        training.step()
    steps = [_timed(training.step)]
    while len(steps) < _TIMED and time.perf_counter() - began < _LIMIT and not training.done:
        steps.append(_timed(training.step))
    step = sum(steps) / len(steps)
    watched = sum(_timed(lambda: training.step(watch=True)) for _ in range(_WATCHED)) / _WATCHED - step
    weighed = sum(_timed(lambda: training.step(weigh=True)) for _ in range(_WEIGHED)) / _WEIGHED - step
    _timed(evaluate)
    evaluation = _timed(evaluate)
    with tempfile.TemporaryDirectory(prefix="kdnas-") as folder:
        saving = _timed(lambda: save_state(Path(folder) / "state.safetensors", {"training": training.state()}))
    extra = max(0.0, watched), evaluation, saving
    return Pace(step, *extra, training.epoch_steps, guarded, weighed=max(0.0, weighed))


def _timed(action: Callable[[], object]) -> float:
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    began = time.perf_counter()
    action()
    synchronize()
    return time.perf_counter() - began


@final
class Meter:
    """Memory and disk of one phase after the other."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._bytes = folder, 0
        _forget_peak()

    def phase(self, name: str, seconds: float) -> Phase:
        """The phase that ends now."""
        size = size_of(self._folder)
        grown, self._bytes = size - self._bytes, size
        phase = Phase(name, seconds, _peak(), max(0, grown))
        _forget_peak()
        return phase


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _peak() -> int:
    """The largest number of bytes since `_forget_peak`; since the process began where the system keeps no other."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource  # not on every system

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:  # another system, or not allowed
        return


def _fitting(rehearsed: Rehearsed, seconds: float) -> dict[str, Any]:
    """The most steps and candidates with which the run ends within a time.

    Raises:
        ValueError: there are none.
    """
    most, recipes = rehearsed.most, rehearsed.recipes

    def total(scale: float, evaluations: int) -> float:
        return sum(phase.seconds for phase in rehearsed.phases(scale, evaluations))

    least = min(1.0, _LEAST / min(recipe.steps for recipe in recipes.values()))
    searching = lambda count: rehearsed.searching(count).seconds  # noqa: E731
    count = most
    while count > 1 and searching(count) > _SEARCHING * seconds:
        count //= 2
    count = max(count, min(most, rehearsed.few))
    if total(least, count) > seconds:
        raise ValueError(
            f"`time` must be at least {duration(total(least, count))} for {_LEAST} steps of every training, got "
            f"{duration(seconds)}. Raise it, or use smaller networks, a smaller teacher or fewer finalists."
        )
    low, high = least, max(1.0, seconds / total(1.0, count) * 2)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if total(middle, count) <= seconds else (low, middle)
    steps = {name: max(1, math.floor(low * recipe.steps)) for name, recipe in recipes.items()}
    same = len({*steps.values()}) == 1
    proposal = {"steps": next(iter(steps.values()))} if same else {f"steps of {n}": s for n, s in steps.items()}
    return {"proposal": proposal | {"num_evaluations": count}, "fitted": total(low, count)}


def text_of(whole: Plan) -> str:
    """A row per phase, the sum, and the proposal."""
    rows = [("phase", "time", "memory", "disk")]
    rows += [(p.name, duration(p.seconds), _bytes(p.memory), _bytes(p.disk)) for p in whole.phases]
    memory, disk = max(p.memory for p in whole.phases), sum(p.disk for p in whole.phases)
    rows.append(("whole run", duration(whole.seconds), _bytes(memory), _bytes(disk)))
    lines = [f"{name:<12}{seconds:>10}{memory:>12}{disk:>12}" for name, seconds, memory, disk in rows]
    if disk > whole.free:
        lines.append(f"the disk has {_bytes(whole.free)} left, less than the run needs. Use another --out.")
    if whole.proposal:
        options = " ".join(
            f"--{name.replace('_', '-')} {value}" if " " not in name else f"{name}: {value},"
            for name, value in whole.proposal.items()
        )
        lines += ["", f"within the time that there is: {options} ({duration(whole.fitted)})"]
    return "\n".join(lines)


def _bytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
