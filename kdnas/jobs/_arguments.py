"""Settings from what a person types or hands over."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import nn
from torch.utils.data import Dataset

from kdnas.costs.budget import Budget
from kdnas.costs.elsewhere import adopt
from kdnas.costs.target import Target
from kdnas.data.base import Data
from kdnas.data.load import load_data
from kdnas.distillers.base import Distiller
from kdnas.distillers.from_labels import FromLabels
from kdnas.distillers.from_teacher import FromTeacher
from kdnas.jobs._memory import keep
from kdnas.jobs._run import Run
from kdnas.jobs.retrain import settings_of
from kdnas.runs.folder import RunFolder
from kdnas.runs.lock import hold
from kdnas.runs.places import moved
from kdnas.settings import CardTeacher, Experiment, FitTeacher, NoTeacher, Recipe, Retrain, TeacherChoice
from kdnas.space import SearchSpace
from kdnas.specs import Spec, find_spec, nearest, parse_spec, resolve, running, search_last, spec
from kdnas.tables import load_space, shared_folder, unstructure
from kdnas.tasks.lanes import Lanes
from kdnas.tasks.segmentation import Segmentation
from kdnas.teachers.load import load_teacher
from kdnas.teachers.zoo import Function
from kdnas.values import Seconds, check_value, real, seconds, shown

_Settings = TypeVar("_Settings")


def load_experiment(text: str) -> Experiment:
    """An experiment from a Python file, or from a file in `experiments/` by its name; see `load_settings`."""
    return load_settings(text, Experiment)


def load_settings(text: str, kind: type[_Settings]) -> _Settings:
    """What a function of a Python file returns, or of a file in `experiments/` by its name.

    The file defines `experiment()`, or any function named after a colon: `file.py:small`.

    Raises:
        ValueError: no such file or function, or it returns something else than the kind asked for.
    """
    place, _, function = text.partition(":")
    path = Path(place)
    if path.suffix != ".py":
        known = {p.stem: p for p in sorted(shared_folder("experiments").glob("*.py"))}
        if place not in known:
            raise ValueError(f"no experiment is named {shown(place)}.{nearest(place, known)}")
        path = known[place]
    else:
        search_last()  # the file is a person's, and imports what lies beside it
    if not path.is_file():
        raise ValueError(f"there is no file {path}. Give a Python file that defines experiment().")
    name = f"kdnas_experiment_{path.stem}"
    loader = importlib.util.spec_from_file_location(name, path)
    assert loader is not None
    assert loader.loader is not None
    module = importlib.util.module_from_spec(loader)
    sys.modules[name] = module
    with running(str(path)):
        loader.loader.exec_module(module)
    function = function or "experiment"
    if not hasattr(module, function):
        raise ValueError(f"{path} defines no {function}().{nearest(function, dir(module))}")
    with running(f"{function}() of {path}"):
        settings = getattr(module, function)()
    if not isinstance(settings, kind):
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        raise ValueError(
            f"{function}() of {path} must return {article} {kind.__name__}, it returned a {type(settings).__name__}."
        )
    return settings


def with_overrides(recipe: Recipe, options: Mapping[str, Any]) -> Recipe:
    """The recipe with some fields changed; options that are None are ignored.

    Raises:
        TypeError: an unknown option; the nearest is offered.
    """
    known = [field.name for field in dataclasses.fields(Recipe)]
    for name in options:
        if name not in known:
            raise TypeError(f"unexpected keyword argument {shown(name)}.{nearest(name, known)}")
    return dataclasses.replace(recipe, **{name: value for name, value in options.items() if value is not None})


def recipe_for(data: Data, options: Mapping[str, Any]) -> Recipe:
    """The recipe of a whole chain on this data: 30 epochs, at least 300 and at most 20,000 steps, and the options."""
    options = batch_for(data, options)
    steps = min(20_000, max(300, 30 * len(data.train) // options["batch_size"]))
    return with_overrides(Recipe(steps=steps), options)


def batch_for(data: Data, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a recipe with a batch size, where they have none.

    It is 128 images, or as many as the task evaluates together, where these are fewer: images with an answer for every
    pixel take that much more memory each.
    """
    given = {name: value for name, value in options.items() if value is not None}
    return {"batch_size": min(128, data.task.images_at_once, len(data.train)), **given}


def as_run(run: str | Path | Run, *, teacher: object = None, data: object = None, writes: bool = False) -> Run:
    """A run from its folder, with what it was started with and what is not there any more, or was in memory only.

    Args:
        run: the run or its folder.
        teacher: the teacher that it was started with, in memory or where it lies now; see `as_teacher`.
        data: its data, likewise.
        writes: lock the run for this command, and read it anew.

    Raises:
        ValueError: no run there, it was started with another teacher or other data, or another process writes there.
    """
    opened = run if isinstance(run, Run) else Run(Path(run))
    if writes and hold(opened.folder):
        opened.storage = RunFolder(opened.folder)
    train = opened.experiment.train
    for name, value, expected in (("teacher", teacher, train.teacher), ("data", data, train.data)):
        read: Callable[[Any], Spec | FitTeacher] = as_teacher if name == "teacher" else as_data
        source = None if value is None else read(value)
        if source not in (None, expected):
            new = unstructure(source)
            old, pairs = moved(unstructure(expected), new)
            if old != new:
                raise ValueError(f"`{name}` must be the one that {opened.storage.folder} was started with.")
            opened.storage.name_again(pairs)
            vars(opened).pop("experiment", None)
    return opened


def as_experiment(value: str | Experiment) -> Experiment:
    """An experiment from its file or name, or itself."""
    return value if isinstance(value, Experiment) else load_experiment(value)


def as_spec(package: str, value: str | Spec) -> Spec:
    """An algorithm of a kind from `NAME` or `NAME,key=value`, or its spec."""
    return value if isinstance(value, Spec) else parse_spec(package, value)


def as_space(value: str | Path | SearchSpace) -> SearchSpace:
    """A search space from its name or table, or itself."""
    return value if isinstance(value, SearchSpace) else load_space(value)


def as_budget(value: str | Sequence[str] | Budget, table: str | Path | None = None) -> Budget:
    """A budget from texts such as `macs=20M`, or itself; its latency is that of a table from another device, if given.

    Raises:
        ValueError: a text is no bound, the table is damaged, or it is given without a bound on latency.
    """
    budget = value if isinstance(value, Budget) else Budget.parse(listed(value))
    if table is None:
        return budget
    if "latency" not in budget.names or budget.target != Target():
        raise ValueError(
            f"`latency_table` is for a bound on latency without a target, got the budget {budget}. Add --budget "
            "latency=5ms."
        )
    return budget.with_target(adopt(Path(table)))


def as_data(value: str | Spec | Data | Dataset[Any]) -> Spec:
    """The spec of a data set from its text form, or of one in memory."""
    if isinstance(value, str):
        return load_data(value)
    return value if isinstance(value, Spec) else keep(value)


def of_task(data: Data, task: str | None) -> Data:
    """The data, if they are for this task.

    Args:
        data: any.
        task: its name, or None for whatever the data are for.

    Raises:
        ValueError: they are for another one.
    """
    if task in (None, data.task.name):
        return data
    fix = _SOURCES.get(task or "", "Drop it, or use other data.")
    raise ValueError(f"`task` must be that of the data, {data.task.name}, got {task!r}. {fix}")


_SOURCES = {
    Segmentation.name: "Images with masks are masks:FOLDER.",
    Lanes.name: "Images with lanes are culane:FOLDER, tusimple:FOLDER and roads:COUNT.",
}


def as_teacher(value: str | Spec | FitTeacher | nn.Module | Callable[..., Any]) -> Spec | FitTeacher:
    """A teacher from its text form, a spec, or a module or a function in memory."""
    if isinstance(value, str):
        return load_teacher(value)
    return value if isinstance(value, Spec | FitTeacher) else keep(_module(value))


def _module(value: Any) -> Any:
    """A function of images as a module; anything else as it is."""
    plain = isinstance(value, nn.Module | type) or hasattr(value, "__getitem__")
    return value if plain or not callable(value) else Function(value)


def listed(value: str | Sequence[str]) -> list[str]:
    """One text as a list of one; a sequence of texts as a list."""
    return [value] if isinstance(value, str) else list(value)


def as_seconds(value: float | str) -> float:
    """The seconds of a time.

    Raises:
        ValueError: another form, or a time that is not positive.
    """
    check_value("max_time", value, Seconds)
    return seconds(value) or 0.0


def retrain_settings(
    student: Path,
    *,
    weights: Any,
    teacher: str | Spec | nn.Module | NoTeacher | CardTeacher,
    distiller: str | Spec | None,
    loss: str | Sequence[str],
    recipe: Mapping[str, Any],
) -> tuple[Retrain, TeacherChoice]:
    """How a student is retrained, and under which teacher.

    Raises:
        ValueError: teacher, distiller and losses contradict each other.
    """
    choice = _teacher_choice(teacher)
    settings = settings_of(student)
    settings = dataclasses.replace(settings, recipe=with_overrides(settings.recipe, recipe))
    if weights is not None:
        settings = dataclasses.replace(settings, weights=weights)
    if distiller is not None:
        chosen = with_losses(as_spec("kdnas.distillers", distiller), loss)
        assert chosen is not None
        settings = dataclasses.replace(settings, distiller=chosen)
    elif loss:
        settings = dataclasses.replace(settings, distiller=terms_of(listed(loss)))
    elif isinstance(choice, NoTeacher):
        settings = dataclasses.replace(settings, distiller=spec(FromLabels))
    uses_teacher = settings.distiller.build(Distiller).uses_teacher
    if isinstance(choice, NoTeacher) and uses_teacher:
        option = "--distiller" if distiller is not None else "--loss"
        raise ValueError(f"{option} needs a teacher, got --teacher none. Drop one of the two.")
    if isinstance(choice, Spec) and not uses_teacher:
        raise ValueError(
            f"--teacher needs a distiller that uses a teacher, {settings.distiller.name} does not. Drop --teacher, or "
            "name another --distiller."
        )
    return settings, choice


def _teacher_choice(teacher: str | Spec | nn.Module | NoTeacher | CardTeacher) -> TeacherChoice:
    """The teacher of a retraining from `card`, `none`, or as `as_teacher`.

    Raises:
        ValueError: `fit`.
    """
    if isinstance(teacher, NoTeacher | CardTeacher):
        return teacher
    if teacher in ("card", "none"):
        return CardTeacher() if teacher == "card" else NoTeacher()
    source = as_teacher(teacher)
    if isinstance(source, FitTeacher):
        raise ValueError(
            "--teacher must be a trained one, got fit, which trains a teacher in a run. Drop --teacher for the "
            "student's own, or name another."
        )
    return source


def terms_of(texts: Sequence[str]) -> Spec:
    """FromTeacher with cross-entropy and the losses named `NAME` or `NAME=WEIGHT`, as `losses_of` reads them."""
    return spec(FromTeacher, terms=((1.0, find_spec("kdnas.losses", "cross_entropy")), *losses_of(texts)))


def with_losses(distiller: Spec | None, texts: str | Sequence[str]) -> Spec | None:
    """The distiller with these losses as its terms, as `losses_of` reads them; unchanged where there are none.

    Raises:
        ValueError: as `losses_of`, or there is no distiller, or it has no terms to change.
    """
    texts = listed(texts)
    if not texts:
        return distiller
    if distiller is None:
        raise ValueError("without a supernet no loss trains it. Drop --loss, or name a distiller.")
    changed = distiller.replace(terms=losses_of(texts))
    changed.build(Distiller)
    return changed


def losses_of(texts: Sequence[str]) -> tuple[tuple[float, Spec], ...]:
    """The losses named `NAME` or `NAME=WEIGHT`, each at its default weight, as an objective's terms.

    Options of a loss follow: `NAME,key=value` or `NAME=WEIGHT,key=value`.

    Raises:
        ValueError: an unknown loss or option (the nearest is offered) or a weight that is no number or negative.
    """
    terms: list[tuple[float, Spec]] = []
    for text in texts:
        head, comma, options = text.partition(",")
        name, _, number = head.partition("=")
        loss = parse_spec("kdnas.losses", f"{name},{options}") if comma else find_spec("kdnas.losses", name)
        try:
            weight = real(number) if number else getattr(resolve(loss.make), "weight", 1.0)
        except ValueError:
            weight = math.nan
        if not 0 <= weight < math.inf:
            raise ValueError(f"the weight of {name} must be a finite number of at least 0, got {number!r}.")
        terms.append((weight, loss))
    return tuple(terms)
