"""Training phases: the teacher, where one is trained here, and the supernet."""

import dataclasses
from pathlib import Path
from typing import Any

from kdnas.distillers.base import Distiller
from kdnas.distillers.from_labels import FromLabels
from kdnas.evaluation import accuracy, health, teacher_accuracy
from kdnas.jobs._run import Run, check_model_type
from kdnas.network import Network, default_device
from kdnas.randomness import initialised
from kdnas.runs.files import remove_drafts
from kdnas.runs.folder import CHECKPOINT, MEMBERS, SNAPSHOTS, TEACHER, RunFolder
from kdnas.settings import Experiment
from kdnas.specs import Spec
from kdnas.students.folder import Card, write_student
from kdnas.supernet import Supernet
from kdnas.teachers.cache import cached
from kdnas.teachers.fitted import fitted_teacher
from kdnas.training.driver import train_with_checkpoints
from kdnas.training.guard import Guard
from kdnas.training.loop import Training

TEACHER_CACHE = "teacher_cache"


def train(experiment: Experiment, folder: Path) -> Run:
    """Train the teacher and the supernet, where the run trains them; goes on where it was interrupted.

    Raises:
        ValueError: the folder holds something else, the data or the teacher do not fit.
    """
    check_model_type(experiment.train.distiller, Supernet)
    check_model_type(experiment.retrain.distiller, Network)
    storage = RunFolder.create(folder, experiment.to_json(), experiment.train.recipe.seed)
    run = Run(storage.folder)
    if experiment.train.teacher is None and storage.phase("teacher") is None:
        _train_teacher(run)
        run = Run(storage.folder)
    # What a kill left between the last line of a finished teacher and the end of its draft.
    for left in (*storage.folder.glob("teacher*.draft.safetensors"), *storage.folder.glob(".teacher*.draft")):
        left.unlink(missing_ok=True)
    if run.storage.phase("train") is None and experiment.train.distiller is not None:
        _train_supernet(run, experiment.train.distiller)
    return run


def _train_teacher(run: Run) -> None:
    settings, storage = run.experiment.train, run.storage
    last = settings.teacher_members
    rows = []
    for member in range(1, last + 1):
        phase = "teacher" if last == 1 else f"teacher {member}"
        rows.append(storage.phase(phase) or _train_member(run, phase, member))
    if last > 1:
        ensemble = Run(storage.folder).teacher.to(default_device())
        row = {name: sum(one[name] for one in rows) for name in ("params", "macs", "seconds")}
        storage.finish("teacher", accuracy=teacher_accuracy(ensemble, run.data.test), **row)
    storage.record_result({"name": "teacher", **storage.require("teacher", "kdnas train")})


def _train_member(run: Run, phase: str, member: int) -> dict[str, Any]:
    settings, data, storage = run.experiment.train, run.data, run.storage
    recipe = dataclasses.replace(settings.teacher_recipe, seed=settings.teacher_recipe.seed + member - 1)
    blueprint = fitted_teacher(data.image, data.classes, settings.teacher_blocks)
    network = initialised(lambda: Network(blueprint), recipe.seed)
    training = Training(network, FromLabels(label_smoothing=0.1), data, None, recipe, default_device())
    draft = storage.path(f"{phase.replace(' ', '-')}.draft.safetensors")
    card = Card.of(network, data, {"role": "teacher", "seed": recipe.seed})
    count = settings.teacher_snapshots
    due = {recipe.steps * k // count: k for k in range(1, count)}

    def keep(step: int) -> None:
        if step in due:
            write_student(storage.path(SNAPSHOTS, str(due[step])), network, card, deploy=False)

    seconds = train_with_checkpoints(
        training, phase, draft, storage, lambda: {"accuracy": accuracy(network, data.search, data)}, keep
    )
    found = accuracy(network, data.test, data)
    folder = storage.path(TEACHER) if member == settings.teacher_members else storage.path(MEMBERS, str(member))
    write_student(folder, network.cpu(), card, deploy=False)
    c = card.cost
    storage.finish(phase, seconds=seconds, accuracy=found, params=c.params, macs=c.macs)
    draft.unlink(missing_ok=True)
    return storage.require(phase, "kdnas train")


def _train_supernet(run: Run, taught: Spec) -> None:
    settings, storage = run.experiment.train, run.storage
    supernet = run.fresh_supernet()
    distiller = taught.build(Distiller)
    teacher, data, device = run.teacher, run.data, run.device
    cache = None
    if settings.teacher_views:
        options = {"seed": settings.recipe.seed, "views": settings.teacher_views, "limit": settings.cache_limit}
        cache = cached(storage.path(TEACHER_CACHE), teacher.to(device), data, device=device, **options)
    training = Training(supernet, distiller, data, teacher, settings.recipe, device, cache)
    guard = Guard(training, storage.path("healthy.safetensors"), rollback=settings.rollback)
    seconds = train_with_checkpoints(
        training, "train", storage.path(CHECKPOINT), storage, lambda: health(supernet, run.data), guard=guard
    )
    guard.place.unlink(missing_ok=True)
    remove_drafts(guard.place)
    storage.finish("train", seconds=seconds, steps=settings.recipe.steps, **health(supernet, run.data))
