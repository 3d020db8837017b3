"""A student as a folder that needs no kdnas: its card, its weights, its network as code and as an ONNX graph."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch

from kdnas.network import Network
from kdnas.runs.checkpoint import load_tensors, save_tensors
from kdnas.runs.files import current_folder, new_folder, plain, read_json, write_bytes, write_text
from kdnas.runs.folder import CARD, GRAPH, INTEGERS, SOURCE, WEIGHTS, top_of
from kdnas.runs.places import located, portable
from kdnas.students.card import Card
from kdnas.students.graph import graph_of, load_graph
from kdnas.students.parity import Parity
from kdnas.students.source import check_modules, load_source, shortened, student_source
from kdnas.trust import Untrusted, admit, remember

_AGAIN = "Export the student again."


def write_student(
    folder: str | Path,
    network: Network,
    card: Card,
    *,
    deploy: bool = True,
    more: Callable[[Path], dict[str, float]] | None = None,
) -> dict[str, float]:
    """Write a student folder: student.json, weights.safetensors, student.py, student.onnx.

    The folder appears whole or not at all, and replaces only a student. The files are read back and compared before:
    the network, student.py with the weights, and student.onnx must give the same logits on 64 images at batch sizes 1
    and 3, within 1e-5 of the largest logit of an image or of 1, whichever is more; where no logit reaches 0.1, of
    the largest of all. The network's parameters and multiply-accumulates must equal the card's.

    Args:
        folder: where to write.
        network: the student; written in float32, unchanged itself.
        card: its description.
        deploy: write and compare every form; False writes student.json and weights.safetensors alone, which is all that
            kdnas reads: for teachers, snapshots and controls.
        more: writes another form into the folder (`student-int8.onnx`) and returns its measurements.

    Returns:
        Largest difference of the logits by file, in the units above, and the largest logit; empty without `deploy`.

    Raises:
        ValueError: a comparison fails, the network cannot be expressed in one of the forms, or the folder holds
            something else. Then nothing is written.
    """
    folder = Path(folder)
    check_place(folder)
    if network.blueprint != card.blueprint:
        raise ValueError(
            "the network was built from another blueprint than `Card.blueprint`. Pass the card of this network."
        )
    network = copy.deepcopy(network).to("cpu", torch.float32).eval().requires_grad_(False)
    text = dataclasses.replace(card, origin=portable(card.origin, folder, top_of(folder))).to_text()
    remember(card.blueprint.to_json())
    parity = Parity(network, card) if deploy else None
    with new_folder(folder) as draft:
        write_text(draft / CARD, text)
        save_tensors(draft / WEIGHTS, network.state_dict(), card.checksum)
        if parity is None:
            return {}
        source = student_source(card.blueprint, card.preprocessing, card.class_names)
        write_text(draft / SOURCE, source)
        student = load_source(draft)
        parity.compare(SOURCE, student)
        write_bytes(draft / GRAPH, graph_of(student, card.preprocessing))
        parity.compare(GRAPH, load_graph(draft / GRAPH))
        measurements = {} if more is None else more(draft)
    return parity.differences | measurements


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
            with torch.device("meta"):  # takes no memory, whatever the card says
                numbers = sum(tensor.numel() for tensor in Network(card.blueprint).state_dict().values())
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
    foreign = sorted(names - {CARD, WEIGHTS, SOURCE, GRAPH, INTEGERS}) if CARD in names else sorted(names)
    if foreign:
        raise ValueError(
            f"{folder} exists and holds {foreign[0]}, which is no part of a student. Remove it, or write elsewhere."
        )
    if names and not replace:
        raise ValueError(f"{folder} holds a student already. Use another --out, or --force to replace it.")


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
