"""What the resumable benchmarks share: CIFAR-10 averaged down, a teacher's remembered logits, rows in a locked file."""

import csv
import fcntl
import hashlib
import io
import json
import os
from pathlib import Path
from typing import IO, Any, Self, final

import torch
from torch import Tensor, nn

from kdnas.data.base import Data, TensorImages
from kdnas.data.cifar import cifar10
from kdnas.outputs import Moment, Outputs
from kdnas.runs.checkpoint import load_state, save_state
from kdnas.runs.files import read_json, write_json
from kdnas.settings import Recipe
from kdnas.teachers.base import Frozen, Teacher
from kdnas.training.driver import train_with_checkpoints
from kdnas.training.loop import Training

PARTS = ("train", "search", "test")
Row = dict[str, Any]


def cifar(path: Path, size: int, cache: Path) -> Data:
    """CIFAR-10, decoded and averaged down to `size` pixels once.

    Args:
        path: the folder of binary files, or an .npz of JPEG bytes.
        size: pixels, a divisor of 32.
        cache: the file of the decoded images.
    """
    if not cache.exists():
        data = cifar10(str(path), size=size)
        parts: dict[str, Any] = {part: getattr(data, part) for part in PARTS}
        content = {part: [images.images, images.labels] for part, images in parts.items()}
        save_state(cache, {"parts": content, "classes": list(data.class_names), "augmentation": data.augmentation})
    state = load_state(cache)
    parts = {part: TensorImages(*state["parts"][part]) for part in PARTS}
    return Data(**parts, class_names=tuple(state["classes"]), augmentation=state["augmentation"])


def about(data: Data) -> Row:
    """What a JSON file says of the images."""
    size = data.image[1]
    text = f"CIFAR-10, averaged from 32x32 to {size}x{size}, rounded to 8 bits" if size < 32 else "CIFAR-10"
    return {"what": text, **{part: len(getattr(data, part)) for part in PARTS}, "augmentation": data.augmentation}


def fingerprint(network: nn.Module) -> str:
    """The first half of the SHA-256 of a network's weights and buffers."""
    content = b"".join(tensor.numpy().tobytes() for tensor in network.state_dict().values())
    return hashlib.sha256(content).hexdigest()[:16]


def trained(training: Training, phase: str, place: Path) -> float:
    """Train a network once, or read its weights; resumable. Returns the seconds it took.

    Args:
        training: of a network with its initial weights, which are replaced.
        phase: its name on the progress line.
        place: the file of the trained weights.
    """
    if not place.exists():
        draft = place.with_suffix(".draft.safetensors")
        seconds = train_with_checkpoints(training, phase, draft, None)
        save_state(place, {"weights": dict(training.model.state_dict()), "seconds": seconds})
        draft.unlink(missing_ok=True)
    state = load_state(place)
    training.model.load_state_dict(state["weights"])
    return state["seconds"]


@final
class Memory(Teacher):
    """A teacher's logits for the batches of one seed: every training with that seed sees the same.

    Args:
        logits: `[steps, batch, classes]`.
        labels: `[steps, batch]`.
        sums: `[steps, batch]`, the sum of every image's pixels, by which a batch is recognised.

    Raises:
        ValueError: at `teach`, for another batch.
    """

    def __init__(self, logits: Tensor, labels: Tensor, sums: Tensor) -> None:
        super().__init__()
        self.logits, self.labels, self.sums = logits, labels, sums
        self.freeze()

    @classmethod
    def of(cls, teacher: Frozen, data: Data, recipe: Recipe, place: Path) -> Self:
        """What the teacher says to every batch of a recipe's seed, kept in a file."""
        if not place.exists():
            print(f"the teacher's logits for seed {recipe.seed}", flush=True)
            logits, labels, sums = [], [], []
            for step in range(recipe.steps):
                ids = data.indices(recipe.seed, step, recipe.batch_size)
                pixels = data.pixels(ids, recipe.seed, step)
                logits.append(teacher(pixels).logits)
                labels.append(data.train.labels[ids])
                sums.append(pixels.sum((1, 2, 3)))
            save_state(place, [torch.stack(each) for each in (logits, labels, sums)])
        return cls(*load_state(place))

    def first(self, steps: int) -> "Memory":
        """The same for a training of the first steps alone."""
        return Memory(self.logits[:steps], self.labels[:steps], self.sums[:steps])

    def teach(self, pixels: Tensor, labels: Tensor | None, at: Moment) -> Outputs:
        """The logits of the step that the training's progress names."""
        step = round(at.progress * len(self.logits))
        same = labels is not None and torch.equal(labels, self.labels[step])
        if not same or not torch.allclose(pixels.sum((1, 2, 3)), self.sums[step]):
            raise ValueError(f"step {step} has another batch than the teacher saw. Remove the memory from --out.")
        return Outputs(self.logits[step])


def rows_in(place: Path) -> list[Row]:
    """The rows of a CSV file; none where there is no file."""
    if not place.exists():
        return []
    with place.open(newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def open_rows(place: Path, columns: tuple[str, ...]) -> IO[bytes]:
    """The CSV file to append to, locked; half a line that a kill left is cut off, and a header written.

    Raises:
        SystemExit: another process writes to it, or its columns are others.
    """
    header = ",".join(columns).encode() + b"\n"
    handle = place.open("a+b")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SystemExit(f"{place} is being written by another process. Wait for it, or give another --rows.") from None
    handle.seek(0)
    content = handle.read()
    whole = content[: content.rfind(b"\n") + 1]
    if whole and not whole.startswith(header):
        raise SystemExit(f"{place} has other columns. Give another --rows.")
    if len(whole) < len(content):
        handle.truncate(len(whole))
    if not whole:
        _append(handle, header)
    return handle


def append(handle: IO[bytes], columns: tuple[str, ...], row: Row) -> None:
    """Write a row, and wait until it is on the disk."""
    text = io.StringIO()
    csv.DictWriter(text, columns, lineterminator="\n").writerow(row)
    _append(handle, text.getvalue().encode())


def _append(handle: IO[bytes], line: bytes) -> None:
    handle.write(line)
    handle.flush()
    os.fsync(handle.fileno())


def agree(facts: Row, place: Path) -> None:
    """Add what all rows share to what is there of it, such as a setting that came later or another teacher.

    Args:
        facts: plain values.
        place: the JSON file.

    Raises:
        SystemExit: the rows that are there were made another way.
    """
    there = read_json(place, dict, "It is written anew where it is missing.") if place.exists() else {}
    there.pop("format", None)  # of the file, which `write_json` adds
    merged = _merged(there, json.loads(json.dumps(facts)), place, "")
    if merged != there:
        write_json(place, merged)


def _merged(old: object, new: object, place: Path, name: str) -> object:
    if isinstance(old, dict) and isinstance(new, dict):
        own = {key: _merged(old.get(key, new[key]), new[key], place, f"{name}.{key}".strip(".")) for key in new}
        return {**old, **own}
    if old != new:
        raise SystemExit(f"{place} has another {name}: {old}, now {new}. Other --rows?")
    return old
