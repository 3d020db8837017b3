"""Several systems on the same data, under the same teacher and budget, at equal cost: one table."""

import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, final

from kdnas.architecture import Architecture
from kdnas.costs.check import BudgetCheck, check_feasible
from kdnas.costs.count import cost
from kdnas.data.base import Data, changes
from kdnas.distillers.from_labels import FromLabels
from kdnas.distillers.from_teacher import FromTeacher
from kdnas.jobs._contestants import LEAST_STEPS, RETRAIN_SHARE, Contest, Plan, contestant, timed_step
from kdnas.jobs._preflight import preflight
from kdnas.jobs._run import build_teacher, fitted_spec
from kdnas.jobs._trainings import Answers
from kdnas.jobs.chain import say
from kdnas.jobs.fit import fit_teacher, teacher_result
from kdnas.network import Network
from kdnas.randomness import python_rng
from kdnas.report.comparison import best_first, read_comparison, verdict, write_comparison
from kdnas.runs.files import write_json
from kdnas.runs.folder import COMPARISON, RunFolder
from kdnas.runs.lock import Busy, hold, is_lock
from kdnas.runs.places import digests, forget, located, moved, name_again, portable, settle, weights_digest
from kdnas.runs.steps import digest_of
from kdnas.settings import Compare, FitTeacher, Recipe, systems
from kdnas.specs import Spec
from kdnas.tables import structure, unstructure
from kdnas.tasks.base import Task
from kdnas.tasks.features import Similarity
from kdnas.teachers.fitted import fitted_teacher

_TEACHER_SHARE = 0.10


@final
@dataclass
class ComparisonState:
    """The content of `compare.json`: plans and results so far, with which an interrupted comparison is resumed.

    Attributes:
        settings: of the comparison.
        systems: what each system does, by name.
        measure: what `accuracy` in the results is.
        data: fingerprint of the data.
        inputs: files outside of the folder, and folders with weights, with SHA-256.
        teacher: row of the teacher that was fitted here, or None.
        teacher_job: the settings with which it is fitted, planned once, or None.
        retrain_steps: of every student, planned once, or None.
        step_seconds: by system, seconds of one of its training steps.
        plans: by system.
        results: by system, its result, or the `reason` why it has none.
        seconds: spent so far.
    """

    settings: dict[str, Any]
    systems: dict[str, str]
    measure: str = Task.measure
    data: dict[str, str] = field(default_factory=dict)
    inputs: list[dict[str, str]] = field(default_factory=list)
    teacher: dict[str, Any] | None = None
    teacher_job: dict[str, Any] | None = None
    retrain_steps: int | None = None
    step_seconds: dict[str, float] = field(default_factory=dict)
    plans: dict[str, Plan] = field(default_factory=dict)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: float = 0.0


_FIELDS = ComparisonState.__dataclass_fields__
_PATHS = ("settings", "inputs", "teacher_job")
"""Fields with paths, which are stored without those of this machine."""


def compare(settings: Compare, folder: Path) -> dict[str, Any]:
    """Run every system that fits the space, each in a run folder of its own, and write `compare.json` and a report.

    A system takes distiller, sharing, scorer, searcher and learning rates from the `small()` of its experiment file;
    space, data, teacher, budget, retraining steps and time are the comparison's. Each gets an equal part of the
    time that is left, in which its supernet's steps are planned by their measured speed; all students are retrained for
    the same number of steps. A system that cannot work on the space is listed with the reason. An interrupted
    comparison is resumed with its plans.

    Returns:
        The fields of `ComparisonState`: per system either `reason` or the student's accuracy with its 95 % interval,
        cost, seconds, the controls' accuracies and the sentences about both.

    Raises:
        ValueError: the folder holds something else, a comparison with other settings, data or files; the data or the
            teacher do not fit; or there are no labels.
        Infeasible: no network is within the budget.
    """
    data, check = _checked(settings, folder)
    comparison = _Comparison(settings, data, Path(folder))
    return comparison.held(check, comparison.run_systems)


def shared_compare(settings: Compare, folder: Path, url: str) -> dict[str, Any]:
    """As `compare`, together with all processes, on any hosts, that were given the same settings, folder and storage.

    The first process leads: it fits the teacher, plans every system with an equal part of the time, as many at once as
    there are processes then, and records. Each system is run by one process; one that is not heard of for 30
    seconds is gone on with by another.

    Args:
        settings: as `compare`.
        folder: as `compare`; all hosts share it.
        url: of a database for Optuna, such as `postgresql://me@host/name`.

    Returns:
        As `compare`, in every process.

    Raises:
        ValueError: as `compare`; or the storage cannot be used, the folder is another than that of the process that
            leads, or that was stopped.
    """
    from kdnas.jobs import _shared  # SQLAlchemy: half a second

    _shared.check_named(settings.to_json())
    folder = Path(folder)
    data, check = _checked(settings, folder)
    other = cache(lambda: _Comparison(settings, data, folder).contest(fits=False))

    def answer(request: Mapping[str, Any], number: int) -> dict[str, Any]:
        del number
        return {"end": _result(request["name"], request["plan"], other(), folder)}

    def lead(board: Any) -> dict[str, Any]:
        comparison = _Comparison(settings, data, folder)
        shared = _shared.SharedAnswers(board, answer, keeps=True)
        return comparison.held(check, lambda contest: comparison.share_systems(contest, shared))

    parts = {"settings": settings.to_json(), "data": data.fingerprint}
    result = _shared.led(url, f"kdnas compare {digest_of(parts)[:16]}", answer, lead, folder)
    return result or dict(read_comparison(folder))


def _checked(settings: Compare, folder: Path) -> tuple[Data, BudgetCheck]:
    """The data and the budget's check, once all that would end a comparison is refused."""
    data: Data = settings.data.build(Data)
    if isinstance(data.task, Similarity):
        raise ValueError(
            "a comparison measures students by labels, and these images have none. Give the images in class folders: "
            "nothing learns from their classes."
        )
    space = data.fitted(settings.space)
    check = BudgetCheck(space, settings.budget)
    check_feasible(check, python_rng(settings.seed, "feasible"))
    if not (folder / COMPARISON).exists():
        preflight(data, folder=folder, teacher=settings.teacher, space=space, budget=settings.budget)
    return data, check


def _result(name: str, plan: Plan, contest: Contest, folder: Path) -> dict[str, Any]:
    """The result of a system, or the reason why it has none."""
    started = time.perf_counter()
    try:
        result = contestant(name, contest).run(folder / name, plan)
    except Busy:
        raise
    except (ValueError, FloatingPointError) as error:
        return {"reason": _reason(error, folder)}
    return {**result, "seconds": round(time.perf_counter() - started, 1), "run": name}


def _reason(error: Exception, folder: Path) -> str:
    return str(error).replace(f"{folder}{os.sep}", "")


@final
class _Comparison:
    """A comparison in its folder; every decision is written before it is acted on."""

    def __init__(self, settings: Compare, data: Data, folder: Path) -> None:
        self.settings, self.data, self.folder = settings, data, folder
        self.state = _read_state(settings, data, folder)
        self.names = settings.systems or tuple(systems())
        self._began = time.perf_counter() - self.state.seconds

    def held(self, check: BudgetCheck, run_systems: Callable[[Contest], None]) -> dict[str, Any]:
        """The whole comparison, in which something runs the systems that are planned."""
        contest = self.contest()
        self.measure_steps(contest)
        self.plan_retraining(contest, check)
        run_systems(contest)
        self.measure_teacher(contest)
        write_comparison(self.folder)
        return dataclasses.asdict(self.state)

    def save(self) -> None:
        """Write the state."""
        self.state.seconds = round(time.perf_counter() - self._began, 3)
        _write_state(self.state, self.folder)

    @property
    def seconds_left(self) -> float:
        """Of the time for everything."""
        return self.settings.max_time - (time.perf_counter() - self._began)

    def leave_out(self, name: str, error: Exception) -> None:
        """Record why a system has no result."""
        self._record(name, {"reason": _reason(error, self.folder)})

    def contest(self, *, fits: bool = True) -> Contest:
        """What all systems have in common; the teacher is fitted where the settings name none, or was by another."""
        spec = self.settings.teacher
        if isinstance(spec, FitTeacher):
            spec = self._fit_teacher(spec) if fits else fitted_spec(spec, RunFolder(self.folder / "teacher"))
        return Contest(
            data_spec=self.settings.data,
            data=self.data,
            space=self.settings.space,
            teacher_spec=spec,
            teacher=build_teacher(spec, self.data),
            budget=self.settings.budget,
            seed=self.settings.seed,
        )

    def _fit_teacher(self, fit: FitTeacher) -> Spec:
        """The teacher fitted here, in a run of its own, with as many steps as its share of the time allows."""
        if self.state.teacher_job is None:
            blueprint = fitted_teacher(
                self.data.image, self.data.classes, fit.blocks, fit.width, dense=self.data.task.dense
            )
            each = timed_step(partial(Network, blueprint), FromLabels(), self.data, None, Recipe())
            epochs = 30 * len(self.data.train) // min(128, len(self.data.train))
            steps = max(LEAST_STEPS, min(epochs, int(_TEACHER_SHARE * self.settings.max_time / each)))
            recipe = dataclasses.replace(fit.recipe, steps=steps, seed=self.settings.seed)
            fit = dataclasses.replace(fit, recipe=recipe)
            self.state.teacher_job = {"teacher": unstructure(fit), "data": self.settings.data.to_json()}
            self.save()
        fit = structure(self.state.teacher_job["teacher"], FitTeacher)
        storage = RunFolder.create(self.folder / "teacher", self.state.teacher_job, fit.recipe.seed)
        return fit_teacher(fit, self.data, storage)

    def measure_teacher(self, contest: Contest) -> None:
        """The row of a teacher that was fitted here, once every system has chosen its student."""
        if self.state.teacher_job is not None and self.state.teacher is None:
            self.state.teacher = teacher_result(RunFolder(self.folder / "teacher"), contest.teacher, self.data)
            self.save()

    def measure_steps(self, contest: Contest) -> None:
        """Time a training step of every system, or leave it out."""
        for name in self.names:
            if name in self.state.step_seconds or name in self.state.results:
                continue
            try:
                self.state.step_seconds[name] = contestant(name, contest).step_seconds()
                self.save()
            except ValueError as error:
                self.leave_out(name, error)

    def plan_retraining(self, contest: Contest, check: BudgetCheck) -> None:
        """The number of steps for which every student is retrained."""
        state, left = self.state, self.seconds_left
        if state.retrain_steps is not None or not state.step_seconds:
            return
        make = partial(Network, check.space.blueprint(_typical_student(check, self.settings.seed)))
        each = timed_step(make, FromTeacher(), self.data, contest.teacher, Recipe())
        state.retrain_steps = max(LEAST_STEPS, int(RETRAIN_SHARE / 3 * left / len(state.step_seconds) / each))
        self.save()

    def run_systems(self, contest: Contest) -> None:
        """Plan and run every system that has no result yet, one after another."""
        left = self._left()
        for index, name in enumerate(left):
            if self._plans(name, index, len(left), contest):
                self._record(name, _result(name, self.state.plans[name], contest, self.folder))

    def share_systems(self, contest: Contest, shared: Answers) -> None:
        """Plan every system that has no result yet, and have them run side by side."""
        left = self._left()
        rounds = -(-len(left) // shared.count)
        planned = [name for name in left if self._plans(name, 0, rounds, contest)]
        requests = [{"kind": "system", "name": name, "plan": self.state.plans[name]} for name in planned]

        def tell(message: Mapping[str, Any]) -> None:
            if "result" in message and "end" in message["result"]:
                self._record(message["logs"], message["result"]["end"])

        shared.answers(requests, tell)

    def _left(self) -> list[str]:
        return [name for name in self.names if name in self.state.step_seconds and name not in self.state.results]

    def _plans(self, name: str, index: int, count: int, contest: Contest) -> bool:
        """Plan a system with its part of the time that is left, unless it is planned; False where it cannot be."""
        state = self.state
        assert state.retrain_steps is not None
        if name in state.plans:
            return True
        left, each = self.seconds_left, state.step_seconds[name]
        spare = f"{left:.0f} s left for all" if left > 0 else f"{-left:.0f} s over the time"
        say(f"compare: {name}, {index + 1} of {count}, {spare}")
        try:
            state.plans[name] = contestant(name, contest).plan(left / (count - index), each, state.retrain_steps)
            self.save()
        except ValueError as error:
            self.leave_out(name, error)
        return name in state.plans

    def _record(self, name: str, result: dict[str, Any]) -> None:
        self.state.results[name] = result
        if "reason" in result:
            say(f"compare: {name} is left out: {result['reason']}")
        self.save()


def _read_state(settings: Compare, data: Data, folder: Path) -> ComparisonState:
    """The state of the comparison in the folder, or a new one.

    Raises:
        ValueError: the folder holds something else, or a comparison with other settings, data or files.
    """
    if folder.is_file() or (folder.is_dir() and not (folder / COMPARISON).exists() and _foreign(folder)):
        raise ValueError(f"{folder} holds something else. Give --out a new or an empty folder.")
    hold(folder, inside=True)
    content: dict[str, Any] = {"systems": dict(systems())}
    if (folder / COMPARISON).exists():
        content = read_comparison(folder)
        known, pairs = moved(located(content["settings"], folder, folder), settings.to_json())
        name_again(pairs)
        content |= {name: located(content[name], folder, folder) for name in _PATHS if name in content}
        if other := _other(content | {"settings": known}, settings, data):
            forget(pairs)
            raise ValueError(
                f"{folder} holds a comparison with another {other}. Use another --out, or what that comparison began "
                "with to resume it."
            )
        settle(pairs)
    state = ComparisonState(**{k: v for k, v in content.items() if k in _FIELDS} | {"settings": settings.to_json()})
    if not state.data:
        inputs = [{"path": path, "sha256": digest} for path, digest in digests(state.settings).items()]
        state = dataclasses.replace(state, data=data.fingerprint, measure=data.task.measure, inputs=inputs)
        _write_state(state, folder)
    return state


def _other(content: dict[str, Any], settings: Compare, data: Data) -> str:
    """What differs from that with which a comparison began, in words; empty where nothing does."""
    for name, value in settings.to_json().items():
        if content["settings"].get(name) != value:
            return name
    if difference := changes(content.get("data", {}), data):
        return f"data: {difference}"
    altered = [each["path"] for each in content.get("inputs", []) if weights_digest(each["path"]) != each["sha256"]]
    return f"content of {altered[0]}" if altered else ""


def _write_state(state: ComparisonState, folder: Path) -> None:
    content = dataclasses.asdict(state)
    write_json(folder / COMPARISON, content | {name: portable(content[name], folder, folder) for name in _PATHS})


def _foreign(folder: Path) -> bool:
    return any(not is_lock(path.name) for path in folder.iterdir())


def _typical_student(check: BudgetCheck, seed: int) -> Architecture:
    """Of many networks within the budget the one with the most MACs."""
    space, rng = check.space, python_rng(seed, "example")
    samples = [space.smallest, space.largest, *(space.sample(rng) for _ in range(200))]
    admitted = [a for a in samples if check.admits(a)]
    return max(admitted or [space.smallest], key=lambda a: cost(space.blueprint(a)).macs)


def comparison_table(comparison: dict[str, Any]) -> str:
    """One row per system, best student first, and under it those that were left out."""
    ordered = best_first(comparison["results"])
    balances = any("balanced_accuracy" in r for _, r in ordered)

    def balanced(row: dict[str, Any]) -> str:
        value = row.get("balanced_accuracy")
        return "" if not balances else f"{'-':>10}" if value is None else f"{value:>10.2%}"

    lines = [
        f"{'system':<18}{'student':>9}  {'95 % interval':<18}{'balanced' * balances:>{10 * balances}}{'params':>11}"
        f"{'MACs':>14}{'seconds':>9}{'no teacher':>12}{'random':>9}"
    ]
    for name, r in ordered:
        low, high = r["interval"]
        alone, random = ("-" if r[key] is None else f"{r[key]:.2%}" for key in ("without teacher", "random"))
        lines.append(
            f"{name:<18}{r['accuracy']:>9.2%}  {f'[{low:.2%}, {high:.2%}]':<18}{balanced(r)}{r['params']:>11,}"
            f"{r['macs']:>14,}{r['seconds']:>9.0f}{alone:>12}{random:>9}"
        )
    if comparison["teacher"] is not None:
        t = comparison["teacher"]
        lines.append(
            f"{'teacher':<18}{t['accuracy']:>9.2%}  {'':<18}{balanced(t)}{t['params']:>11,}{t['macs']:>14,}"
            f"{t['seconds']:>9.0f}"
        )
    lines.append("")
    if len(ordered) > 1:
        lines += [
            verdict(ordered),
            "no teacher: the same student trained on labels alone; random: random subnets within the budget,",
            "trained alike. Seconds are a system's own, the teacher's training apart.",
        ]
    lines += [f"{name} is left out: {r['reason']}" for name, r in comparison["results"].items() if "reason" in r]
    return "\n".join(lines)
