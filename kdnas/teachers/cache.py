"""A teacher's outputs on the training images, computed once and read from disk afterwards."""

import contextlib
import functools
import hashlib
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict, final

import torch
from torch import Tensor

from kdnas.data.base import Data
from kdnas.outputs import Outputs
from kdnas.ranks import team
from kdnas.ranks import tensors as ranks
from kdnas.runs.checkpoint import load_tensors, save_tensors
from kdnas.runs.files import current_folder, new_folder, read_json, write_json
from kdnas.runs.progress import progress
from kdnas.teachers import _top
from kdnas.teachers.base import Teacher
from kdnas.teachers.combined import Route

_log = logging.getLogger(__name__)

INDEX = "index.json"
_PART = ".part{}.json"  # what one process has written
_TOP = "top."
_PROBE = 64  # images by which the size is estimated
_SHARD = 256  # images per file
_MOST_OPEN = 16384  # files, each mapped into memory, of which a Linux process has 65,530 unless the machine is set up
_REMOVE = "Remove the folder: it is written again."


_MAPS = {False: "stages", True: "stages and the classified"}

Stored = Literal["all", "top_logits"]
"""What is stored of a teacher's outputs: everything, or of logits the largest, and nothing else."""


class _Index(TypedDict):
    files: dict[str, str]


class _Part(_Index):
    summary: tuple[float, float, float, float]


class _Content(NamedTuple):
    """What is cached; see `TeacherCache`."""

    teacher: Teacher
    data: Data
    seed: int
    views: int
    stored: Stored


@final
class TeacherCache:
    """A teacher's outputs on a fixed number of augmented views of every training image.

    A view's augmentation follows from (seed, view, image), so that an image has the same pixels in every epoch of that
    view: epoch `e` uses view `e mod views`. A training with a cache therefore uses `views` fixed augmentations of
    each image instead of new ones; without augmentation there is one view.

    The files are written by all processes of `torchrun`, each its part of them, and read by any process that sees the
    folder. With `top_logits` there are no feature maps, and of the logits `kdnas.teachers._top` stores as few as keep
    the KL divergence below 1e-3 at temperature 1: at most 300 bytes per image, or all logits of a flatter distribution.
    At higher temperatures the differences between the logits that are not stored count for more, and are lost.

    A file stores 256 images of one view, and is mapped into memory, not read into it. Every read compares the image's
    index and a checksum of its pixels with those stored; a file's SHA-256 is checked when it is opened.

    Args:
        folder: the cache's folder, as `open_cache` writes it.
        teacher: the teacher of the outputs.
        data: the data of the images.
        seed: seed of the views.
        views: number of views.
        stored: what is stored.

    Raises:
        ValueError: no cache, a damaged one, or one of another teacher, other data, another seed or number of views.
            While reading: a changed file, or pixels other than those of the stored outputs.
    """

    def __init__(
        self, folder: Path, teacher: Teacher, data: Data, *, seed: int, views: int, stored: Stored = "all"
    ) -> None:
        self.folder = current_folder(folder)
        if not (self.folder / INDEX).exists():
            raise ValueError(f"{folder} is not a teacher cache: it has no {INDEX}. {_REMOVE}")
        self._index: dict[str, Any] = read_json(self.folder / INDEX, _Index, _REMOVE)
        difference = _difference(self._index, _identity(teacher, data, seed, views, stored))
        if difference:
            raise ValueError(f"the teacher cache {folder} was written with another {difference}. {_REMOVE}")
        self.views, self._shards = views, dict[str, dict[str, Tensor]]()

    def outputs(self, ids: Tensor, view: int, pixels: Tensor) -> Outputs:
        """The teacher's outputs on one view of a batch, on the pixels' device; without `Outputs.images`.

        Args:
            ids: `[batch]`, the images' indices in the train part.
            view: index of the view.
            pixels: `[batch, channels, height, width]`, the augmented images.
        """
        tensors: dict[str, Tensor] = {}
        ids = ids.cpu()
        for shard in (ids // _SHARD).unique().tolist():
            stored = self._shard(view, shard)
            here = (ids // _SHARD == shard).nonzero().flatten()
            rows = ids[here] % _SHARD
            if int(rows.max()) >= len(stored["ids"]) or not torch.equal(stored["ids"][rows], ids[here]):
                raise ValueError(f"images in {_file(view, shard)} of {self.folder} are misaligned. {_REMOVE}")
            for name, tensor in _rows(stored, rows):
                if name not in tensors:
                    tensors[name] = tensor.new_empty(len(ids), *tensor.shape[1:])
                tensors[name][here] = tensor
        sums = tensors["pixels"]
        differs = ((sums - _checksum(pixels)).abs() > 1e-6 * (1 + sums.abs())).nonzero().flatten()
        if len(differs):
            raise ValueError(
                f"training image {int(ids[differs[0]])} does not have the pixels of view {view} in the teacher cache "
                f"{self.folder}: the data changed. {_REMOVE}"
            )
        return _unflatten({n: t.to(pixels.device) for n, t in tensors.items() if n not in ("ids", "pixels")})

    def _shard(self, view: int, shard: int) -> dict[str, Tensor]:
        name = _file(view, shard)
        if name not in self._shards:
            if len(self._shards) >= _MOST_OPEN:
                del self._shards[next(iter(self._shards))]
            path = self.folder / name
            if name not in self._index["files"] or not path.is_file() or _digest(path) != self._index["files"][name]:
                raise ValueError(f"{name} of the teacher cache {self.folder} is missing or was changed. {_REMOVE}")
            self._shards[name], _ = load_tensors(path, _REMOVE)
        return self._shards[name]


def open_cache(
    folder: Path,
    teacher: Teacher,
    data: Data,
    *,
    seed: int,
    views: int,
    limit: float,
    device: torch.device | str = "cpu",
    stored: Stored = "all",
) -> TeacherCache:
    """The cache in a folder; written first if there is none, or a stale one: of another teacher or other settings.

    A stale cache is replaced, which is logged; it stays in place until the new one is complete.

    Args:
        folder: the cache's folder; it appears complete or not at all.
        teacher: the teacher.
        data: its train part is cached.
        seed: seed of the views.
        views: augmentations per image.
        limit: most gigabytes to write.
        device: where to run the teacher.
        stored: what is stored; see `TeacherCache`.

    Raises:
        ValueError: a damaged cache; or it would be larger than `limit`, the teacher changes with the training's
            progress, or there are several views of data without augmentation.
    """
    content = _Content(teacher, data, seed, views, stored)
    identity, place = _identity(*content), torch.device(device)
    stale = _stale(folder, identity)
    if stale:
        _log.info(f"teacher cache: {folder} was written with another {stale}; it is replaced")
    if stale or not current_folder(folder).is_dir():
        _check(folder, content, limit, place)
        with new_folder(folder) as new:
            files = _write(new, content, place)
            write_json(new / INDEX, identity | {"files": files})
    return TeacherCache(folder, teacher, data, seed=seed, views=views, stored=stored)


def _check(folder: Path, content: _Content, limit: float, device: torch.device) -> None:
    """Raise a ValueError where a cache cannot be written, or would be too large."""
    teacher, data, seed, views, stored = content
    if views < 1 or (views > 1 and data.augmentation == "none"):
        raise ValueError(
            f"a teacher cache needs at least one view per image, and exactly one without augmentation, got {views}."
        )
    if any(isinstance(module, Route) for module in teacher.modules()):
        raise ValueError("outputs of a route cannot be cached, they change during the training. Set teacher_views=0.")
    ids = torch.arange(min(_PROBE, len(data.train)))
    outputs = teacher(data.view(ids, seed, 0).to(device), data.train.labels[ids].to(device))
    probe, _ = _flatten(outputs, stored)
    each = math.ceil(sum(tensor.numel() * tensor.element_size() for tensor in probe.values()) / len(ids))
    size = each * len(data.train) * views / 1e9
    _log.info(f"teacher cache: {len(data.train):,} images x {views} views x {each:,} bytes = {size:.3g} GB in {folder}")
    if size > limit:
        raise ValueError(
            f"the teacher cache would take {size:.3g} GB, the limit is {limit:g}. Raise the limit, use fewer views or "
            "a teacher with fewer stages, store only logits with cache_outputs='top_logits', or set teacher_views=0."
        )


def _write(new: Path, content: _Content, device: torch.device) -> dict[str, str]:
    """Write all files, each process its part of them; returns their SHA-256 by name."""
    team.everywhere(_write_part, str(new), content, device.type)
    files: dict[str, str] = {}
    summaries = []
    for process in range(team.number()):
        path = new / _PART.format(process)
        if not path.is_file():
            raise ValueError(
                f"the teacher cache {new.parent} must be on a file system that all processes share: there is nothing "
                f"of process {process}. Put --out there, or set teacher_views=0."
            )
        part = read_json(path, _Part, _REMOVE)
        files |= part["files"]
        summaries.append(_top.Summary(*part["summary"]))
        path.unlink()
    if content.stored != "all":
        _log.info(f"teacher cache: {functools.reduce(_top.Summary.and_of, summaries)}")
    return dict(sorted(files.items()))


def _write_part(folder: str, content: _Content, device_type: str) -> None:
    """Write this process's files, and a list of them."""
    teacher, data, seed, views, stored = content
    new, rank, device = Path(folder), ranks.rank(), torch.device(device_type)
    new.mkdir(exist_ok=True)
    files: dict[str, str] = {}
    summary = _top.Summary(0, 0, 0, 0.0)
    shards = list(enumerate(torch.arange(len(data.train)).split(_SHARD)))
    mine = [(view, number, ids) for view in range(views) for number, ids in shards][rank :: ranks.size()]
    teacher = teacher.to(device)
    with progress("teacher cache", len(mine)) if not rank else contextlib.nullcontext() as bar:
        for view, number, ids in mine:
            pixels = data.view(ids, seed, view)
            outputs = teacher(pixels.to(device), data.train.labels[ids].to(device))
            stored_tensors, own = _flatten(outputs, stored)
            path = new / _file(view, number)
            save_tensors(path, stored_tensors | {"ids": ids, "pixels": _checksum(pixels)})
            files[path.name], summary = _digest(path), summary.and_of(own)
            if bar is not None:
                bar.update(len(files))
    write_json(new / _PART.format(rank), {"files": files, "summary": list(summary)})


def _identity(teacher: Teacher, data: Data, seed: int, views: int, stored: Stored) -> dict[str, Any]:
    """What a cache depends on, under the names that messages use."""
    weights = hashlib.sha256(type(teacher).__name__.encode())
    for name, tensor in sorted(teacher.state_dict().items()):
        weights.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        weights.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    labels = hashlib.sha256(data.train.labels.numpy().tobytes())
    return {
        "teacher": weights.hexdigest(),
        "training_labels": labels.hexdigest(),
        "augmentation": data.augmentation,
        "seed": seed,
        "number_of_views": views,
        "selection_of_outputs": stored,
        "set_of_maps": _MAPS[stored == "all" and data.task.dense],
    }


def _difference(index: dict[str, Any], identity: dict[str, Any]) -> str:
    """The name of the first value in which a cache differs; empty if none does."""
    index = {"selection_of_outputs": "all", "set_of_maps": _MAPS[False]} | index  # of before there was a choice
    return next((name.replace("_", " ") for name, value in identity.items() if index.get(name) != value), "")


def _stale(folder: Path, identity: dict[str, Any]) -> str:
    """In what a readable cache in the folder differs; empty if there is none, or it does not."""
    path = current_folder(folder) / INDEX
    return _difference(read_json(path, _Index, _REMOVE), identity) if path.exists() else ""


def _flatten(outputs: Outputs, stored: Stored, prefix: str = "") -> tuple[dict[str, Tensor], _top.Summary]:
    """The outputs as named tensors, and what was stored of the logits."""
    if stored == "all":
        tensors, summary = {f"{prefix}logits": outputs.logits}, _top.Summary(len(outputs.logits), 0, 0, 0.0)
        tensors |= {f"{prefix}features.{i}": feature for i, feature in enumerate(outputs.features)}
        tensors |= {f"{prefix}attentions.{i}": attention for i, attention in enumerate(outputs.attentions)}
        tensors |= {} if outputs.classified is None else {f"{prefix}classified": outputs.classified}
    else:
        largest, summary = _top.packed(outputs.logits)
        tensors = {f"{prefix}{_TOP}{name}": tensor for name, tensor in largest.items()}
    for i, member in enumerate(outputs.members):
        more, own = _flatten(member, stored, f"{prefix}members.{i}.")
        tensors, summary = tensors | more, summary.and_of(own)
    return tensors, summary


def _rows(stored: Mapping[str, Tensor], rows: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The named tensors of some images of a file; logits whole again."""
    for name, tensor in stored.items():
        place = name.find(_TOP)
        if place < 0:
            yield name, tensor[rows]
        elif name.endswith(f"{_TOP}counts"):
            prefix = name[:place]
            part = {
                key.removeprefix(f"{prefix}{_TOP}"): t for key, t in stored.items() if key.startswith(f"{prefix}{_TOP}")
            }
            yield f"{prefix}logits", _top.unpacked(part, rows)


def _unflatten(tensors: dict[str, Tensor], prefix: str = "") -> Outputs:
    def series(kind: str) -> Iterator[Tensor]:
        number = 0
        while f"{prefix}{kind}.{number}" in tensors:
            yield tensors[f"{prefix}{kind}.{number}"]
            number += 1

    members = []
    while f"{prefix}members.{len(members)}.logits" in tensors:
        members.append(_unflatten(tensors, f"{prefix}members.{len(members)}."))
    logits, features, attentions = tensors[f"{prefix}logits"], tuple(series("features")), tuple(series("attentions"))
    classified = tensors.get(f"{prefix}classified")
    return Outputs(logits, features, attentions, members=tuple(members), classified=classified)


def _checksum(pixels: Tensor) -> Tensor:
    """A number per image that a shift, a mirrored image or another image changes, `[batch]`."""
    flat = pixels.cpu().double().flatten(1)
    # A ramp of irrational slope: a plain sum would not tell an image from its mirror image.
    ramp = (torch.arange(flat.shape[1], dtype=torch.float64) * 0.6180339887498949) % 1
    return (flat * ramp).mean(1)


def _file(view: int, shard: int) -> str:
    return f"view{view:03}-{shard:06}.safetensors"


def _digest(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
