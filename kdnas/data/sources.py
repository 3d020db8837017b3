"""Images of tables, tars, hub data sets, lists and arrays; all become data by `assembled`, as class folders do."""

import atexit
import csv as csv_module
import functools
import glob
import itertools
import re
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
import torch

from kdnas.data.assembly import NO_CLASS, Files, Layout, assembled, needs_labels, role_of, split
from kdnas.data.base import Data, TensorImages
from kdnas.data.datasets import numbered
from kdnas.data.files import SUFFIXES, Piece, Source, arrays_of
from kdnas.data.pixels import as_pixels
from kdnas.plain import reason, typed_path
from kdnas.runs.files import parse_json, plain
from kdnas.runtimes import library
from kdnas.tasks.labels import as_labels
from kdnas.values import Seed, Side

IMAGES = ("image", "img", "pixel_values", "picture", "photo", "file", "file_name", "filename", "path", "filepath")
LABELS = ("label", "labels", "class", "category", "target", "fine_label", "y", "cls")
_WHOLE = re.compile(r"-?\d{1,18}", re.ASCII)  # a longer one is a name
_MOST_FILES = 100_000
_SPLITS = ("split", "part", "subset", "set")


class _Part(NamedTuple):
    """Pictures and their labels: whole numbers, or texts."""

    sources: list[Source]
    labels: list[Any]


def csv(
    path: str,
    image: str = "",
    label: str = "",
    size: Side = 0,
    seed: Seed = 0,
    skip_broken: bool = False,
) -> Data:
    """Images that a table lists: a column of paths, one of labels, and perhaps one of parts (`train`, `val`, `test`).

    Args:
        path: a `.csv` or `.tsv` with the names of its columns in the first line. Paths are relative to its folder.
        image: the column of the paths; by default one with a usual name, such as `path` or `image`.
        label: the column of the labels, numbers or texts; by default `label` or another usual name.
        size: see `folder`.
        seed: see `folder`.
        skip_broken: see `folder`.

    Raises:
        ValueError: no such file or column, a line without a label, or as `folder`.
    """
    file = _existing(path)
    try:
        with file.open(newline="", encoding="utf-8-sig") as handle:
            rows = list(csv_module.DictReader(handle, delimiter="\t" if file.suffix == ".tsv" else ","))
    except (UnicodeDecodeError, csv_module.Error) as error:
        words = reason(error)
        raise ValueError(f"{path} cannot be read as a table ({words}). Save it as UTF-8 with commas.") from error
    if not rows:
        raise ValueError(f"{path} must have a line with the names of its columns and one per image, it has none.")
    columns = [name for name in rows[0] if name]
    pictures, labels = _column(columns, image, IMAGES, "image", path), _column(columns, label, LABELS, "label", path)
    split_column = next((name for name in columns if name.lower() in _SPLITS), None)
    parts: dict[str, _Part] = {}
    for number, row in enumerate(rows, 2):
        if not row[pictures] or (labels and not row[labels]):
            raise ValueError(f"line {number} of {path} must have {pictures} and {labels}, one is empty.")
        role = _role(str(row[split_column]), path) if split_column else "train"
        part = parts.setdefault(role, _Part([], []))
        part.sources.append(file.parent / typed_path(row[pictures]))
        part.labels.append(row[labels] if labels else NO_CLASS)
    whole = all(_WHOLE.fullmatch(text) for part in parts.values() for text in part.labels)
    if whole:
        parts = {role: _Part(part.sources, [int(text) for text in part.labels]) for role, part in parts.items()}
    return _assembled(parts, None, f"csv:{path}", size=size, seed=seed, skip_broken=skip_broken)


def wds(path: str, size: Side = 0, seed: Seed = 0, skip_broken: bool = False) -> Data:
    """Images of webdataset: tars in which a picture and its label have one name, `0001.jpg` beside `0001.cls`.

    The tars are read once for the places of their pictures, which are then decoded from there; they are not unpacked.

    Args:
        path: of the tars, with `*`, and `{000..012}` as webdataset has it. Tars with `train`, `val` or `test` in their
            names are these parts.
        size: see `folder`.
        seed: see `folder`.
        skip_broken: see `folder`.

    Raises:
        ValueError: no such files, a compressed or damaged tar, a picture without a label, or as `folder`.
    """

    def read(file: Path) -> _Part:
        pictures, labels = dict[str, Piece](), dict[str, Any]()
        try:
            with tarfile.open(file, "r:") as tar:
                for member in tar:
                    if member.isfile():
                        _enter(tar, member, file, pictures, labels)
        except (tarfile.TarError, EOFError, OSError) as error:
            fix = "Decompress it" if file.suffix in (".gz", ".tgz", ".bz2", ".xz", ".zst") else "Write it again"
            raise ValueError(f"{file} cannot be read as an uncompressed tar ({reason(error)}). {fix}.") from error
        if not labels and not needs_labels():
            labels = dict.fromkeys(pictures, NO_CLASS)
        bare = next((key for key in pictures if key not in labels), None)
        if bare is not None:
            raise ValueError(f"{file} has no label of {bare}. Put {bare}.cls (a number) or {bare}.json beside it.")
        return _Part([pictures[key] for key in pictures], [labels[key] for key in pictures])

    return _of_files(path, read, None, f"wds:{path}", size=size, seed=seed, skip_broken=skip_broken)


def _enter(
    tar: tarfile.TarFile, member: tarfile.TarInfo, file: Path, pictures: dict[str, Piece], labels: dict[str, Any]
) -> None:
    """Enter a member of a tar as a picture or a label, or neither."""
    folder, _, base = member.name.rpartition("/")
    stem, _, suffix = base.partition(".")
    key, suffix = f"{folder}/{stem}".lstrip("/"), suffix.lower()
    if f".{suffix.rpartition('.')[2]}" in SUFFIXES:
        pictures[key] = Piece(file, member.offset_data, member.size, f"{file}:{member.name}")
    elif suffix in ("cls", "cls.txt", "label", "txt", "json") and (key not in labels or suffix == "cls"):
        handle = tar.extractfile(member)
        text = (handle.read(2**16) if handle else b"").decode("utf-8", "replace").strip()
        value: Any = _from_json(text) if suffix == "json" else int(text) if _WHOLE.fullmatch(text) else text
        if value not in (None, ""):
            labels[key] = value


def _from_json(text: str) -> Any:
    """The label in a JSON object, or the JSON value itself."""
    try:
        value = parse_json(text.encode(), "", "")
    except ValueError:
        return None
    if isinstance(value, dict):
        value = next((value[name] for name in LABELS if name in value), None)
    return value if isinstance(value, int | str) and not isinstance(value, bool) else None


def parquet(
    path: str,
    image: str = "",
    label: str = "",
    size: Side = 0,
    seed: Seed = 0,
    skip_broken: bool = False,
) -> Data:
    """Images in Parquet tables, as data hubs store them: a column of encoded pictures and one of labels.

    The pictures are copied into one temporary file, from which they are decoded in any order.

    Args:
        path: of the tables, with `*`. Files with `train`, `val` or `test` in their names are these parts.
        image: the column of pictures: bytes, or a structure with `bytes`; by default one with a usual name.
        label: the column of labels; by default `label` or another usual name. Class names are read from the hub's
            metadata, where the file has any.
        size: see `folder`.
        seed: see `folder`.
        skip_broken: see `folder`.

    Raises:
        ValueError: pyarrow is not installed, no such files or columns, pictures that are not bytes, or as `folder`.
    """
    tables: Any = library("pyarrow.parquet", "pyarrow", "parquet")
    names: list[tuple[str, ...] | None] = []

    def read(file: Path) -> _Part:
        with _parquet_errors(file):
            table = tables.ParquetFile(file)
            columns = [field.name for field in table.schema_arrow]
        pictures, labels = (
            _column(columns, image, IMAGES, "image", file),
            _column(columns, label, LABELS, "label", file),
        )
        names.append(_hub_names(table.schema_arrow.metadata, labels))
        status = file.stat()
        return _spooled(file, pictures, labels, status.st_mtime_ns, status.st_size)

    return _of_files(path, read, names, f"parquet:{path}", size=size, seed=seed, skip_broken=skip_broken)


@functools.lru_cache(maxsize=64)
def _spooled(file: Path, pictures: str, labels: str, changed: int, size: int) -> _Part:
    """The pictures of a table as pieces of a temporary file; the last two arguments tell one content from another."""
    del changed, size
    target = _temporary() / f"{len(list(_temporary().iterdir()))}.pictures"
    part, place = _Part([], []), 0
    with target.open("wb") as handle:
        for batch in _batches(file, [pictures, *[labels] * bool(labels)]):
            values = batch[labels].to_pylist() if labels else [NO_CLASS] * len(batch)
            for content, value in zip(batch[pictures].to_pylist(), values, strict=True):
                number = len(part.labels)
                encoded = content.get("bytes") if isinstance(content, dict) else content
                if not isinstance(encoded, bytes):
                    raise ValueError(
                        f"row {number} of {file} must have bytes in {pictures!r}, got {type(encoded).__name__}. Name "
                        "the column of the pictures: image=NAME."
                    )
                if value is None:
                    raise ValueError(f"row {number} of {file} has no {labels!r}. Remove the row.")
                handle.write(encoded)
                part.sources.append(Piece(target, place, len(encoded), f"row {number} of {file}", copied=True))
                part.labels.append(value)
                place += len(encoded)
    return part


def _batches(file: Path, columns: list[str]) -> Iterator[Any]:
    """The rows of a table, some at a time."""
    tables: Any = library("pyarrow.parquet", "pyarrow", "parquet")
    with _parquet_errors(file):
        yield from tables.ParquetFile(file).iter_batches(64, columns=columns)


@contextmanager
def _parquet_errors(file: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of a foreign file, anything
        raise ValueError(f"{file} cannot be read as Parquet ({reason(error)}). Write it again.") from error


@functools.cache
def _temporary() -> Path:
    """A folder of this process, removed at its end."""
    folder = Path(tempfile.mkdtemp(prefix="kdnas-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _hub_names(metadata: Mapping[bytes, bytes] | None, label: str) -> tuple[str, ...] | None:
    """The class names that a hub's metadata give the label."""
    try:
        features = parse_json((metadata or {})[b"huggingface"], "", "")["info"]["features"]
        return tuple(map(str, features[label]["names"]))
    except (KeyError, ValueError, TypeError):
        return None


@final
@dataclass(frozen=True)
class Cell:
    """A picture in a column of a hub's data set, which is read from there when it is needed.

    Attributes:
        rows: the data set.
        column: the column.
        index: of the row.
    """

    rows: Any
    column: str
    index: int

    @property
    def size(self) -> int:
        """Number of bytes."""
        return len(self.read_bytes())

    def read_bytes(self) -> bytes:
        """The encoded picture."""
        content = self.rows[self.index][self.column]
        return content["bytes"] or Path(content["path"]).read_bytes()

    def __str__(self) -> str:
        return f"row {self.index}"


def hf(
    path: str,
    image: str = "",
    label: str = "",
    size: Side = 0,
    seed: Seed = 0,
    skip_broken: bool = False,
) -> Data:
    """A data set of the library datasets, from a folder or by its name on the hub.

    Args:
        path: a folder as `save_to_disk` writes it, a folder that `datasets.load_dataset` reads, or a name on the hub,
            which is downloaded where it is not in the cache.
        image: the column of pictures; by default the one whose feature is `Image`.
        label: the column of labels; by default the one whose feature is `ClassLabel`, or one with a usual name.
        size: see `folder`.
        seed: see `folder`.
        skip_broken: see `folder`.

    Raises:
        ValueError: datasets is not installed, there is no such data set or column, or as `folder`.
    """
    datasets = library("datasets", "datasets", "hf")
    splits = _loaded(datasets, path)
    parts: dict[str, _Part] = {}
    names: tuple[str, ...] | None = None
    for split_name, rows in splits.items():
        features = rows.features
        kinds = {name: type(feature).__name__ for name, feature in features.items()}
        pictures = image or next((name for name, kind in kinds.items() if kind == "Image"), "")
        labels = label or next((name for name, kind in kinds.items() if kind == "ClassLabel"), "")
        pictures = _column(list(features), pictures, IMAGES, "image", path)
        labels = _column(list(features), labels, LABELS, "label", path)
        if kinds[pictures] != "Image":
            raise ValueError(f"the column {pictures!r} of hf:{path} must hold Images, it holds {kinds[pictures]}.")
        names = getattr(features.get(labels), "names", None) or names
        encoded = rows.select_columns([pictures]).cast_column(pictures, datasets.Image(decode=False))
        role = _role(split_name, path) if len(splits) > 1 else "train"
        if role in parts:
            raise ValueError(f"hf:{path} must have one {role} part, got {', '.join(splits)}. Save the ones to be used.")
        cells: list[Any] = [Cell(encoded, pictures, index) for index in range(len(rows))]
        parts[role] = _Part(cells, list(rows[labels]) if labels else [NO_CLASS] * len(cells))
    whole = None if names is None else tuple(names)
    return _assembled(parts, whole, f"hf:{path}", size=size, seed=seed, skip_broken=skip_broken)


def _loaded(library: Any, path: str) -> dict[str, Any]:
    """The parts of a data set by name."""
    folder = Path(path)
    saved = folder.is_dir() and any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))
    bars = not library.are_progress_bars_disabled()
    library.disable_progress_bars()
    try:
        content = library.load_from_disk(path) if saved else library.load_dataset(path)
    except Exception as error:  # of other people's files, anything
        raise ValueError(
            f"hf:{path} cannot be loaded ({reason(error, named=True).rstrip('.')}). Give a folder of save_to_disk, "
            "or the name of a data set on the hub that is in the cache or can be downloaded."
        ) from error
    finally:
        if bars:
            library.enable_progress_bars()
    return dict(content) if isinstance(content, Mapping) else {"train": content}


def npz(path: str, seed: Seed = 0) -> Data:
    """Images and labels in one `.npz` of arrays, read without pickle.

    Args:
        path: the file. Its arrays are `images` and `labels`, also with a part in the name (`train_images`, `x_train`).
        seed: random seed of the split.

    Raises:
        ValueError: no such file, a damaged or too large one, other names, two arrays for one part, or arrays that are
            no images or labels.
    """
    file = _existing(path)
    try:
        arrays = arrays_of(file)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as arrays ({error}). Write it with numpy.savez(PATH, ...).") from error
    found: dict[str, dict[str, Any]] = {}
    names: tuple[str, ...] = ()
    for name, array in arrays.items():
        words = set(re.split(r"[^a-z]+", name.lower()))
        kind = "images" if words & {"images", "image", "x"} else "labels" if words & {"labels", "label", "y"} else ""
        if not kind:
            continue
        pair = found.setdefault(role_of(name) or "train", {})
        if kind in pair:
            raise ValueError(f"{path} has several arrays of {kind} for one part, {name} among them. Keep one of them.")
        pair[kind] = array
    if not needs_labels() and not any("labels" in pair for pair in found.values()):
        found = {role: {**pair, "labels": np.zeros(len(pair["images"]), int)} for role, pair in found.items()}
        names = (NO_CLASS,)
    if "train" not in found or any(len(pair) < 2 for pair in found.values()):
        fix = " Images without labels need --unlabelled." if needs_labels() else ""
        raise ValueError(
            f"{path} must have arrays images and labels, or train_images, train_labels, test_images and so on, it has "
            f"{', '.join(arrays) or 'none'}.{fix}"
        )
    return _of_arrays({role: (as_pixels(p["images"]), p["labels"]) for role, p in found.items()}, names, seed)


def _of_arrays(parts: Mapping[str, tuple[torch.Tensor, Any]], names: Sequence[str], seed: int) -> Data:
    numbers = {role: as_labels(labels, len(images)) for role, (images, labels) in parts.items()}
    classes = int(max(int(each.max()) for each in numbers.values())) + 1
    names = names or [str(number) for number in range(classes)]
    places: dict[str, Files] = {
        role: {name: (each == number).nonzero().flatten().tolist() for number, name in enumerate(names)}
        for role, each in numbers.items()
    }
    pairs, _ = split(places, names, seed)
    outer = next((role for role in ("test", "validation") if role in parts), "train")
    origins = {
        "train": "train",
        "search": "validation" if {"validation", "test"} <= set(parts) else "train",
        "test": outer,
    }
    loaded: dict[str, Any] = {}
    for name, part in pairs.items():
        (images, _), own = parts[origins[name]], numbers[origins[name]]
        indices: Any = [index for index, _ in part]
        loaded[name] = TensorImages(images[indices], own[indices])
    return Data(**loaded, class_names=tuple(names), augmentation="crop_flip")


def _existing(path: str) -> Path:
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"there is no file {path}. Check the path.")
    return file


def _column(columns: Sequence[str], chosen: str, usual: Sequence[str], what: str, where: object) -> str:
    """The column of the images or labels: the chosen one, or the first of the usual names that there is.

    Empty where there is none of labels, and images without labels are allowed.
    """
    if chosen:
        if chosen not in columns:
            raise ValueError(f"{where} has no column {chosen!r}. It has {', '.join(columns)}.")
        return chosen
    lower = {column.lower(): column for column in reversed(columns)}
    name = next((lower[name] for name in usual if name in lower), None)
    if name is None and what == "label" and not needs_labels():
        return ""
    if name is None:
        fix = " Images without labels need --unlabelled." if what == "label" else ""
        raise ValueError(
            f"{where} must have a column of the {what}s, it has {', '.join(columns)}. Name it: {what}=NAME.{fix}"
        )
    return name


def _role(name: str, where: object) -> str:
    role = role_of(name)
    if role is None:
        raise ValueError(f"parts of {where} must be named train, validation or test, got {name!r}. Rename it.")
    return role


def _of_files(
    path: str,
    read: Callable[[Path], _Part],
    names: list[tuple[str, ...] | None] | None,
    form: str,
    **options: Any,
) -> Data:
    """The data of several files, which are parts by their names."""
    files = sorted({Path(file) for pattern in _braces(path) for file in glob.glob(pattern)})  # noqa: PTH207
    if not files:
        raise ValueError(f"there are no files {path}. Check the path; * stands for any letters.")
    roles = {file: role_of(file.stem) for file in files}
    unknown = [file.name for file, role in roles.items() if role is None]
    if unknown and len(unknown) < len(files):
        raise ValueError(
            f"either all files of {form} have train, validation or test in their names or none, {unknown[0]} has not. "
            "Rename it, or leave it out."
        )
    parts: dict[str, _Part] = {}
    for file, role in roles.items():
        content, part = read(file), parts.setdefault(role or "train", _Part([], []))
        part.sources.extend(content.sources)
        part.labels.extend(content.labels)
    known = {each for each in names or () if each}
    if len(known) > 1:
        raise ValueError(f"all files of {form} must have the same class names, got {len(known)} lists of them.")
    return _assembled(parts, next(iter(known), None), form, **options)


def _braces(path: str) -> Iterator[str]:
    """The paths that `{000..012}` stands for."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", path, re.ASCII)
    if found is None:
        yield path
        return
    first, last = found[1], found[2]
    if len(last) > 18 or int(last) - int(first) >= _MOST_FILES:
        raise ValueError(f"{found[0]} must stand for at most {_MOST_FILES:,} files, got {plain(path, 80)}.")
    for number in itertools.takewhile(lambda n: n <= int(last), itertools.count(int(first))):
        yield from _braces(path[: found.start()] + str(number).zfill(len(first)) + path[found.end() :])


def _assembled(parts: Mapping[str, _Part], names: tuple[str, ...] | None, form: str, **options: Any) -> Data:
    """Data of pictures with labels."""
    if "train" not in parts:
        raise ValueError(f"{form} must have a train part, it has {', '.join(sorted(parts)) or 'no images'}.")
    labels = [label for part in parts.values() for label in part.labels]
    whole = all(isinstance(label, int) for label in labels)
    if whole and labels and min(labels) < 0:
        raise ValueError(f"labels of {form} must be at least 0, got {min(labels)}. Leave out images without a label.")
    if whole and names is None:  # numbers need not begin at 0 here: they are names
        names = tuple(map(str, sorted(set(labels))))
        labels = [str(label) for label in labels]
    classes, numbers = numbered(labels, names)
    if len(numbers) and int(numbers.max()) >= len(classes):
        raise ValueError(f"labels of {form} must be 0 to {len(classes) - 1}, got {int(numbers.max())}.")
    files: dict[str, Files] = {}
    place = 0
    for role, part in parts.items():
        by_class: dict[str, list[Source]] = {name: [] for name in classes}
        for source, number in zip(part.sources, numbers[place : place + len(part.labels)].tolist(), strict=True):
            by_class[classes[number]].append(source)
        files[role], place = by_class, place + len(part.labels)
    counts = ", ".join(f"{role} {len(part.labels):,}" for role, part in parts.items())
    return assembled(Layout(files, counts, names=classes), form, **options)
