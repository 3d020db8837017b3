"""What is wrong with an installation, data, a teacher or the settings of a run, before hours are spent on them."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, final

from kdnas.data.base import Data
from kdnas.jobs._arguments import as_teacher, of_task
from kdnas.jobs._checks import check_experiment
from kdnas.jobs._preflight.cost import cost_findings, recipe_findings
from kdnas.jobs._preflight.data import data_findings, every_image, size_findings, stride_findings
from kdnas.jobs._preflight.findings import Finding, Kind
from kdnas.jobs._preflight.machine import folder_findings, installation
from kdnas.jobs._preflight.teacher import fitted_finding, teacher_findings
from kdnas.jobs._rehearsal import phases, rehearsal, short_recipe, short_teacher, shortened
from kdnas.jobs._unlabelled import data_of
from kdnas.jobs.prune import prune
from kdnas.runs.folder import METRICS, RunFolder
from kdnas.settings import Experiment, FitTeacher, Prune
from kdnas.specs import Spec

_STEPS, _EVALUATIONS = 3, 3
_RISE = 3.0  # times the first loss
_MARKS: dict[Kind, str] = {"fact": "ok", "note": "note", "fault": "FAULT"}
_Result = TypeVar("_Result")


@final
class _Diagnosis(list[Finding]):
    """The findings so far."""

    def attempt(self, subject: str, action: Callable[[], _Result]) -> _Result | None:
        """What the action returns; None and a fault where it raises."""
        try:
            return action()
        except Exception as error:  # data, teachers and spaces are other people's code
            text = str(error).strip() or type(error).__name__
            text = text if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {text}"
            if all(finding.text != text for finding in self):
                self.append(Finding(subject, text, "fault"))
            return None

    def gather(self, subject: str, action: Callable[[], list[Finding]]) -> None:
        """Add the action's findings, or a fault where it raises."""
        self += [finding for finding in self.attempt(subject, action) or [] if finding not in self]


def doctor(options: Mapping[str, Any], make: Callable[[], Experiment | Prune]) -> list[Finding]:
    """Check installation, folder, data, teacher and settings, and take a few steps of every phase.

    Args:
        options: the arguments of `kdnas run`; what is not given is not checked.
        make: makes the settings of the run that they ask for.

    Returns:
        Facts, notes and faults, in the order of the checks; a fault ends the checks of what depends on it.
    """
    diagnosis = _Diagnosis(installation())
    diagnosis.gather("folder", lambda: folder_findings(Path(options["out"])))
    settings = None
    source, teacher = options["data"], None
    if options["experiment"] is not None:
        settings = diagnosis.attempt("experiment", make)
        source = None if settings is None else _parts(settings)[0]
    if source is None:
        return diagnosis

    def read() -> Data:
        teacher = as_teacher(options["teacher"]) if options["unlabelled"] else FitTeacher()
        spec = data_of(source, teacher, unlabelled=options["unlabelled"])
        return of_task(spec.build(Data), options["task"])

    data = diagnosis.attempt("data", read)
    if data is None:
        return diagnosis
    diagnosis.gather("data", lambda: data_findings(data))
    diagnosis.gather("data", lambda: every_image(data))
    if settings is None:
        teacher = diagnosis.attempt("teacher", lambda: as_teacher(options["teacher"]))
        if options["space"] is not None or options["budget"]:
            settings = diagnosis.attempt("settings", make)
    else:
        teacher = _parts(settings)[1]
    if teacher is not None:
        diagnosis.gather("teacher", lambda: _of_teacher(teacher, data))
    if settings is not None:
        _check_settings(diagnosis, settings, data, options)
        _rehearse(diagnosis, settings, deploy=options["deploy"])
    return diagnosis


def _parts(settings: Experiment | Prune) -> tuple[Spec, Spec | FitTeacher]:
    """Data and teacher of a run."""
    return (
        (settings.data, settings.teacher)
        if isinstance(settings, Prune)
        else (settings.train.data, settings.train.teacher)
    )


def _of_teacher(teacher: Spec | FitTeacher, data: Data) -> list[Finding]:
    return [fitted_finding(teacher, data)] if isinstance(teacher, FitTeacher) else teacher_findings(teacher, data)[0]


def _check_settings(
    diagnosis: _Diagnosis, settings: Experiment | Prune, data: Data, options: Mapping[str, Any]
) -> None:
    """What can be said of space, recipes, budget and disk without a step."""
    recipes = {settings.retrain} if isinstance(settings, Prune) else {settings.train.recipe, settings.retrain.recipe}
    for recipe in recipes:
        diagnosis.gather("training", lambda recipe=recipe: recipe_findings(recipe, data))
    if isinstance(settings, Prune):
        return
    train = settings.train
    fitting = diagnosis.attempt("space", lambda: data.fitted(train.space))
    if fitting is None:
        return
    decided = options["size"] is not None
    diagnosis.gather("student", lambda: size_findings(data, fitting.resolutions, decided=decided))
    diagnosis.gather("student", lambda: stride_findings(fitting))
    diagnosis.attempt("settings", lambda: check_experiment(settings, fitting))
    folder = Path(options["out"])
    diagnosis.gather("training", lambda: cost_findings(fitting, None, settings.train.recipe, 0.0, folder))


def _rehearse(diagnosis: _Diagnosis, settings: Experiment | Prune, *, deploy: bool) -> None:
    """A few steps of every phase, unless a fault says already that the run cannot begin."""
    if any(finding.kind == "fault" for finding in diagnosis if finding.subject in ("settings", "space", "student")):
        return
    with rehearsal() as folder:
        steps = _steps(settings, folder, deploy=deploy)
        name: str | None = "training"
        while name:
            name = diagnosis.attempt(name, lambda: next(steps))
        if name is not None:
            diagnosis.append(Finding("phases", f"{_STEPS} steps of every phase, up to the student folder, went well"))
        if folder.is_dir():
            diagnosis += _rising(RunFolder(folder, strict=False, builds=False).lines(METRICS))


def _steps(settings: Experiment | Prune, folder: Path, *, deploy: bool) -> Iterator[str]:
    """Run every phase in small; yields the name of the one that comes next."""
    if isinstance(settings, Experiment):
        for name, _ in phases(shortened(settings, _STEPS, _EVALUATIONS, cheap=True), folder, deploy=deploy):
            yield name
        return
    teacher = settings.teacher
    few = dataclasses.replace(
        settings,
        num_candidates=_EVALUATIONS,
        finalists=1,
        controls=False,
        recipe=short_recipe(settings.recipe, _STEPS),
        retrain=short_recipe(settings.retrain, _STEPS),
        teacher=short_teacher(teacher, _STEPS) if isinstance(teacher, FitTeacher) else teacher,
    )
    prune(few, folder, deploy=deploy)
    yield ""


def _rising(lines: list[dict[str, Any]]) -> list[Finding]:
    """A note for each training whose first loss rose manifold within the few steps."""
    first: dict[str, float] = {}
    last: dict[str, tuple[str, float]] = {}
    for line in lines:
        for name, value in [*(line.get("losses") or {}).items()][:1]:
            first.setdefault(line["phase"], value)
            last[line["phase"]] = name, value
    return [
        Finding(
            phase,
            f"the loss {name!r} rose from {first[phase]:.3g} to {value:.3g} within {_STEPS} steps. Lower "
            "--learning-rate, or clip gradients (--clip).",
            "note",
        )
        for phase, (name, value) in last.items()
        if value > _RISE * abs(first[phase]) + 1
    ]


def text_of(findings: list[Finding]) -> str:
    """A line per finding, and how many faults there are."""
    width = max(len(finding.subject) for finding in findings)
    lines = [f"{_MARKS[f.kind]:<6} {f.subject:<{width}}  {_sentence(f.text)}" for f in findings]
    counts = {kind: sum(finding.kind == kind for finding in findings) for kind in _MARKS}
    return "\n".join([*lines, "", f"{counts['fault']} faults, {counts['note']} notes"])


def _sentence(text: str) -> str:
    return text if text.endswith(".") or "\n" in text else f"{text}."
