"""Taking a student out of a run: a folder that needs no kdnas."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from kdnas.architecture import Architecture
from kdnas.costs.count import cost
from kdnas.data.base import Data
from kdnas.evaluation import accuracy, measure_of
from kdnas.jobs._run import Run
from kdnas.network import Network, calibrate
from kdnas.randomness import initialised, torch_rng
from kdnas.runs.entry import Entry
from kdnas.runs.files import Damaged, plain
from kdnas.runs.folder import RANKING, STUDENTS
from kdnas.runs.lock import hold
from kdnas.students.card import Card
from kdnas.students.folder import add_forms, check_place, is_trained, read_student, write_student
from kdnas.students.forms import Interface, available_forms, chosen_forms
from kdnas.students.trust import data_of
from kdnas.tables import unstructure

_AGAIN = "Search again, or restore the file."


def export(
    run: Run,
    place: int = 1,
    out: Path | None = None,
    *,
    search: int | None = None,
    deploy: bool = True,
    forms: Sequence[str] | None = None,
    interface: Interface = Interface(),  # noqa: B008
    force: bool = True,
) -> dict[str, Any]:
    """Write the student of a place of a search's ranking, with inherited, re-calibrated weights.

    Args:
        run: the run.
        place: 1 is the best.
        out: where to; `students/place-N` of the run by default.
        search: 1-based number of the search; by default the last finished one.
        deploy: write and check every form of the student, or what kdnas reads alone.
        forms: names of forms, and what they take and return; see `kdnas.students.folder.write_student`.
        interface: of the forms.
        force: replace a trained student too.

    Returns:
        The folder, the search, the architecture's code, cost, accuracy on the search part, the parity check's
        differences, and a record of every form.

    Raises:
        ValueError: no search yet, no such place, code or cost in the ranking are not the architecture's, the parity
            check fails, or the folder holds a trained student and `force` is off.
    """
    entry = place_of(run, place, search)
    folder = Path(out) if out is not None else run.storage.path(STUDENTS, f"place-{place}")
    hold(folder)
    check_place(folder, replace=force or not is_trained(folder))
    _check_entry(run, entry)
    network = inherited(run, entry.architecture)
    search_accuracy = accuracy(network, run.data.search, run.data)
    origin = {
        "search": entry.search,
        "place": place,
        "score": entry.score,
        "scorer": entry.scorer,
        "search_accuracy": search_accuracy,
    }
    card = card_of(run, network, entry.architecture, origin)
    options = {"deploy": deploy, "forms": forms, "interface": interface, "data": run.data}
    checks = write_student(folder, network, card, **options)
    return {
        "student": str(folder),
        "search": entry.search,
        "place": place,
        "code": entry.code,
        "params": entry.params,
        "macs": entry.macs,
        "search_accuracy": search_accuracy,
        **measure_of(run.data.task),
        "checks": checks,
        "forms": dict(read_student(folder)[1].forms),
    }


def export_forms(student: Path, forms: Sequence[str], out: Path, interface: Interface) -> dict[str, Any]:
    """Write further forms of a student folder; the integers' ranges are those of the data that its card names.

    Args:
        student: the student folder.
        forms: names of forms; none for the default ones that can be written here.
        out: the folder to write, by default the same.
        interface: of the forms.

    Returns:
        The folder, and a record of every form that there is.

    Raises:
        ValueError: as `kdnas.students.folder.add_forms`, or the card names no data where it is needed.
    """
    hold(out)
    names = chosen_forms(forms) if forms else available_forms()
    data = data_of(student, read_student(student)[1], None).build(Data) if "int8" in names else None
    return {"student": str(out), "forms": add_forms(student, out, names, interface, data)}


def place_of(run: Run, place: int, search: int | None = None) -> Entry:
    """The entry of a place of a search, by default of the last finished one.

    Raises:
        ValueError: no search yet, no such search, or no such place.
    """
    entries = run.ranking(search)
    if not entries:
        number = search or run.storage.require("search", f"kdnas search {run.folder}")["search"]
        raise ValueError(
            f"the ranking of search {number} of {run.folder} is empty. Search again, or give another --search."
        )
    if not 1 <= place <= len(entries):
        raise ValueError(f"`place` must be between 1 and {len(entries)}, got {place}.")
    return entries[place - 1]


def _check_entry(run: Run, entry: Entry) -> None:
    """Raise a ValueError where a line of the ranking has another code or cost than its architecture."""
    path = run.storage.path(RANKING)
    check_architectures(run, run.ranking(entry.search))
    own: dict[str, Any] = cost(run.space.blueprint(entry.architecture))._asdict()
    own["code"] = run.space.code(entry.architecture)
    for name, value in own.items():
        recorded = getattr(entry, name)
        if recorded != value:
            reason = f"has {name} {plain(str(recorded), 40)} for the network {own['code']}, whose {name} is {value}"
            raise Damaged(path, reason, _AGAIN)


def check_architectures(run: Run, entries: Iterable[Entry]) -> None:
    """Raise a ValueError where a line of the ranking is no architecture of the run's space."""
    for entry in entries:
        try:
            run.space.validate(entry.architecture)
        except ValueError as error:
            reason = f"has an entry {plain(entry.code, 40)!r} of another search space: {error}"
            raise Damaged(run.storage.path(RANKING), reason, _AGAIN) from error


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
