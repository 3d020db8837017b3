"""A student as a folder that needs no kdnas: its card, its weights, its network as code and in other forms."""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from kdnas.data.base import Data
from kdnas.network import Network, without_weights
from kdnas.runs.checkpoint import load_tensors, save_tensors
from kdnas.runs.files import current_folder, new_folder, plain, read_json, write_bytes, write_text
from kdnas.runs.folder import (
    CARD,
    CONFIG,
    INTEGERS,
    MANIFEST,
    README,
    SOURCE,
    STUDENT_FILES,
    WEIGHTS,
    JsonObject,
    run_around,
    top_of,
)
from kdnas.runs.places import located, portable
from kdnas.students.card import Card, form_of
from kdnas.students.forms import FORMS, Draft, Interface, Record, available_forms, chosen_forms, write_forms
from kdnas.students.parity import Parity
from kdnas.students.readme import readme_text
from kdnas.students.source import check_modules, load_source, shortened, student_source
from kdnas.students.stock import config_text
from kdnas.trust import Untrusted, admit, remember

_AGAIN = "Export the student again."


def write_student(
    folder: str | Path,
    network: Network,
    card: Card,
    *,
    deploy: bool = True,
    forms: Sequence[str] | None = None,
    interface: Interface = Interface(),  # noqa: B008
    data: Data | None = None,
    more: Callable[[Path], dict[str, float]] | None = None,
    before: Path | None = None,
) -> dict[str, float]:
    """Write a student folder: student.json, weights.safetensors, student.py, README.md, config.json, and its forms.

    The folder appears whole or not at all, and replaces only a student. The files are read back and compared before:
    the network, student.py with the weights, and each form must give the same logits on 64 images at batch sizes 1
    and 3, within 1e-5 of the largest logit of an image or of 1, whichever is more; where no logit reaches 0.1, of
    the largest of all. The network's parameters and multiply-accumulates must equal the card's. A form that fails
    is left out, which a warning and the card say.

    Args:
        folder: where to write.
        network: the student; written in float32, unchanged itself.
        card: its description.
        deploy: write and compare every form; False writes student.json and weights.safetensors alone, which is all that
            kdnas reads: for teachers, snapshots and controls.
        forms: names of `kdnas.students.forms.FORMS`, which are timed too; None for the default ones that can be written
            here.
        interface: what the forms take and return.
        data: calibrates the form in integers.
        more: writes the form in integers into the folder (`student-int8.onnx`) and returns its measurements.
        before: the folder of this very student, whose other forms are copied.

    Returns:
        Largest difference of the logits by file, in the units above, and the largest logit; empty without `deploy`.

    Raises:
        ValueError: a comparison of student.py fails, the network cannot be expressed as code, an unknown form or one
            whose extra is not installed, or the folder holds something else. Then nothing is written.
    """
    folder = Path(folder)
    check_place(folder)
    if network.blueprint != card.blueprint:
        raise ValueError(
            "the network was built from another blueprint than `Card.blueprint`. Pass the card of this network."
        )
    interface.check(card)
    names = chosen_forms(forms) if forms is not None else available_forms() if deploy else ()
    network = copy.deepcopy(network).to("cpu", torch.float32).eval().requires_grad_(False)
    card = dataclasses.replace(card, origin=portable(card.origin, folder, top_of(folder)))
    card.to_text()
    remember(card.blueprint.to_json())
    parity = Parity(network, card) if deploy else None
    with new_folder(folder) as draft:
        save_tensors(draft / WEIGHTS, network.state_dict(), card.checksum)
        measurements: dict[str, float] = {}
        if parity is not None:
            source = student_source(
                card.blueprint, card.preprocessing, card.class_names, card.answers, card.image_outputs
            )
            write_text(draft / SOURCE, source)
            work = Draft(draft, load_source(draft), card, parity, interface, data, timed=forms is not None)
            records = {"python": work.record(SOURCE, work.student)}
            if before is not None:
                records |= _carried(before, card, draft, names)
            records |= write_forms(work, names)
            measurements = {} if more is None else more(draft)
            if (draft / INTEGERS).exists() and "int8" not in records:
                records["int8"] = _of_training(draft / INTEGERS, measurements)
            card = dataclasses.replace(card, forms=records)
            if not (draft / CONFIG).exists():
                write_text(draft / CONFIG, config_text(card, timm=False))
            write_text(draft / README, readme_text(card, _controls_of(folder if before is None else before)))
        # The weights have their checksum inside; README.md is for people, who may edit it.
        files = {path.name: path for path in draft.iterdir() if path.is_file() and path.name not in (WEIGHTS, README)}
        write_text(draft / CARD, card.to_text(files))
    return {} if parity is None else parity.differences | measurements


def add_forms(
    student: Path,
    out: Path,
    names: Sequence[str],
    interface: Interface = Interface(),  # noqa: B008
    data: Data | None = None,
) -> dict[str, Any]:
    """Write further forms of a student folder, into it or into another one; its other forms stay.

    Args:
        student: the student folder.
        out: the folder to write, which may be the same.
        names: of the forms.
        interface: what the forms take and return.
        data: calibrates the form in integers.

    Returns:
        The record of every form that there is now, by name.

    Raises:
        ValueError: as `read_student` and `write_student`.
    """
    network, card = read_student(student)
    write_student(out, network, card, forms=names, interface=interface, data=data, before=student)
    return dict(read_student(out)[1].forms)


def _carried(before: Path, card: Card, draft: Path, names: Sequence[str]) -> dict[str, Record]:
    """Copy the forms of a student that are not written anew; their records."""
    records: dict[str, Record] = {}
    for name, record in card.forms.items():
        files = FORMS[name].files if name in FORMS and name not in names and "problem" not in record else ()
        sources = [current_folder(before) / file for file in files]
        if sources and all(path.is_file() for path in sources):
            for path in sources:
                write_bytes(draft / path.name, form_of(before, path.name).read_bytes())
            records[name] = dict(record)
    return records


def _of_training(path: Path, measurements: Mapping[str, float]) -> Record:
    """The record of the integers that a training wrote."""
    named = {name.removeprefix("int8 ").replace(" ", "_"): value for name, value in measurements.items()}
    return {**named, "file": path.name, "bytes": path.stat().st_size}


def _controls_of(folder: Path) -> JsonObject:
    """The controls of the run whose student lies in a folder; those of other networks are none of this one's."""
    storage = run_around(folder)
    if storage is None or folder.name != "student":
        return {}
    controls: JsonObject = storage.results()["controls"]
    return controls


def read_student(folder: str | Path) -> tuple[Network, Card]:
    """The network, in eval mode, and its card.

    Raises:
        ValueError: a file is missing, damaged, or belongs to another student.
    """
    folder = Path(folder)
    current = current_folder(folder)
    if not current.exists():
        raise ValueError(f"there is no student {folder}. Write one with `kdnas export`.")
    for path in (current / CARD, current / WEIGHTS):
        if not path.exists():
            raise ValueError(f"there is no student in {folder}: it has no {path.name}. Write one with `kdnas export`.")
    content = read_json(current / CARD, dict, _AGAIN)
    weights, checksum = load_tensors(current / WEIGHTS, _AGAIN)
    try:
        admit(content.get("blueprint"), folder / CARD)
        card = Card.from_json(content)
        card = dataclasses.replace(card, origin=located(card.origin, folder, top_of(folder)))
        check_modules(card.blueprint)
        with torch.random.fork_rng(devices=[]):
            # Without weights it takes no memory, whatever the card says.
            numbers = sum(tensor.numel() for tensor in without_weights(card.blueprint).state_dict().values())
            if numbers > (current / WEIGHTS).stat().st_size:
                raise ValueError(f"its network has {numbers:,} numbers, and {WEIGHTS} is smaller")
            network = Network(card.blueprint)
    except Untrusted:
        raise
    except Exception as error:  # a layer called with the values of a damaged file may raise anything
        raise ValueError(
            f"{folder / CARD} is damaged or was written by something else: {plain(str(error), 250)}"
        ) from error
    if checksum and checksum != card.checksum:
        raise ValueError(
            f"{folder / CARD} is damaged or was edited: the blueprint or the preprocessing is another than when "
            f"{WEIGHTS} was written. {_AGAIN}"
        )
    try:
        network.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise ValueError(
            f"{folder / WEIGHTS} holds the weights of another network than {CARD}: {shortened(error)}"
        ) from error
    return network.eval(), card


def check_place(folder: Path, *, replace: bool = True) -> None:
    """Raise a ValueError when the folder holds something that is no student, or a student where none is replaced."""
    for parent in folder.absolute().parents:
        if parent.exists() and not parent.is_dir():
            raise ValueError(f"{folder} cannot be created: {parent} is a file. Write elsewhere.")
    if not folder.exists():
        return
    names = {path.name for path in folder.iterdir()} - {"__pycache__"} if folder.is_dir() else {folder.name}
    foreign = sorted(names - STUDENT_FILES) if CARD in names else sorted(names)
    if foreign:
        raise ValueError(
            f"{folder} exists and holds {foreign[0]}, which is no part of a student. Remove it, or write elsewhere."
        )
    if names and not replace:
        raise ValueError(f"{folder} holds a student already. Use another --out, or --force to replace it.")


def is_student(folder: Path) -> bool:
    """Whether a student lies in the folder, and no run."""
    current = current_folder(folder)
    return (current / CARD).is_file() and not (current / MANIFEST).exists()


def is_trained(folder: Path) -> bool:
    """Whether the folder holds a student that a training has written, or whose card cannot say."""
    path = current_folder(folder) / CARD
    if not path.exists():
        return False
    try:
        origin = read_json(path, dict, _AGAIN)["origin"]
    except (ValueError, KeyError):
        return True
    return not isinstance(origin, dict) or bool(origin.keys() & {"retrained", "test_accuracy", "role", "grown"})
