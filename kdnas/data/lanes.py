"""Images of roads with their lanes, in the folders of CULane and TuSimple."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch

from kdnas.data.assembly import in_memory, role_of, split_images
from kdnas.data.base import Data
from kdnas.data.files import FileImages, each_of, opened
from kdnas.plain import reason
from kdnas.runs.files import parse_json
from kdnas.tasks.lanes import NONE, Lanes, in_slots
from kdnas.values import Count, Seed, Side, real, shown

_MOST = 1e6  # pixels from the edge
_MOST_BYTES = 2**30  # of decoded images that are held in memory
_AGAIN = "Take it from the data set again."
_TUSIMPLE = ("", "train_set", "test_set")  # folders with files of labels, and with images


class _Image(NamedTuple):
    """An image with its lanes.

    Attributes:
        file: the picture.
        where: where its lanes are said, for messages.
        lines: the lanes, `[points, 2]` each: column and row in the picture; None where `where` is a file to be read.
    """

    file: Path
    where: str
    lines: list[np.ndarray] | None = None


def culane(path: str, height: Side = 0, width: Side = 0, lanes: Count = 4, seed: Seed = 0) -> Data:
    """Images and lanes in the folders of CULane.

    `list/train.txt`, `list/val.txt` and `list/test.txt` (or `train_gt.txt` and so on) name an image on each line, below
    the folder; what follows the name, a mask and flags, is not used. `NAME.lines.txt` beside `NAME.jpg` has a lane on
    each line: `x y x y ...` in pixels. A line of fewer than two points is no lane. The parts are those of `masks`.

    Args:
        path: the folder.
        height: of the images, which are resized; 0 for that of the first training image.
        width: of the images; 0 for that of the first training image.
        lanes: number of slots, even; see `kdnas.tasks.lanes.in_slots`.
        seed: random seed of the split.

    Raises:
        ValueError: no such folder or list, a list that names what is not there or not below the folder, a line of an
            odd number of values, or of something else than finite numbers, more lanes than slots, a part without
            lanes, or an image that cannot be read.

    Reference: Pan et al., Spatial As Deep: Spatial CNN for Traffic Scene Understanding, AAAI 2018.
    """
    root = _folder(path, "list/train.txt")
    lists = {role: _first([root / "list" / f"{name}{end}.txt" for end in ("", "_gt")]) for role, name in _PARTS.items()}
    if lists["train"] is None:
        raise ValueError(f"{root} must hold list/train.txt or list/train_gt.txt, it has neither. Use CULane's folders.")
    parts = {role: list(_listed(file, root)) for role, file in lists.items() if file is not None}
    return _data(parts, (height, width), lanes, seed, "CULane")


_PARTS = {"train": "train", "validation": "val", "test": "test"}


def tusimple(path: str, height: Side = 0, width: Side = 0, lanes: Count = 6, seed: Seed = 0) -> Data:
    """Images and lanes in the folders of TuSimple.

    `label_data_*.json` (also `train*.json`, `val*.json`) and `test_label.json`, in the folder or in its `train_set` and
    `test_set`, have an object on each line: `raw_file`, an image in the same folder, in that of its part, or in another
    of these; `h_samples`, rows; and `lanes`, of each lane a column for each row, negative for none. A lane of fewer
    than two points is none. The parts are those of `masks`.

    Args:
        path: the folder.
        height: see `culane`.
        width: see `culane`.
        lanes: see `culane`.
        seed: see `culane`.

    Raises:
        ValueError: as `culane`; or a line that is no such object.
    """
    root = _folder(path, "label_data_0313.json")
    parts: dict[str, list[_Image]] = {}
    for folder in (root / name for name in _TUSIMPLE):
        for file in sorted(folder.glob("*.json")):
            role = "train" if file.stem.startswith("label_data") else role_of(file.stem)
            if role is not None and not file.stem.startswith("test_tasks"):
                parts.setdefault(role, []).extend(_labelled(file, root, role))
    if "train" not in parts:
        raise ValueError(f"{root} must hold label_data_*.json, it has none. Use TuSimple's folders.")
    return _data(parts, (height, width), lanes, seed, "TuSimple")


def _folder(path: str, example: str) -> Path:
    root = Path(path)
    if not root.is_dir():
        raise ValueError(f"there is no folder {root}. Use a folder that holds {example}.")
    return root


def _first(files: Sequence[Path]) -> Path | None:
    return next((file for file in files if file.is_file()), None)


def _data(parts: Mapping[str, list[_Image]], size: tuple[int, int], lanes: int, seed: int, name: str) -> Data:
    """The data of images with their lanes."""
    task, (roles, cut) = Lanes(lanes=lanes), split_images(parts, seed)
    own = _size(roles["train"][0].file)
    height, width = size[0] or own[0], size[1] or own[1]
    loaded: dict[str, Any] = {}
    for role, images in roles.items():
        labels = np.stack(list(each_of(lambda image: _label(image, (height, width), lanes), images)))
        files = FileImages([image.file for image in images], torch.from_numpy(labels), (height, width), task=task)
        loaded[role] = in_memory(files, _MOST_BYTES)
    return Data(
        **loaded,
        class_names=task.output_names,
        augmentation="crop_flip",
        source="; ".join(filter(None, (name, f"{sum(map(len, roles.values())):,} images", cut))),
        task=task,
    )


def _size(file: Path) -> tuple[int, int]:
    """Height and width of a picture, from its header."""
    with opened(file) as picture:
        return picture.height, picture.width


def _label(image: _Image, size: tuple[int, int], lanes: int) -> np.ndarray:
    """The places of an image's lanes, `[lanes, height]`."""
    height, width = _size(image.file)
    lines = _lines(Path(image.where)) if image.lines is None else image.lines
    places, slopes = [], []
    for line in lines:
        x, y = line.T
        rows, first = np.unique((y + 0.5) * size[0] / height - 0.5, return_index=True)
        own = np.interp(np.arange(size[0]), rows, (x[first] + 0.5) / width, left=NONE, right=NONE)
        own[(own < 0) | (own > 1)] = NONE
        if (own >= 0).any():
            places.append(own)
            slopes.append(float((x * (y - y.mean())).sum() / np.square(y - y.mean()).sum()))
    label = np.full((lanes, size[0]), NONE, np.float32)
    try:
        slots = in_slots(slopes, lanes)
    except ValueError as error:
        raise ValueError(f"{image.where} cannot be used: {error}.") from error
    for slot, own in zip(slots, places, strict=True):
        label[slot] = own
    return label


def _below(root: Path, name: str, where: str) -> Path:
    """The path of a name below a folder.

    Raises:
        ValueError: it leads out of it.
    """
    parts = PurePosixPath(name.lstrip("/")).parts
    if not parts or ".." in parts or "\0" in name:
        raise ValueError(f"{where} names {shown(name)}, which is not below {root}. Name files of the data set.")
    return root.joinpath(*parts)


def _exists(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long
        return False


def _listed(file: Path, root: Path) -> Iterator[_Image]:
    """The images of one of CULane's lists."""
    for number, line in enumerate(_text(file).splitlines(), 1):
        words = line.split()
        if not words:
            continue
        where = f"line {number} of {file}"
        if len(words) > 1 and not set(words[2:]) <= {"0", "1"}:
            raise ValueError(
                f"{where} must have an image, or an image, a mask and flags of 0 and 1, got {shown(line)}."
            )
        image = _below(root, words[0], where)
        lines = image.with_suffix(".lines.txt")
        for path in (image, lines):
            if not _exists(path):
                raise ValueError(f"{where} names {shown(words[0])}, but there is no {path}. {_AGAIN}")
        yield _Image(image, str(lines))


def _lines(file: Path) -> list[np.ndarray]:
    """The lanes of one of CULane's files of lines."""
    lanes = []
    for number, line in enumerate(_text(file).splitlines(), 1):
        words, where = line.split(), f"line {number} of {file}"
        if len(words) % 2:
            raise ValueError(f"{where} must have pairs of x and y, got {len(words)} numbers. {_AGAIN}")
        try:
            values = [real(word) for word in words]
        except ValueError as error:
            raise ValueError(f"{where} cannot be read: {reason(error)}. {_AGAIN}") from error
        _check_numbers(values, where)
        lanes.append(np.array(values, np.float64).reshape(-1, 2))
    return [lane for lane in lanes if _is_lane(lane)]


def _check_numbers(values: Sequence[float], where: str) -> None:
    wrong = next((value for value in values if not abs(value) <= _MOST), None)  # NaN is in no range
    if wrong is not None:
        raise ValueError(f"{where} must have numbers of at most {_MOST:g} pixels, got {shown(wrong)}. {_AGAIN}")


def _is_lane(points: np.ndarray) -> bool:
    return len(np.unique(points[:, 1])) > 1


def _labelled(file: Path, root: Path, role: str) -> Iterator[_Image]:
    """The images of one of TuSimple's files, from its own folder, that of its part, or another one."""
    part = root / ("test_set" if role == "test" else "train_set")
    folders = [*dict.fromkeys((file.parent, part, *(root / folder for folder in _TUSIMPLE)))]
    for number, line in enumerate(_text(file).splitlines(), 1):
        where = f"line {number} of {file}"
        if not line.strip():
            continue
        record = parse_json(line.encode(), where, _AGAIN)
        if not isinstance(record, dict) or not {"raw_file", "lanes", "h_samples"} <= record.keys():
            raise ValueError(
                f"{where} must be an object with raw_file, lanes and h_samples, got {line[:60]!r}. {_AGAIN}"
            )
        name, rows = record["raw_file"], _numbers(record["h_samples"], "h_samples", where)
        if not isinstance(name, str):
            raise ValueError(f"`raw_file` in {where} must be a text, got {shown(name)}. {_AGAIN}")
        if not isinstance(record["lanes"], list):
            raise ValueError(f"`lanes` in {where} must be a list of lists, got {shown(record['lanes'])}. {_AGAIN}")
        lanes = []
        for lane in record["lanes"]:
            columns = _numbers(lane, "lanes", where)
            if len(columns) != len(rows):
                raise ValueError(f"{where} has a lane of {len(columns)} columns for {len(rows)} rows. {_AGAIN}")
            points = [pair for pair in zip(columns, rows, strict=True) if pair[0] >= 0]
            lanes.append(np.array(points, np.float64).reshape(-1, 2))
        image = _first_below(root, folders, name, where)
        yield _Image(image, where, [lane for lane in lanes if _is_lane(lane)])


def _first_below(root: Path, folders: Sequence[Path], name: str, where: str) -> Path:
    """The image of a name in the first of these folders that has it."""
    images = [_below(folder, name, where) for folder in folders]
    image = next((path for path in images if _exists(path)), None)
    if image is None:
        raise ValueError(f"{where} names {shown(name)}, but there is no {images[0]}. {_AGAIN}")
    return image


def _numbers(values: Any, name: str, where: str) -> list[float]:
    """A list of numbers from a JSON file."""
    if not isinstance(values, list) or any(isinstance(v, bool) or not isinstance(v, int | float) for v in values):
        raise ValueError(f"`{name}` in {where} must hold lists of numbers, got {shown(values)}. {_AGAIN}")
    _check_numbers(values, where)
    return [float(value) for value in values]


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read as UTF-8 text ({reason(error)}). {_AGAIN}") from error
