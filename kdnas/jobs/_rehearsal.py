"""A few steps of every phase of a run, in a folder that is thrown away."""

import contextlib
import dataclasses
import inspect
import logging
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import torch

from kdnas.jobs._run import insisting
from kdnas.jobs.export import export
from kdnas.jobs.finals import finals
from kdnas.jobs.search import search
from kdnas.jobs.train import train
from kdnas.settings import Experiment, FitTeacher, Recipe, Search
from kdnas.specs import Spec, resolve

_Changed = TypeVar("_Changed")
_REFERENCES = {"num_reference": 8, "steps": 3}
"""Arguments of a scorer that say how long it takes, and small values of them."""


@contextlib.contextmanager
def rehearsal() -> Iterator[Path]:
    """An empty folder for one; inside, kdnas logs errors only, and no generator of this process moves on."""
    logger = logging.getLogger("kdnas")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with tempfile.TemporaryDirectory(prefix="kdnas-") as folder, insisting(True), torch.random.fork_rng(devices=[]):
            yield Path(folder) / "run"
    finally:
        logger.setLevel(level)


def shortened(experiment: Experiment, steps: int, evaluations: int, *, cheap: bool) -> Experiment:
    """The experiment with trainings of a few steps, each at its highest learning rate, and few candidates.

    Args:
        experiment: all settings.
        steps: of every training.
        evaluations: of every search.
        cheap: also with one finalist and one control, a few images for the scores, and a scorer that does little.
    """
    teacher, searching = experiment.train.teacher, _searched(experiment.search, evaluations, cheap=cheap)
    assert searching is not None
    if isinstance(teacher, FitTeacher):
        teacher = short_teacher(teacher, steps)
    settings = dataclasses.replace(
        experiment.train, teacher=teacher, recipe=short_recipe(experiment.train.recipe, steps)
    )
    retrain = dataclasses.replace(experiment.retrain, recipe=short_recipe(experiment.retrain.recipe, steps))
    final = dataclasses.replace(experiment.finals, max_time=1e9)
    if cheap:
        final = dataclasses.replace(
            final, finalists=1, seeds=1, controls=("labels",) if "labels" in final.controls else ()
        )
    return dataclasses.replace(
        experiment,
        train=settings,
        search=searching,
        second=_searched(experiment.second, evaluations, cheap=cheap),
        retrain=retrain,
        finals=final,
    )


def short_teacher(teacher: FitTeacher, steps: int) -> FitTeacher:
    """A teacher that is trained for so many steps, or as many as it has snapshots."""
    return dataclasses.replace(teacher, recipe=short_recipe(teacher.recipe, max(steps, teacher.snapshots)))


def short_recipe(recipe: Recipe, steps: int) -> Recipe:
    """The recipe with so many steps at its highest learning rate."""
    return dataclasses.replace(recipe, steps=min(steps, recipe.steps), warmup=0.0, floor=1.0)


def _searched(settings: Search | None, evaluations: int, *, cheap: bool) -> Search | None:
    if settings is None:
        return None
    count = min(evaluations, settings.num_evaluations)
    settings = dataclasses.replace(settings, num_evaluations=count, initial=min(settings.initial, count), max_time=1e9)
    if not cheap:
        return settings
    contrast = None if settings.contrast is None else _cheaper(settings.contrast)
    return dataclasses.replace(
        settings, num_images=min(32, settings.num_images), scorer=_cheaper(settings.scorer), contrast=contrast
    )


def _cheaper(scorer: Spec) -> Spec:
    """The scorer with few references or steps, where it takes any and is built with them."""
    known = inspect.signature(resolve(scorer.make)).parameters
    changed = scorer.replace(**{name: value for name, value in _REFERENCES.items() if name in known})
    try:
        changed.build()
    except ValueError:  # such as too few steps for its rungs
        return scorer
    return changed


def phases(experiment: Experiment, folder: Path, *, deploy: bool) -> Iterator[tuple[str, float]]:
    """Run the phases one by one; each is yielded before it begins, with the seconds of the one before."""
    yield "training", 0.0
    began = time.perf_counter()
    run = train(experiment, folder, size_chosen=True)
    yield "search", time.perf_counter() - began
    began = time.perf_counter()
    search(run, experiment.search)
    if experiment.second is not None:
        search(run, experiment.second)
    yield "export", time.perf_counter() - began
    began = time.perf_counter()
    run.storage.finish("export", **export(run, deploy=False))
    yield "finals", time.perf_counter() - began
    began = time.perf_counter()
    finals(run, experiment.finals, experiment.retrain, deploy=deploy)
    yield "", time.perf_counter() - began
