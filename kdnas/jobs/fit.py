"""Fitting a teacher where the user has none, in a run or by itself."""

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kdnas.data.base import Data, prepare
from kdnas.distillers.base import Batch, Distiller, Parallel, Step
from kdnas.distillers.from_teacher import FromTeacher
from kdnas.evaluation import accuracy, measure_of, teacher_accuracy, teacher_row
from kdnas.jobs._preflight import judge_fitted, preflight
from kdnas.jobs._run import build_teacher, fitted_spec, insisting, record_data
from kdnas.losses.base import Loss
from kdnas.network import Network, default_device
from kdnas.outputs import Outputs
from kdnas.preprocessing import Preprocessing
from kdnas.randomness import initialised
from kdnas.runs.folder import MANIFEST, MEMBERS, SNAPSHOTS, TEACHER, RunFolder
from kdnas.settings import Fit, FitTeacher
from kdnas.specs import Spec, spec
from kdnas.students.card import FINGERPRINT, Card
from kdnas.students.folder import write_student
from kdnas.tables import unstructure
from kdnas.teachers.base import Frozen, Teacher
from kdnas.teachers.fitted import fitted_teacher
from kdnas.teachers.stages import logits_of, run
from kdnas.teachers.zoo import is_segmenter, load_weights, student_teacher, whole, write_zoo_teacher, zoo_network
from kdnas.training.driver import train_with_checkpoints
from kdnas.training.loop import Training

_log = logging.getLogger(__name__)
_FEW_STEPS = 10
_COSTS = ("params", "macs", "seconds")


Losses = tuple[tuple[float, Spec], ...]


def fit_teacher(settings: FitTeacher, data: Data, storage: RunFolder, losses: Losses = ()) -> Spec:
    """Train the teachers of a run, where they are not finished, and return the spec of the run's teacher.

    Args:
        settings: size, number and training of the teachers.
        data: what they are trained on.
        storage: the run; its phase `teacher` is recorded, without an accuracy on the test part: see `teacher_result`.
        losses: of the networks' own outputs, beside that of the labels: pairs of weight and loss.

    Raises:
        ValueError: the trained teacher's accuracy on the search part is near chance, unless inside of
            `insisting(True)`. Of a trial of the command, fewer than 10 steps or at most an epoch, it is a warning.
    """
    if storage.phase("teacher") is None:
        rows = []
        for member in range(1, settings.members + 1):
            phase = "teacher" if settings.members == 1 else f"teacher {member}"
            rows.append(storage.phase(phase) or _fit_member(settings, data, storage, phase, member, losses))
        if settings.members > 1:
            ensemble = build_teacher(fitted_spec(settings, storage), data).to(default_device())
            sums = {name: sum(row[name] for row in rows) for name in _COSTS}
            storage.finish("teacher", search_accuracy=teacher_accuracy(ensemble, data.search, data), **sums)
    # What a kill left between the last line of a finished teacher and the end of its draft.
    for draft in (*storage.folder.glob("teacher*.draft.safetensors"), *storage.folder.glob(".teacher*.draft")):
        draft.unlink(missing_ok=True)
    source = fitted_spec(settings, storage)
    if all(name.partition(" ")[0] == "teacher" for name in storage.manifest["phases"]):
        recipe = settings.recipe
        is_trial = recipe.steps < _FEW_STEPS or recipe.steps * recipe.batch_size <= len(data.train)
        with insisting(is_trial or bool(storage.manifest.get("insists"))):
            judge_fitted(source, data)
    return source


def _fit_member(
    settings: FitTeacher, data: Data, storage: RunFolder, phase: str, member: int, losses: Losses
) -> dict[str, Any]:
    training = member_training(settings, data, member, losses)
    network, recipe = training.model, training.recipe
    assert isinstance(network, Network)
    checkpoint = storage.path(f"{phase.replace(' ', '-')}.draft.safetensors")
    card = Card.of(network, data, {"role": "teacher", "seed": recipe.seed})
    snapshot_at = {recipe.steps * k // settings.snapshots: k for k in range(1, settings.snapshots)}

    def keep_snapshot(step: int) -> None:
        if step in snapshot_at:
            write_student(storage.path(SNAPSHOTS, str(snapshot_at[step])), network, card, deploy=False)

    watch = lambda: {"accuracy": accuracy(network, data.search, data)}  # noqa: E731
    seconds = train_with_checkpoints(training, phase, checkpoint, storage, watch, keep_snapshot)
    facts = {"search_accuracy": accuracy(network, data.search, data), **card.cost._asdict()}
    folder = storage.path(TEACHER) if member == settings.members else storage.path(MEMBERS, str(member))
    write_student(folder, network.cpu(), card, deploy=False)
    storage.finish(phase, seconds=seconds, **facts)
    checkpoint.unlink(missing_ok=True)
    return storage.require(phase, "kdnas train")


def untrained(settings: FitTeacher, data: Data, seed: int) -> Frozen:
    """A teacher as it will be, with fresh weights: to see what fits it before it is trained."""
    return Frozen(_fresh(settings, data, seed), preprocessing=data.preprocessing)


def _fresh(settings: FitTeacher, data: Data, seed: int) -> Network:
    blueprint = fitted_teacher(data.image, data.classes, settings.blocks, settings.width, dense=data.task.dense)
    return initialised(lambda: Network(blueprint), seed)


def member_training(settings: FitTeacher, data: Data, member: int = 1, losses: Losses = ()) -> Training:
    """The training of a teacher, or of the member of this 1-based number, before its first step.

    The losses are beside that of the labels, and use no teacher.
    """
    recipe = dataclasses.replace(settings.recipe, seed=settings.recipe.seed + member - 1)
    network = _fresh(settings, data, recipe.seed)
    distiller = FromTeacher(terms=(_SMOOTHED, *losses)) if losses else _Labels()
    return Training(network, distiller, data, None, recipe, default_device())


_SMOOTHED = (1.0, spec("kdnas.losses.response.cross_entropy:CrossEntropy", label_smoothing=0.1))


def teacher_result(storage: RunFolder, teacher: Teacher, data: Data) -> dict[str, Any]:
    """The teacher's row of the closing table: that of before, or measured on the test part now.

    Whoever chooses by anything calls it after the choice.

    Args:
        storage: the run; costs and seconds of a teacher that was fitted in it are those of its training.
        teacher: the teacher.
        data: the data.
    """
    row = next((row for row in storage.results()["rows"] if row["name"] == "teacher"), None)
    if row is not None:
        return dict(row)
    own = storage.phase("teacher") or {}
    return {"name": "teacher", **teacher_row(teacher, data), **{name: own[name] for name in _COSTS if name in own}}


def fit(settings: Fit, folder: Path) -> dict[str, Any]:
    """Train or fine-tune a teacher in a folder of its own, which `--teacher` takes; the same call resumes.

    Returns:
        The folder, the accuracy on the test part, params, MACs of one image (None where they cannot be counted) and
        seconds.

    Raises:
        ValueError: the folder holds something else, the network or its weights cannot be loaded, or a loss uses a
            teacher.
    """
    data: Data = settings.data.build(Data)
    _check_network(settings.network, data)
    _check_losses(settings.losses)
    if not (folder / MANIFEST).exists():
        own = settings.teacher if settings.network == "resnet" else None
        preflight(data, folder=folder, teacher=own, recipe=settings.teacher.recipe)
    storage = RunFolder.create(folder, settings.to_json(), settings.teacher.recipe.seed)
    record_data(storage, data)
    if settings.network == "resnet":
        with insisting(True):  # whoever asked for the teacher alone gets it, with its accuracy
            source = fit_teacher(settings.teacher, data, storage, settings.losses)
        if "accuracy" not in storage.require("teacher", "kdnas fit"):
            row = teacher_result(storage, build_teacher(source, data), data)
            storage.record_result(row)
            storage.finish("teacher", **storage.require("teacher", "kdnas fit"), **_accuracies(row))
    elif storage.phase("teacher") is None:
        _fine_tune(settings, data, storage)
    return {"teacher": str(folder), **storage.require("teacher", "kdnas fit"), **measure_of(data.task)}


def _check_network(network: str, data: Data) -> None:
    """Refuse a zoo's network for images where the task is about pixels, or the other way round."""
    zoo, _, rest = network.partition(":")
    if rest and is_segmenter(zoo, rest.partition("@")[0]) != data.task.dense:
        raise ValueError(
            f"`network` must be for the data's task, {data.task.name}, {network} is not. Use "
            f"{'torchvision:lraspp_mobilenet_v3_large' if data.task.dense else 'torchvision:resnet18'}, for example."
        )


def _check_losses(losses: Losses) -> None:
    """Refuse losses of a teacher."""
    names = [loss.name for _, loss in losses if loss.build(Loss).uses_teacher]
    if names:
        raise ValueError(
            f"`loss` of a fit must use no teacher, got {', '.join(names)}. Use self_attention, for example."
        )


def _accuracies(row: Mapping[str, Any]) -> dict[str, float]:
    return {name: row[name] for name in ("accuracy", "balanced_accuracy") if name in row}


class _Classifier(nn.Module):
    """A network that takes the images of a training, which are normalised for the data, and gives logits.

    Args:
        module: the network.
        own: how it takes images.
        data: the data, whose normalisation is undone.
    """

    def __init__(self, module: nn.Module, own: Preprocessing, data: Data) -> None:
        super().__init__()
        self.module, self.own, self.classes, self.dense = module, own, data.classes, data.task.dense
        self.register_buffer("mean", torch.tensor(data.preprocessing.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(data.preprocessing.std)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """`[batch, classes]`, of a network for segmentation `[batch, classes, height, width]`."""
        pixels = images * self.std + self.mean
        return logits_of(self.module(prepare(pixels, self.own)), self.classes, dense=self.dense)


class _Labels(Distiller):
    """The task's loss with labels smoothed by 0.1, a mean over the batch, of any network."""

    parallel: ClassVar[Parallel] = "any"

    @property
    def uses_teacher(self) -> bool:
        """No."""
        return False

    def losses(self, model: Any, batch: Batch, step: Step) -> Iterator[tuple[str, Tensor]]:
        """One loss."""
        del step
        outputs = model(batch.images)
        logits = outputs.logits if isinstance(outputs, Outputs) else outputs
        yield "teacher", batch.task.loss(logits.float(), batch.labels, label_smoothing=0.1)


def _fine_tune(settings: Fit, data: Data, storage: RunFolder) -> None:
    """Train a zoo's network on the data, and write it with its record."""
    zoo, _, rest = settings.network.partition(":")
    name, _, weights = rest.partition("@")
    recipe, pretrained = settings.teacher.recipe, settings.weights == "pretrained" and not weights
    make = partial(zoo_network, zoo, name, data.classes, settings.size, pretrained=pretrained)
    module, own = initialised(make, recipe.seed)
    if data.task.dense:
        own = whole(own, data.preprocessing, 0, settings.network)
    if weights:
        load_weights(module, Path(weights), new_head=True)
    run(module.eval(), torch.zeros(2, len(own.mean), own.height, own.width))
    _log.info(f"the teacher gets images of {own.height} x {own.width}, mean {own.mean}, std {own.std}; --size N")
    model = _Classifier(module, own, data)
    training = Training(model, _Labels(), data, None, recipe, default_device())  # type: ignore[arg-type]
    checkpoint = storage.path("teacher.draft.safetensors")
    watch = lambda: {"accuracy": accuracy(model, data.search, data)}  # noqa: E731
    seconds = train_with_checkpoints(training, "teacher", checkpoint, storage, watch)
    origin = {"data": settings.data.to_json(), FINGERPRINT: data.fingerprint, "recipe": unstructure(recipe)}
    source = {"zoo": zoo, "name": name, "size": settings.size, "origin": origin}
    write_zoo_teacher(storage.path(TEACHER), module.eval(), source, own, data.class_names)
    written = spec(student_teacher, path=str(storage.path(TEACHER).resolve()))
    with insisting(True):
        judge_fitted(written, data)
    teacher = build_teacher(written, data)
    storage.finish("teacher", **{**teacher_row(teacher, data), "seconds": seconds})
    checkpoint.unlink(missing_ok=True)
