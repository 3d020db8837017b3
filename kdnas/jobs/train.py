"""Training phases: the teacher, where one is trained here, and the supernet."""

import dataclasses
from pathlib import Path
from typing import Any

from kdnas.costs.count import cost
from kdnas.distillers.base import Distiller
from kdnas.distillers.from_labels import FromLabels
from kdnas.evaluation import accuracy, health, teacher_accuracy
from kdnas.jobs._run import Opened, check_teaches
from kdnas.network import Network, default_device
from kdnas.randomness import initialised
from kdnas.runs.files import remove_drafts
from kdnas.runs.folder import CHECKPOINT, MEMBERS, SNAPSHOTS, TEACHER, Run
from kdnas.settings import Experiment
from kdnas.specs import Spec
from kdnas.students.folder import Card, write_student
from kdnas.supernet import Supernet
from kdnas.teachers.cache import cached
from kdnas.teachers.fitted import fitted_teacher
from kdnas.training.driver import drive
from kdnas.training.guard import Guard
from kdnas.training.loop import Training

TEACHER_CACHE = "teacher_cache"


def train(experiment: Experiment, folder: Path) -> Opened:
    """Train the teacher and the supernet, where the run trains them; goes on where it was interrupted.

    Raises:
        ValueError: the folder holds something else, the data or the teacher do not fit.
    """
    check_teaches(experiment.train.distiller, Supernet)
    check_teaches(experiment.retrain.distiller, Network)
    run = Run.create(folder, experiment.to_json(), experiment.train.recipe.seed)
    opened = Opened(run.folder)
    if experiment.train.teacher is None and run.phase("teacher") is None:
        _train_teacher(opened)
        opened = Opened(run.folder)
    # What a kill left between the last line of a finished teacher and the end of its draft.
    for left in (*run.folder.glob("teacher*.draft.safetensors"), *run.folder.glob(".teacher*.draft")):
        left.unlink(missing_ok=True)
    if opened.run.phase("train") is None and experiment.train.distiller is not None:
        _train_supernet(opened, experiment.train.distiller)
    return opened


def _train_teacher(opened: Opened) -> None:
    settings, run = opened.experiment.train, opened.run
    last = settings.teacher_members
    rows = []
    for member in range(1, last + 1):
        phase = "teacher" if last == 1 else f"teacher {member}"
        rows.append(run.phase(phase) or _train_member(opened, phase, member))
    if last > 1:
        ensemble = Opened(run.folder).teacher.to(default_device())
        row = {name: sum(one[name] for one in rows) for name in ("params", "macs", "seconds")}
        run.finish("teacher", accuracy=teacher_accuracy(ensemble, opened.data.test), **row)
    run.record_result({"name": "teacher", **run.require("teacher", "kdnas train")})


def _train_member(opened: Opened, phase: str, member: int) -> dict[str, Any]:
    settings, data, run = opened.experiment.train, opened.data, opened.run
    recipe = dataclasses.replace(settings.teacher_recipe, seed=settings.teacher_recipe.seed + member - 1)
    image = (data.channels, data.preprocessing.height, data.preprocessing.width)
    blueprint = fitted_teacher(image, data.classes, settings.teacher_blocks)
    network = initialised(lambda: Network(blueprint), recipe.seed)
    training = Training(network, FromLabels(label_smoothing=0.1), data, None, recipe, default_device())
    draft = run.path(f"{phase.replace(' ', '-')}.draft.safetensors")
    card = Card(
        architecture=None,
        space=None,
        blueprint=blueprint,
        cost=cost(blueprint),
        preprocessing=data.preprocessing,
        class_names=data.class_names,
        origin={"role": "teacher", "seed": recipe.seed},
    )
    count = settings.teacher_snapshots
    due = {recipe.steps * k // count: k for k in range(1, count)}

    def keep(step: int) -> None:
        if step in due:
            write_student(run.path(SNAPSHOTS, str(due[step])), network, card, deploy=False)

    seconds = drive(training, phase, draft, run, lambda: {"accuracy": accuracy(network, data.search, data)}, keep)
    found = accuracy(network, data.test, data)
    folder = run.path(TEACHER) if member == settings.teacher_members else run.path(MEMBERS, str(member))
    write_student(folder, network.cpu(), card, deploy=False)
    c = card.cost
    run.finish(phase, seconds=seconds, accuracy=found, params=c.params, macs=c.macs)
    draft.unlink(missing_ok=True)
    return run.require(phase, "kdnas train")


def _train_supernet(opened: Opened, taught: Spec) -> None:
    settings, run = opened.experiment.train, opened.run
    supernet = opened.fresh_supernet()
    distiller = taught.build(Distiller)
    teacher, data, device = opened.teacher, opened.data, opened.device
    cache = None
    if settings.teacher_views:
        options = {"seed": settings.recipe.seed, "views": settings.teacher_views, "limit": settings.cache_limit}
        cache = cached(run.path(TEACHER_CACHE), teacher.to(device), data, device=device, **options)
    training = Training(supernet, distiller, data, teacher, settings.recipe, device, cache)
    guard = Guard(training, run.path("healthy.safetensors"), rollback=settings.rollback)
    seconds = drive(training, "train", run.path(CHECKPOINT), run, lambda: health(supernet, opened.data), guard=guard)
    guard.place.unlink(missing_ok=True)
    remove_drafts(guard.place)
    run.finish("train", seconds=seconds, steps=settings.recipe.steps, **health(supernet, opened.data))
