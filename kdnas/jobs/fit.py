"""Fitting a teacher where the user has none."""

import dataclasses
from typing import Any

from kdnas.data.base import Data
from kdnas.distillers.from_labels import FromLabels
from kdnas.evaluation import accuracy, teacher_accuracy
from kdnas.jobs._run import build_teacher, fitted_spec
from kdnas.network import Network, default_device
from kdnas.randomness import initialised
from kdnas.runs.folder import MEMBERS, SNAPSHOTS, TEACHER, RunFolder
from kdnas.settings import FitTeacher
from kdnas.specs import Spec
from kdnas.students.card import Card
from kdnas.students.folder import write_student
from kdnas.teachers.fitted import fitted_teacher
from kdnas.training.driver import train_with_checkpoints
from kdnas.training.loop import Training


def fit_teacher(settings: FitTeacher, data: Data, storage: RunFolder) -> Spec:
    """Train the teachers of a run, where they are not finished, and return the spec of the run's teacher.

    Args:
        settings: size, number and training of the teachers.
        data: what they are trained on.
        storage: the run; its phase `teacher` and its row `teacher` of the closing table are recorded.
    """
    if storage.phase("teacher") is None:
        rows = []
        for member in range(1, settings.members + 1):
            phase = "teacher" if settings.members == 1 else f"teacher {member}"
            rows.append(storage.phase(phase) or _fit_member(settings, data, storage, phase, member))
        if settings.members > 1:
            ensemble = build_teacher(fitted_spec(settings, storage), data).to(default_device())
            sums = {name: sum(row[name] for row in rows) for name in ("params", "macs", "seconds")}
            storage.finish("teacher", accuracy=teacher_accuracy(ensemble, data.test), **sums)
        storage.record_result({"name": "teacher", **storage.require("teacher", "kdnas train")})
    # What a kill left between the last line of a finished teacher and the end of its draft.
    for draft in (*storage.folder.glob("teacher*.draft.safetensors"), *storage.folder.glob(".teacher*.draft")):
        draft.unlink(missing_ok=True)
    return fitted_spec(settings, storage)


def _fit_member(settings: FitTeacher, data: Data, storage: RunFolder, phase: str, member: int) -> dict[str, Any]:
    recipe = dataclasses.replace(settings.recipe, seed=settings.recipe.seed + member - 1)
    blueprint = fitted_teacher(data.image, data.classes, settings.blocks)
    network = initialised(lambda: Network(blueprint), recipe.seed)
    training = Training(network, FromLabels(label_smoothing=0.1), data, None, recipe, default_device())
    checkpoint = storage.path(f"{phase.replace(' ', '-')}.draft.safetensors")
    card = Card.of(network, data, {"role": "teacher", "seed": recipe.seed})
    snapshot_at = {recipe.steps * k // settings.snapshots: k for k in range(1, settings.snapshots)}

    def keep_snapshot(step: int) -> None:
        if step in snapshot_at:
            write_student(storage.path(SNAPSHOTS, str(snapshot_at[step])), network, card, deploy=False)

    watch = lambda: {"accuracy": accuracy(network, data.search, data)}  # noqa: E731
    seconds = train_with_checkpoints(training, phase, checkpoint, storage, watch, keep_snapshot)
    test_accuracy = accuracy(network, data.test, data)
    folder = storage.path(TEACHER) if member == settings.members else storage.path(MEMBERS, str(member))
    write_student(folder, network.cpu(), card, deploy=False)
    storage.finish(phase, seconds=seconds, accuracy=test_accuracy, params=card.cost.params, macs=card.cost.macs)
    checkpoint.unlink(missing_ok=True)
    return storage.require(phase, "kdnas train")
