"""Several systems on the same data, under the same teacher and budget, at equal cost: one table."""

import dataclasses
import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from kdnas.architecture import Architecture
from kdnas.costs.check import BudgetCheck, check_feasible
from kdnas.costs.count import cost
from kdnas.data.base import Data
from kdnas.distillers.from_labels import FromLabels
from kdnas.distillers.from_teacher import FromTeacher
from kdnas.jobs._contestants import LEAST_STEPS, RETRAIN_SHARE, Task, contestant, timed_step
from kdnas.jobs._run import build_teacher
from kdnas.jobs.chain import say
from kdnas.jobs.fit import fit_teacher
from kdnas.network import Network
from kdnas.randomness import python_rng
from kdnas.report.comparison import write_comparison
from kdnas.runs.files import write_json
from kdnas.runs.folder import COMPARISON, RunFolder
from kdnas.settings import Compare, FitTeacher, Recipe, systems
from kdnas.specs import Spec
from kdnas.tables import structure, unstructure
from kdnas.teachers.fitted import fitted_teacher

_TEACHER_SHARE = 0.10


def compare(settings: Compare, folder: Path) -> dict[str, Any]:
    """Run every system that fits the space, each in a run folder of its own, and write `compare.json` and a report.

    A system is what its experiment file's `small()` says of distiller, sharing, scorer, searcher and learning rates;
    space, data, teacher, budget, retraining steps and time are the comparison's. Each gets an equal part of the
    time that is left, in which its supernet's steps are planned by their measured speed; all students are retrained for
    the same number of steps. A system that cannot work on the space is listed with the reason. An interrupted
    comparison goes on, with the plans it made.

    Returns:
        `settings`, `teacher`, and per system either `reason` or the student's accuracy with its 95 % interval, cost,
        seconds, the controls' accuracies and what the run says of both.

    Raises:
        ValueError: the folder holds something else, or the data or the teacher do not fit.
        Infeasible: no network is within the budget.
    """
    folder = Path(folder)
    data: Data = settings.data.build(Data)
    space = settings.space.fitted(classes=data.classes, image_channels=data.channels)
    meter = BudgetCheck(space, settings.budget)
    check_feasible(meter, python_rng(settings.seed, "feasible"))
    held = _opened(settings, folder)
    began = time.perf_counter() - held["seconds"]

    def save() -> None:
        held["seconds"] = round(time.perf_counter() - began, 3)
        write_json(folder / COMPARISON, held)

    teacher_spec = settings.teacher
    if isinstance(teacher_spec, FitTeacher):
        teacher_spec = _fit_teacher(teacher_spec, settings, data, folder, held, save)
    task = Task(
        data=settings.data,
        loaded=data,
        space=settings.space,
        teacher=teacher_spec,
        taught=build_teacher(teacher_spec, data),
        budget=settings.budget,
        seed=settings.seed,
    )
    names = settings.systems or tuple(systems())
    for name in names:
        if name not in held["step_seconds"] and name not in held["results"]:
            try:
                held["step_seconds"][name] = contestant(name, task).step_seconds()
            except ValueError as error:
                held["results"][name] = {"reason": str(error)}
                say(f"compare: {name} is left out: {error}")
            save()
    fitting = [name for name in names if name in held["step_seconds"]]
    if held["retrain_steps"] is None and fitting:
        left = settings.max_time - (time.perf_counter() - began)
        make = partial(Network, space.blueprint(_example(meter, settings.seed)))
        each = timed_step(make, FromTeacher(), data, task.taught, Recipe())
        held["retrain_steps"] = max(LEAST_STEPS, int(RETRAIN_SHARE / 3 * left / len(fitting) / each))
        save()
    for index, name in enumerate(fitting):
        if name in held["results"]:
            continue
        try:
            system = contestant(name, task)
            if name not in held["plans"]:
                left = settings.max_time - (time.perf_counter() - began)
                say(f"compare: {name}, {index + 1} of {len(fitting)}, {left:.0f} s left for all")
                share = left / (len(fitting) - index)
                held["plans"][name] = system.plan(share, held["step_seconds"][name], held["retrain_steps"])
                save()
            started = time.perf_counter()
            found = system.run(folder / name, held["plans"][name])
            held["results"][name] = {**found, "seconds": round(time.perf_counter() - started, 1), "run": name}
        except (ValueError, FloatingPointError) as error:
            held["results"][name] = {"reason": str(error)}
            say(f"compare: {name} is left out: {error}")
        save()
    write_comparison(folder)
    return held


def _opened(settings: Compare, folder: Path) -> dict[str, Any]:
    path = folder / COMPARISON
    if path.exists():
        try:
            held = json.loads(path.read_text())
            asked = held["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error!r}). Start again in another folder.") from error
        for key, value in settings.to_json().items():
            if asked.get(key) != value:
                raise ValueError(
                    f"{folder} holds a comparison with another {key}. Use another --out, or the settings it was begun "
                    "with to resume it."
                )
        return held
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"{folder} holds something else. Give --out a new or an empty folder.")
    folder.mkdir(parents=True, exist_ok=True)
    held = {"settings": settings.to_json(), "teacher": None, "retrain_steps": None, "step_seconds": {}}
    held |= {"plans": {}, "results": {}, "seconds": 0.0, "systems": systems()}
    write_json(path, held)
    return held


def _fit_teacher(fit: FitTeacher, settings: Compare, data: Data, folder: Path, held: dict[str, Any], save: Any) -> Spec:
    """The teacher fitted here, in a run of its own, with as many steps as its share of the time allows."""
    if "teacher_job" not in held:
        blueprint = fitted_teacher(data.image, data.classes, fit.blocks)
        each = timed_step(partial(Network, blueprint), FromLabels(), data, None, Recipe())
        epochs = 30 * len(data.train) // min(128, len(data.train))
        steps = max(LEAST_STEPS, min(epochs, int(_TEACHER_SHARE * settings.max_time / each)))
        fit = dataclasses.replace(fit, recipe=dataclasses.replace(fit.recipe, steps=steps, seed=settings.seed))
        held["teacher_job"] = {"teacher": unstructure(fit), "data": settings.data.to_json()}
        save()
    fit = structure(held["teacher_job"]["teacher"], FitTeacher)
    storage = RunFolder.create(folder / "teacher", held["teacher_job"], fit.recipe.seed)
    teacher = fit_teacher(fit, data, storage)
    held["teacher"] = storage.require("teacher", "kdnas compare")
    save()
    return teacher


def _example(meter: BudgetCheck, seed: int) -> Architecture:
    """Of many networks within the budget the one with the most MACs: what students will be like."""
    space, rng = meter.space, python_rng(seed, "example")
    drawn = [space.smallest, space.largest, *(space.sample(rng) for _ in range(200))]
    admitted = [a for a in drawn if meter.admits(a)]
    return max(admitted or [space.smallest], key=lambda a: cost(space.blueprint(a)).macs)


def comparison_table(held: dict[str, Any]) -> str:
    """One row per system, best student first, and under it those that were left out."""
    lines = [
        f"{'system':<18}{'student':>9}  {'95 % interval':<18}{'params':>11}{'MACs':>14}{'seconds':>9}"
        f"{'no teacher':>12}{'random':>9}"
    ]
    done = {name: r for name, r in held["results"].items() if "reason" not in r}
    for name, r in sorted(done.items(), key=lambda item: (-item[1]["accuracy"], item[1]["macs"], item[0])):
        low, high = r["interval"]
        alone, drawn = ("-" if r[key] is None else f"{r[key]:.2%}" for key in ("without teacher", "random"))
        lines.append(
            f"{name:<18}{r['accuracy']:>9.2%}  {f'[{low:.2%}, {high:.2%}]':<18}{r['params']:>11,}{r['macs']:>14,}"
            f"{r['seconds']:>9.0f}{alone:>12}{drawn:>9}"
        )
    if held["teacher"] is not None:
        t = held["teacher"]
        lines.append(
            f"{'teacher':<18}{t['accuracy']:>9.2%}  {'':<18}{t['params']:>11,}{t['macs']:>14,}{t['seconds']:>9.0f}"
        )
    lines += ["", *_verdict(done)]
    lines += [f"{name} is left out: {r['reason']}" for name, r in held["results"].items() if "reason" in r]
    return "\n".join(lines)


def _verdict(done: dict[str, dict[str, Any]]) -> Sequence[str]:
    if len(done) < 2:
        return []
    ordered = sorted(done.items(), key=lambda item: -item[1]["accuracy"])
    best, top = ordered[0]
    alike = [name for name, r in ordered[1:] if r["interval"][1] >= top["interval"][0]]
    said = f"Best: {best}."
    if alike:
        said += f" On these test images and one seed it is not distinguishable from {', '.join(alike)}."
    lines = [said]
    lines.append("no teacher: the same student trained on labels alone; random: random subnets within the budget,")
    lines.append("trained alike. Seconds are a system's own, the teacher's training apart.")
    return lines
