"""A teacher's outputs on the training images, computed once and read from disk afterwards."""

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict, final

import torch
from torch import Tensor

from kdnas.data.base import Data
from kdnas.outputs import Outputs
from kdnas.runs.checkpoint import load_tensors, save_tensors
from kdnas.runs.files import current_folder, new_folder, read_json, write_json
from kdnas.runs.progress import progress
from kdnas.teachers.base import Teacher
from kdnas.teachers.combined import Route

_log = logging.getLogger(__name__)

INDEX = "index.json"
_SHARD = 256  # images per file
_REMOVE = "Remove the folder: it is written again."


class _Index(TypedDict):
    files: dict[str, str]


@final
class TeacherCache:
    """A teacher's outputs on a fixed number of augmented views of every training image.

    A view's augmentation follows from (seed, view, image), so that an image has the same pixels in every epoch of that
    view: epoch `e` uses view `e mod views`. A training with a cache therefore uses `views` fixed augmentations of
    each image instead of new ones; without augmentation there is one view.

    A file stores 256 images of one view. Every read compares the image's index and a checksum of its pixels with
    those stored; a file's SHA-256 is checked when it is first opened.

    Args:
        folder: the cache's folder, as `open_cache` writes it.
        teacher: the teacher of the outputs.
        data: the data of the images.
        seed: seed of the views.
        views: number of views.

    Raises:
        ValueError: no cache, a damaged one, or one of another teacher, other data, another seed or number of views.
            While reading: a changed file, or pixels other than those of the stored outputs.
    """

    def __init__(self, folder: Path, teacher: Teacher, data: Data, *, seed: int, views: int) -> None:
        self.folder = current_folder(folder)
        if not (self.folder / INDEX).exists():
            raise ValueError(f"{folder} is not a teacher cache: it has no {INDEX}. {_REMOVE}")
        self._index: dict[str, Any] = read_json(self.folder / INDEX, _Index, _REMOVE)
        difference = _difference(self._index, _identity(teacher, data, seed, views))
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
            for name, tensor in stored.items():
                if name not in tensors:
                    tensors[name] = tensor.new_empty(len(ids), *tensor.shape[1:])
                tensors[name][here] = tensor[rows]
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

    Raises:
        ValueError: a damaged cache; or it would be larger than `limit`, the teacher changes with the training's
            progress, or there are several views of data without augmentation.
    """
    stale = _stale(folder, _identity(teacher, data, seed, views))
    if stale:
        _log.info(f"teacher cache: {folder} was written with another {stale}; it is replaced")
    if stale or not current_folder(folder).is_dir():
        _write(folder, teacher, data, seed, views, limit, torch.device(device))
    return TeacherCache(folder, teacher, data, seed=seed, views=views)


def _write(
    folder: Path, teacher: Teacher, data: Data, seed: int, views: int, limit: float, device: torch.device
) -> None:
    if views < 1 or (views > 1 and data.augmentation == "none"):
        raise ValueError(
            f"a teacher cache needs at least one view per image, and exactly one without augmentation, got {views}."
        )
    if any(isinstance(module, Route) for module in teacher.modules()):
        raise ValueError("outputs of a route cannot be cached, they change during the training. Set teacher_views=0.")
    probe = _flatten(teacher(data.view(torch.arange(1), seed, 0).to(device), data.train.labels[:1].to(device)))
    each = sum(tensor.numel() * tensor.element_size() for tensor in probe.values())
    size = each * len(data.train) * views / 1e9
    _log.info(f"teacher cache: {len(data.train):,} images x {views} views x {each:,} bytes = {size:.3g} GB in {folder}")
    if size > limit:
        raise ValueError(
            f"the teacher cache would take {size:.3g} GB, the limit is {limit:g}. Raise the limit, use fewer views or "
            "a teacher with fewer stages, or set teacher_views=0."
        )
    files: dict[str, str] = {}
    shards = list(torch.arange(len(data.train)).split(_SHARD))
    with new_folder(folder) as new, progress("teacher cache", views * len(shards)) as bar:
        for view in range(views):
            for number, ids in enumerate(shards):
                pixels = data.view(ids, seed, view)
                outputs = teacher(pixels.to(device), data.train.labels[ids].to(device))
                tensors = _flatten(outputs)
                path = new / _file(view, number)
                save_tensors(path, tensors | {"ids": ids, "pixels": _checksum(pixels)})
                files[path.name] = _digest(path)
                bar.update(len(files))
        index = _identity(teacher, data, seed, views) | {"files": files}
        write_json(new / INDEX, index)


def _identity(teacher: Teacher, data: Data, seed: int, views: int) -> dict[str, Any]:
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
    }


def _difference(index: dict[str, Any], identity: dict[str, Any]) -> str:
    """The name of the first value in which a cache differs; empty if none does."""
    return next((name.replace("_", " ") for name, value in identity.items() if index.get(name) != value), "")


def _stale(folder: Path, identity: dict[str, Any]) -> str:
    """In what a readable cache in the folder differs; empty if there is none, or it does not."""
    path = current_folder(folder) / INDEX
    return _difference(read_json(path, _Index, _REMOVE), identity) if path.exists() else ""


def _flatten(outputs: Outputs, prefix: str = "") -> dict[str, Tensor]:
    tensors = {f"{prefix}logits": outputs.logits}
    tensors |= {f"{prefix}features.{i}": feature for i, feature in enumerate(outputs.features)}
    tensors |= {f"{prefix}attentions.{i}": attention for i, attention in enumerate(outputs.attentions)}
    for i, member in enumerate(outputs.members):
        tensors |= _flatten(member, f"{prefix}members.{i}.")
    return tensors


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
    return Outputs(logits, features, attentions, members=tuple(members))


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
