"""Taking a student out of a run: a folder that needs no kdnas."""

from pathlib import Path
from typing import Any

import torch

from kdnas.architecture import Architecture
from kdnas.data.base import Data
from kdnas.evaluation import accuracy
from kdnas.jobs._run import Run
from kdnas.network import Network, calibrate
from kdnas.randomness import initialised, torch_rng
from kdnas.runs.entry import Entry
from kdnas.runs.folder import STUDENTS
from kdnas.students.card import Card
from kdnas.students.folder import write_student
from kdnas.tables import unstructure


def export(run: Run, place: int = 1, out: Path | None = None, *, deploy: bool = True) -> dict[str, Any]:
    """Write the student of a place of the run's last search, with inherited, re-calibrated weights.

    Args:
        run: the run.
        place: 1 is the best.
        out: where to; `students/place-N` of the run by default.
        deploy: write and check every form of the student, or what kdnas reads alone.

    Returns:
        The folder, the architecture's code, cost, accuracy on the search part, and the parity check's differences.

    Raises:
        ValueError: no search yet, no such place, or the parity check fails.
    """
    entry = place_of(run, place)
    folder = Path(out) if out is not None else run.storage.path(STUDENTS, f"place-{place}")
    network = inherited(run, entry.architecture)
    search_accuracy = accuracy(network, run.data.search, run.data)
    origin = {"place": place, "score": entry.score, "scorer": entry.scorer, "search_accuracy": search_accuracy}
    checks = write_student(folder, network, card_of(run, network, entry.architecture, origin), deploy=deploy)
    return {
        "student": str(folder),
        "place": place,
        "code": entry.code,
        "params": entry.params,
        "macs": entry.macs,
        "search_accuracy": search_accuracy,
        "checks": checks,
    }


def place_of(run: Run, place: int) -> Entry:
    """The entry of a place of the last finished search.

    Raises:
        ValueError: no search yet, or no such place.
    """
    entries = run.ranking()
    if not 1 <= place <= len(entries):
        raise ValueError(f"`place` must be between 1 and {len(entries)}, got {place}.")
    return entries[place - 1]


def inherited(run: Run, architecture: Architecture) -> Network:
    """A subnet with the supernet's weights, or fresh ones without one; batch norm re-estimated on training images."""
    if run.experiment.train.distiller is None:
        seed = run.experiment.train.recipe.seed
        network = initialised(lambda: Network(run.space.blueprint(architecture)), seed).to(run.device)
    else:
        network = run.supernet.extract(architecture)
    calibrate(network, calibration_batches(run.data, run.device))
    return network.cpu().eval()


def calibration_batches(data: Data, device: torch.device, most: int = 2048, size: int = 256) -> list[torch.Tensor]:
    """Training images without augmentation, normalised, in equal batches."""
    count = min(most, len(data.train))
    size = min(size, count)
    indices = torch.randperm(len(data.train), generator=torch_rng("calibration"))[: count // size * size]
    return [data.normalise(data.train.take(chunk).to(device)) for chunk in indices.split(size)]


def card_of(run: Run, network: Network, architecture: Architecture, origin: dict[str, Any]) -> Card:
    """The card of a subnet of this run; its origin also names data, teacher and recipe of a retraining."""
    sources = {"data": run.experiment.train.data.to_json(), "teacher": run.teacher_spec.to_json()}
    sources["recipe"] = unstructure(run.experiment.retrain.recipe)
    return Card.of(network, run.data, {**origin, **sources}, architecture, run.space)
