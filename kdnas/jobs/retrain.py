"""Training an exported student, with or without a teacher."""

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, final

from kdnas.data.base import Data
from kdnas.distillers.base import Distiller
from kdnas.evaluation import accuracy, final_measures, graded, measure_of
from kdnas.jobs._run import build_teacher, check_model_type, other_classes, report_changes
from kdnas.jobs._source import fed_as
from kdnas.network import Network, default_device
from kdnas.randomness import initialised
from kdnas.runs.files import current_folder
from kdnas.runs.folder import CARD, WEIGHTS, run_around
from kdnas.runs.lock import hold
from kdnas.runs.places import missing
from kdnas.runs.steps import draft_of, forget_drafts
from kdnas.settings import CardTeacher, Experiment, Recipe, Retrain, TeacherChoice
from kdnas.specs import Spec
from kdnas.students.card import FINGERPRINT, Card, input_of
from kdnas.students.folder import check_place, read_student, write_student
from kdnas.students.trust import provenance
from kdnas.tables import structure, unstructure
from kdnas.teachers.base import Teacher
from kdnas.training.driver import train_with_checkpoints
from kdnas.training.loop import Training


def retrain(
    student: Path,
    settings: Retrain,
    out: Path,
    *,
    phase: str = "retrain",
    data: Spec | None = None,
    teacher: TeacherChoice = CardTeacher(),
    part: Literal["search", "test"] = "test",
    deploy: bool = True,
) -> dict[str, Any]:
    """Train a student folder's network and write the result to another folder; the same call resumes.

    Args:
        student: a student folder.
        settings: distiller, recipe and initial weights.
        out: the new student folder.
        phase: the name under which a run records its metrics.
        data: the data; by default what the card names.
        teacher: the teacher; by default what the card names.
        part: on which the new student is measured; search where one of several is still to be chosen.
        deploy: whether to write and compare every form of the new student.

    Returns:
        Accuracy on that part, params, MACs, seconds, and the folder.

    Raises:
        ValueError: no student there, no data named, other classes, or the result's self-check fails.
    """
    hold(out)
    check_place(Path(out))
    prepared = prepare(student, settings, data, teacher)
    network, card, loaded = prepared.network, prepared.card, prepared.data
    out.parent.mkdir(parents=True, exist_ok=True)
    watch = lambda: {"accuracy": accuracy(network, loaded.search, loaded)}  # noqa: E731
    draft = draft_of(out, prepared.identity)
    seconds = train_with_checkpoints(prepared.training, phase, draft, run_around(out), watch)
    if part == "test":
        measures = final_measures(graded(network, loaded.test, loaded), loaded, f"the student {out.name}")
    else:
        measures = {"accuracy": accuracy(network, loaded.search, loaded)}
    before = {name: value for name, value in card.origin.items() if name not in ("training", "steps", "test_accuracy")}
    origin = {**before, "retrained": unstructure(settings)}
    origin |= {"test_accuracy": measures["accuracy"]} if part == "test" else {}
    origin |= {"seconds": seconds, FINGERPRINT: loaded.fingerprint}
    card = dataclasses.replace(card, preprocessing=input_of(network, loaded), origin=origin)
    trained = network.cpu().eval()
    extras = partial(prepared.training.distiller.cpu().export_extras, trained, loaded)
    checks = write_student(out, trained, card, deploy=deploy, more=extras)
    forget_drafts(out)
    costs = card.cost._asdict()
    result = {"student": str(out), **measures, **costs, "seconds": seconds, "checks": checks}
    return result | measure_of(loaded.task)


@final
@dataclass(frozen=True)
class Prepared:
    """A student's training before its first step.

    Attributes:
        card: the student's card.
        data: what it is trained on, normalised as the student expects.
        training: the training.
        identity: everything that the result depends on, as JSON.
    """

    card: Card
    data: Data
    training: Training
    identity: list[Any]

    @property
    def network(self) -> Network:
        """The student."""
        assert isinstance(self.training.model, Network)
        return self.training.model


def prepare(student: Path, settings: Retrain, data: Spec | None, teacher: TeacherChoice) -> Prepared:
    """The training of a student folder's network.

    Raises:
        ValueError: no student there, no data named, other classes, or no teacher where one is used.
    """
    check_model_type(settings.distiller, Network)
    network, card = read_student(student)
    data, source = provenance(student, card, data, teacher)
    loaded: Data = data.build(Data)
    if loaded.class_names != card.class_names:
        raise ValueError(f"{other_classes(card.class_names, loaded, 'the student')} Give the data it was found on.")
    own = card.origin.get("data")
    if data.to_json() == own or missing(own):
        report_changes(card.origin.get(FINGERPRINT), loaded, f"the student {student}")
    if source is None and settings.distiller.build(Distiller).uses_teacher:
        raise ValueError(f"{settings.distiller.name} uses a teacher, and {student / CARD} names none. Add --teacher.")
    identity = [unstructure(settings), data.to_json(), None if source is None else source.to_json()]
    identity += [card.blueprint.to_json(), loaded.fingerprint]
    if settings.weights == "inherited":
        identity.append(hashlib.sha256((current_folder(student) / WEIGHTS).read_bytes()).hexdigest())
        loaded = fed_as(loaded, card.preprocessing)
    build = None if source is None else partial(build_teacher, source, loaded)
    return Prepared(card, loaded, training_of(network, settings, loaded, build), identity)


def training_of(network: Network, settings: Retrain, data: Data, teacher: Callable[[], Teacher] | None) -> Training:
    """The training of a network, before its first step; `Training.model` has fresh weights if the settings say so.

    Args:
        network: with the weights to inherit.
        settings: distiller, recipe and initial weights.
        data: as the network takes it.
        teacher: returns the teacher; called where the distiller uses one.
    """
    distiller = settings.distiller.build(Distiller)
    blueprint = network.blueprint
    if settings.weights == "fresh":
        network = initialised(lambda: Network(blueprint), settings.recipe.seed)
    module = teacher() if teacher is not None and distiller.uses_teacher else None
    return Training(network, distiller, data, module, settings.recipe, default_device())


def check_uses_teacher(settings: Retrain, scheme: str) -> None:
    """Raise a ValueError where a scheme would prepare teachers that the distiller does not use."""
    if not settings.distiller.build(Distiller).uses_teacher:
        raise ValueError(
            f"{scheme} needs a distiller that uses a teacher, {settings.distiller.name} does not. Drop the option, or "
            "use from_teacher."
        )


def settings_of(student: Path) -> Retrain:
    """The default settings of a student's retraining: those of its run or pruning, else the recipe in its card.

    Raises:
        ValueError: no student there, or its card's recipe is invalid.
    """
    storage = run_around(student)
    job = {} if storage is None else storage.manifest["job"]
    if "train" in job:
        return Experiment.from_json(job).retrain
    if storage is not None and "prune" in job:
        return structure(storage.require("trials", "kdnas prune")["retrain"], Retrain)
    recipe = read_student(student)[1].origin.get("recipe")
    try:
        return Retrain() if recipe is None else Retrain(recipe=structure(recipe, Recipe))
    except ValueError as error:
        raise ValueError(f"{student / CARD} has an invalid recipe: {error}") from error
