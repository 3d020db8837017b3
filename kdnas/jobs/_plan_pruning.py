"""What a run without a space will take: its teacher's own network is cut down."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar, final

from kdnas.distillers.from_labels import FromLabels
from kdnas.evaluation import accuracy
from kdnas.jobs._rehearsal import short_recipe, short_teacher
from kdnas.jobs._trials import SHARE, Variant
from kdnas.jobs.fit import member_training
from kdnas.jobs.plan import STEPS, Meter, More, Pace, Phase, line_bytes, longer, measured_pace, size_of
from kdnas.jobs.prune import CANDIDATES, Job, begin
from kdnas.jobs.retrain import Prepared, prepare
from kdnas.network import Network
from kdnas.runs.folder import TEACHER, RunFolder
from kdnas.settings import FitTeacher, Prune, Recipe
from kdnas.specs import spec

_CANDIDATES = 12  # the first ones are planned; those that are drawn may take several draws
_Result = TypeVar("_Result")


def pruning_phases(settings: Prune, folder: Path, *, deploy: bool) -> tuple[dict[str, Phase], Job, Variant]:
    """Run a pruning in a folder, and measure its phases, by the names that they have in a plan.

    Returns:
        The phases, the pruning, and how its student was trained.
    """
    storage = RunFolder.create(folder, settings.to_json(), settings.recipe.seed)
    meter, measured = Meter(folder), dict[str, Phase]()

    def phase(name: str, action: Callable[[], _Result]) -> _Result:
        began = time.perf_counter()
        result = action()
        measured[name] = meter.phase(name, time.perf_counter() - began)
        return result

    job = phase("other", lambda: begin(settings, storage))
    phase("search", job.remove)
    variants = phase("trials", job.decide)
    phase("finals", lambda: job.train(variants, deploy=deploy))
    other, seconds = measured["other"], (storage.phase("teacher") or {}).get("seconds", 0.0)
    disk = size_of(storage.path(TEACHER))
    known = {
        "teacher": dataclasses.replace(other, name="teacher", seconds=seconds, disk=disk),
        **measured,
        "other": dataclasses.replace(other, seconds=max(0.0, other.seconds - seconds), disk=max(0, other.disk - disk)),
    }
    names = ("teacher", "search", "trials", "finals", "other")
    return {name: known[name] for name in names}, job, variants["trained"]


@final
@dataclasses.dataclass(frozen=True)
class RehearsedPruning:
    """What was measured of a pruning.

    Attributes:
        settings: the run's settings.
        short: those of the rehearsal.
        measured: seconds, memory and disk of each phase of the rehearsal.
        paces: of the teacher, and of students with and without one.
        trials: number of trials.
        trainings: number of students that are trained whole under the teacher.
        candidate: seconds of a candidate.
        line: bytes that one adds to the folder.
    """

    settings: Prune
    short: Prune
    measured: Mapping[str, Phase]
    paces: Mapping[str, Pace]
    trials: int
    trainings: int
    candidate: float
    line: int

    @classmethod
    def of(cls, settings: Prune, folder: Path, *, deploy: bool) -> "RehearsedPruning":
        """Run every phase in small, in a folder."""
        short = _shortened(settings)
        measured, job, trained = pruning_phases(short, folder, deploy=deploy)
        storage = job.storage
        return cls(
            settings=settings,
            short=short,
            measured=measured,
            paces=_paces(settings, job, trained),
            trials=sum(name.startswith("trial: ") for name in storage.manifest["phases"]),
            trainings=sum(storage.phase(name) is not None for name in ("trained", "equal", "random")),
            candidate=job.candidate,
            line=line_bytes(storage, CANDIDATES),
        )

    @property
    def few(self) -> int:
        """Number of candidates of the rehearsal."""
        return self.short.num_candidates

    @property
    def most(self) -> int:
        """Number of candidates of the run."""
        return self.settings.num_candidates

    @property
    def recipes(self) -> Mapping[str, Recipe]:
        """The recipes of the run by what they train."""
        return recipes_of(self.settings)

    def phases(self, scale: float, evaluations: int) -> tuple[Phase, ...]:
        """Every phase of the run with this share of its steps, and so many candidates."""
        steps = {name: max(1, round(scale * recipe.steps)) for name, recipe in self.recipes.items()}
        before = {name: recipe.steps for name, recipe in recipes_of(self.short).items()}
        more = {
            "teacher": self._more("teacher", steps.get("teacher", 0), before.get("teacher", 0)),
            "trials": self._more("student", max(1, steps["students"] // SHARE), 1).times(self.trials),
            "finals": self._more("student", steps["students"], before["students"])
            .times(self.trainings)
            .plus(self._more("labels", steps["students"], before["students"]).times(self.settings.controls)),
        }
        return longer({**self.measured, "search": self.searching(evaluations)}, more)

    def searching(self, evaluations: int) -> Phase:
        """The search of so many candidates."""
        phase, more = self.measured["search"], evaluations - self.few
        seconds = min(phase.seconds + more * self.candidate, max(phase.seconds, self.settings.max_time))
        return dataclasses.replace(phase, seconds=seconds, disk=phase.disk + more * self.line)

    def _more(self, name: str, steps: int, before: int) -> More:
        """What one training takes more than in the rehearsal."""
        return self.paces[name].beyond(steps, before) if name in self.paces else More()


def _shortened(settings: Prune) -> Prune:
    teacher = settings.teacher
    return dataclasses.replace(
        settings,
        teacher=short_teacher(teacher, STEPS) if isinstance(teacher, FitTeacher) else teacher,
        num_candidates=min(_CANDIDATES, settings.num_candidates),
        max_time=Prune.max_time,
        recipe=short_recipe(settings.recipe, STEPS),
        retrain=short_recipe(settings.retrain, STEPS),
    )


def recipes_of(settings: Prune) -> dict[str, Recipe]:
    teacher = settings.teacher
    fit = {"teacher": teacher.recipe} if isinstance(teacher, FitTeacher) else {}
    return fit | {"students": settings.retrain}


def _paces(settings: Prune, job: Job, trained: Variant) -> dict[str, Pace]:
    """The pace of every kind of training, with the run's own recipes."""
    paces = {}
    if isinstance(settings.teacher, FitTeacher):
        training = member_training(settings.teacher, job.data)
        network = training.model
        assert isinstance(network, Network)
        paces["teacher"] = measured_pace(training, lambda: accuracy(network, job.data.search, job.data))
    whole = dataclasses.replace(trained.settings, recipe=settings.retrain)
    _, taught = job.variant(trained.student.name, whole.weights)
    students = {"student": dataclasses.replace(taught.settings, recipe=settings.retrain)}
    if job.data.task.has_classes:
        students["labels"] = dataclasses.replace(whole, distiller=spec(FromLabels))
    for name, each in students.items():
        prepared = prepare(trained.student, each, settings.data, trained.teacher)
        paces[name] = measured_pace(prepared.training, lambda prepared=prepared: _accuracy(prepared))
    return paces


def _accuracy(prepared: Prepared) -> float:
    return accuracy(prepared.network, prepared.data.search, prepared.data)
