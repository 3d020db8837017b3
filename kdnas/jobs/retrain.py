"""Training an exported student, with or without a teacher."""

import dataclasses
import hashlib
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

from kdnas.data.base import Data
from kdnas.distillers.base import Distiller
from kdnas.evaluation import accuracy
from kdnas.jobs._run import build_teacher, check_model_type, other_classes
from kdnas.network import Network, default_device
from kdnas.randomness import initialised
from kdnas.runs.files import current_folder, write_json
from kdnas.runs.folder import WEIGHTS, run_around
from kdnas.settings import Experiment, Recipe, Retrain
from kdnas.specs import Spec
from kdnas.students.folder import check_place, read_student, write_student
from kdnas.students.trust import provenance
from kdnas.tables import structure, unstructure
from kdnas.training.driver import train_with_checkpoints
from kdnas.training.loop import Training


def retrain(
    student: Path,
    settings: Retrain,
    out: Path,
    *,
    phase: str = "retrain",
    data: Spec | None = None,
    teacher: Spec | None = None,
    deploy: bool = True,
) -> dict[str, Any]:
    """Train a student folder's network and write the result to another folder; goes on where it was interrupted.

    Args:
        student: a student folder.
        settings: how.
        out: the new student folder.
        phase: the name under which a run records its metrics.
        data: other data than the student was found on.
        teacher: another teacher.
        deploy: write and compare every form of the new student, or what kdnas reads alone.

    Returns:
        Accuracy on the test part, params, MACs, seconds, and the folder.

    Raises:
        ValueError: no student there, no data known, other classes, or the result's self-check refuses.
    """
    check_model_type(settings.distiller, Network)
    check_place(Path(out))
    network, card = read_student(student)
    made_data, made_teacher = provenance(student, card, data, teacher)
    loaded: Data = made_data.build(Data)
    if loaded.class_names != card.class_names:
        raise ValueError(f"{other_classes(card.class_names, loaded, 'the student')} Give the data it was found on.")
    distiller = settings.distiller.build(Distiller)
    if settings.weights == "fresh":
        network = initialised(lambda: Network(card.blueprint), settings.recipe.seed)
    taught = build_teacher(made_teacher, loaded) if made_teacher is not None and distiller.uses_teacher else None
    training = Training(network, distiller, loaded, taught, settings.recipe, default_device())
    out.parent.mkdir(parents=True, exist_ok=True)
    # Named for what is trained: other settings begin anew instead of going on from a training of their own.
    asked = [unstructure(settings), *(None if s is None else s.to_json() for s in (made_data, made_teacher))]
    asked += [card.blueprint.to_json()]
    if settings.weights == "inherited":
        asked.append(hashlib.sha256((current_folder(student) / WEIGHTS).read_bytes()).hexdigest())
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]
    draft = out.parent / f".{out.name}.{digest}.draft.safetensors"
    seconds = train_with_checkpoints(
        training, phase, draft, run_around(out), lambda: {"accuracy": accuracy(network, loaded.search, loaded)}
    )
    found = accuracy(network, loaded.test, loaded)
    origin = {**card.origin, "retrained": unstructure(settings), "test_accuracy": found, "seconds": seconds}
    new_card = dataclasses.replace(card, preprocessing=loaded.preprocessing, origin=origin)
    student_network = network.cpu().eval()
    export_extras = partial(distiller.cpu().export_extras, student_network, loaded)
    checks = write_student(out, student_network, new_card, deploy=deploy, more=export_extras)
    forget_drafts(out)
    return {
        "student": str(out),
        "accuracy": found,
        "params": card.cost.params,
        "macs": card.cost.macs,
        "seconds": seconds,
        "checks": checks,
    }


def forget_drafts(out: Path) -> None:
    """Remove the state of trainings of a finished student, also of one with other settings that was never finished."""
    ours = re.compile(rf"\.?\.{re.escape(out.name)}\.[0-9a-f]{{12}}\.draft\.safetensors(\.\d+\.draft)?")
    for left in out.parent.iterdir():  # not of its neighbours, whose names may begin alike
        if ours.fullmatch(left.name):
            left.unlink()


def taught_by_teacher(settings: Retrain, scheme: str) -> None:
    """Raise a ValueError where a scheme would prepare teachers that nobody asks."""
    if not settings.distiller.build(Distiller).uses_teacher:
        raise ValueError(
            f"{scheme} teach the student, and {settings.distiller.name} asks no teacher. Drop them, or take a "
            "distiller that asks one, such as from_teacher."
        )


def lock_settings(folder: Path, asked: Any) -> None:
    """Begin a folder of intermediate students, or go on in one that was begun alike.

    Raises:
        ValueError: it was begun with other settings, whose students would be taken for these.
    """
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    path = folder / "begun.json"
    if path.exists() and json.loads(path.read_text())["settings"] != digest:
        raise ValueError(
            f"{folder} holds students trained with other settings, data or teachers. Remove it, or write elsewhere."
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, {"settings": digest})


def settings_of(student: Path) -> Retrain:
    """How a student folder is retrained by default: as its run or pruning says, else by the recipe in its card.

    Raises:
        ValueError: no student there, or its card's recipe is none.
    """
    storage = run_around(student)
    job = {} if storage is None else storage.manifest["job"]
    if "train" in job:
        return Experiment.from_json(job).retrain
    if "prune" in job:
        return structure(job["prune"]["retrain"], Retrain)
    recipe = read_student(student)[1].origin.get("recipe")
    try:
        return Retrain() if recipe is None else Retrain(recipe=structure(recipe, Recipe))
    except ValueError as error:
        raise ValueError(f"the recipe in the card of {student} is none: {error}") from error
