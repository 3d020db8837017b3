"""Labelled images in three parts: train for weights, search for choosing, test for the closing table only."""

import abc
import dataclasses
import io
import itertools
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from kdnas.preprocessing import Preprocessing
from kdnas.randomness import torch_rng
from kdnas.spec import Spec, nearest, resolve, spec

Augmentation = Literal["none", "shift", "crop_flip", "strong_shift", "strong_crop_flip"]


class Images(abc.ABC):
    """A part of the data: images and labels by index."""

    labels: Tensor

    @abc.abstractmethod
    def take(self, indices: Tensor) -> Tensor:
        """Images `[len(indices), channels, height, width]`, float32 in [0, 1]."""

    @final
    def __len__(self) -> int:
        return len(self.labels)


@final
class TensorImages(Images):
    """Images held in memory, uint8 or float in [0, 1].

    Raises:
        ValueError: another shape, counts that differ, values outside [0, 1], or NaN.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        if images.dim() != 4 or len(images) != len(labels):
            raise ValueError(
                f"images must be [count, channels, height, width] with one label each, got {tuple(images.shape)} "
                f"and {len(labels)} labels."
            )
        if images.is_floating_point():
            broken = ~torch.isfinite(images).flatten(1).all(1)
            if broken.any():
                raise ValueError(
                    f"images must be finite, {int(broken.sum())} of {len(images)} hold NaN or infinity, the first is "
                    f"number {int(broken.nonzero()[0])}. Remove or repair them."
                )
            if images.min() < 0 or images.max() > 1:
                raise ValueError(
                    f"float images have values in [0, 1], got {images.min():.3g} to {images.max():.3g}. Divide by 255."
                )
        self.images, self.labels = images, labels.long()

    def take(self, indices: Tensor) -> Tensor:
        """Images by index."""
        chosen = self.images[indices]
        return chosen.float() if chosen.is_floating_point() else chosen.float() / 255


@final
class FileImages(Images):
    """Images decoded from files (or encoded bytes) when they are taken, resized and centre-cropped to a square.

    Raises:
        ValueError: at `take`, for a file that is no image; it names the file.
    """

    def __init__(self, sources: Sequence[Path | bytes], labels: Tensor, size: int, mode: str = "RGB") -> None:
        self.sources, self.labels, self.size, self.mode = sources, labels.long(), size, mode

    def take(self, indices: Tensor) -> Tensor:
        """Images by index."""
        with ThreadPoolExecutor(2) as pool:
            return torch.stack(list(pool.map(lambda i: self._decode(self.sources[i]), indices.tolist())))

    def _decode(self, source: Path | bytes) -> Tensor:
        try:
            opened = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
            picture = opened.convert(self.mode)
        except OSError as error:
            raise ValueError(
                f"{source if isinstance(source, Path) else 'an image'} cannot be read: {error}."
            ) from error
        scale = self.size / min(picture.size)
        if scale != 1:
            wide = [max(self.size, round(side * scale)) for side in picture.size]
            picture = picture.resize((wide[0], wide[1]), Image.Resampling.BICUBIC)
        left, top = (picture.width - self.size) // 2, (picture.height - self.size) // 2
        array = np.asarray(picture.crop((left, top, left + self.size, top + self.size)), np.float32) / 255
        return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())


@final
@dataclass(frozen=True, eq=False)
class Data:
    """A data set in its three roles.

    Attributes:
        train: teaches weights.
        search: ranks subnets and watches training; never teaches weights.
        test: read once, for the closing table.
        class_names: one per class.
        preprocessing: size, and mean and standard deviation of the train part.
        augmentation: `none`, `shift` (by up to an eighth of the size, zero filled) or `crop_flip` (the same, and
            mirrored half of the time), or `strong_shift` and `strong_crop_flip` (the same, then two random
            operations on each image; see `distorted`).
    """

    train: Images
    search: Images
    test: Images
    class_names: tuple[str, ...]
    augmentation: Augmentation = "none"
    preprocessing: Preprocessing = field(init=False)

    def __post_init__(self) -> None:
        for name in ("train", "search", "test"):
            part: Images = getattr(self, name)
            if len(part) == 0:
                raise ValueError(f"the {name} part is empty. Give it images.")
            counts = torch.bincount(part.labels, minlength=self.classes)
            if part.labels.min() < 0 or len(counts) > self.classes:
                raise ValueError(f"labels are 0 to {self.classes - 1}, the {name} part has {int(part.labels.max())}.")
            if name == "train" and counts.min() < 2:
                rare = int(counts.argmin())
                raise ValueError(
                    f"every class needs at least two training images, class {self.class_names[rare]!r} has "
                    f"{int(counts[rare])}. Add images or remove the class."
                )
        object.__setattr__(self, "preprocessing", _statistics(self.train))

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return len(self.preprocessing.mean)

    def normalise(self, pixels: Tensor) -> Tensor:
        """Pixels in [0, 1] as a student's input."""
        return normalise(pixels, self.preprocessing)

    def indices(self, seed: int, step: int, batch_size: int) -> Tensor:
        """Which training images make up a step's batch: a fresh order per epoch, the ragged rest of it dropped."""
        size = min(batch_size, len(self.train))
        per_epoch = len(self.train) // size
        order = torch.randperm(len(self.train), generator=torch_rng(seed, "order", step // per_epoch))
        place = step % per_epoch
        return order[place * size : (place + 1) * size]

    def pixels(self, indices: Tensor, seed: int, step: int) -> Tensor:
        """Augmented training images in [0, 1]; the augmentation is drawn from (seed, step)."""
        return augment(self.train.take(indices), self.augmentation, torch_rng(seed, "augmentation", step))

    def view(self, indices: Tensor, seed: int, view: int) -> Tensor:
        """Augmented training images in [0, 1] that come back: each augmentation is drawn from (seed, view, image)."""
        taken = self.train.take(indices)
        if self.augmentation == "none":
            return taken
        rngs = [torch_rng(seed, "view", view, index) for index in indices.tolist()]
        one_by_one = [augment(p[None], self.augmentation, rng) for p, rng in zip(taken, rngs, strict=True)]
        return torch.cat(one_by_one)


def normalise(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """`(pixels - mean) / std` per channel."""
    mean = torch.tensor(preprocessing.mean, device=pixels.device)[:, None, None]
    return (pixels - mean) / torch.tensor(preprocessing.std, device=pixels.device)[:, None, None]


def augment(pixels: Tensor, how: Augmentation, rng: torch.Generator) -> Tensor:
    """Random shifts by up to an eighth of the size, and mirroring, and distortion, as named; drawn per image."""
    if how == "none":
        return pixels
    count, _, height, width = pixels.shape
    pad = max(1, height // 8)
    padded = F.pad(pixels, (pad, pad, pad, pad))
    top, left = torch.randint(0, 2 * pad + 1, (2, count), generator=rng)
    rows = top[:, None] + torch.arange(height)
    columns = left[:, None] + torch.arange(width)
    if how in ("crop_flip", "strong_crop_flip"):
        mirrored = torch.rand(count, generator=rng) < 0.5
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    picked = padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    moved = picked.permute(0, 3, 1, 2).contiguous()
    return distorted(moved, rng) if how.startswith("strong") else moved


def distorted(pixels: Tensor, rng: torch.Generator, num_operations: int = 2) -> Tensor:
    """Each image changed by `num_operations` of six operations in turn, all drawn, with a drawn strength.

    Brightness and contrast times 0.4 to 1.6, grey by up to all of it, solarised above 0.4 to 1, posterised to 2 to 6
    bits, or a square of up to half the side cut out. Pixels stay in [0, 1].

    Reference: Cubuk et al., RandAugment, CVPR 2020 Workshops: operations drawn uniformly.
    Differs: no rotation or shear, and the strength is drawn anew instead of fixed.
    """
    count, _, height, width = pixels.shape
    for _ in range(num_operations):
        chosen = torch.randint(0, 6, (count,), generator=rng)
        strength, across, down = torch.rand(3, count, 1, 1, 1, generator=rng)
        factor, mean = 0.4 + 1.2 * strength, pixels.mean((2, 3), keepdim=True)
        levels = 2.0 ** (2 + (4 * strength).round()) - 1
        rows, columns = torch.arange(height)[:, None], torch.arange(width)[None]
        side = strength / 2
        hole = ((rows / height - across).abs() < side / 2) & ((columns / width - down).abs() < side / 2)
        made = (
            pixels * factor,
            mean + (pixels - mean) * factor,
            pixels + strength * (pixels.mean(1, keepdim=True) - pixels),
            torch.where(pixels > 0.4 + 0.6 * strength, 1 - pixels, pixels),
            (pixels * levels).round() / levels,
            pixels.masked_fill(hole, 0.5),
        )
        for place, changed in enumerate(made):
            pixels = torch.where((chosen == place)[:, None, None, None], changed, pixels)
        pixels = pixels.clamp(0, 1)
    return pixels


def strong(data: Spec) -> Data:
    """The same data under strong augmentation, which the teacher sees as the student does: `strong:SPEC`.

    Distortion may take a label's meaning away; the teacher's view of the distorted image says what is left of it. The
    loss `top_k_distillation` keeps to the classes it finds likely.

    Reference: Wei et al., Circumventing Outliers of AutoAugment with Knowledge Distillation, ECCV 2020.
    """
    made: Data = data.build(Data)
    stronger: Augmentation = "strong_crop_flip" if made.augmentation.endswith("crop_flip") else "strong_shift"
    return dataclasses.replace(made, augmentation=stronger)


def load_data(text: str, **options: object) -> Spec:
    """The Spec of a data set from what a person types.

    Args:
        text: `digits`, `folder:PATH`, `cifar10:PATH`, `cifar100:PATH`, or `package.module:function`; `strong:TEXT` is
            one of them under strong augmentation.
        **options: arguments of the loader, such as `size`.

    Raises:
        ValueError: another form; the nearest is offered.
    """
    kind, _, path = text.partition(":")
    if kind == "strong" and path:
        return spec(strong, data=load_data(path, **options))
    loaders = {"digits": digits, "folder": folder, "cifar10": cifar10, "cifar100": cifar100}
    if kind in loaders:
        if kind == "digits":
            return spec(digits, **options)
        if not path:
            raise ValueError(f"{kind} needs a path, {kind}:PATH.")
        return spec(loaders[kind], path=str(Path(path).resolve()), **options)
    if path.isidentifier():
        resolve(text)
        return spec(text, **options)
    raise ValueError(
        f"data is digits, folder:PATH, cifar10:PATH, cifar100:PATH, package.module:function or strong:TEXT, "
        f"got {text!r}." + (nearest(kind, loaders) if kind else "")
    )


def digits() -> Data:
    """The 1,797 scanned 8x8 digits of scikit-learn, split by order: a random split would mix the writers.

    The last 697 are for test; of the first 1,100, 880 train and 220 search.

    Reference: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI repository, 1998 (its test file).
    """
    from sklearn.datasets import load_digits  # slow to import

    loaded: Any = load_digits()
    images = torch.from_numpy(loaded.images).float()[:, None] / 16
    labels = torch.from_numpy(loaded.target)
    cuts = {"train": slice(0, 880), "search": slice(880, 1100), "test": slice(1100, None)}
    parts = {name: TensorImages(images[cut], labels[cut]) for name, cut in cuts.items()}
    return Data(**parts, class_names=tuple(map(str, range(10))), augmentation="shift")


def folder(path: str, size: int = 0, seed: int = 0) -> Data:
    """Images in class folders.

    Args:
        path: holds `train/CLASS/*` and `test/CLASS/*` (or `val`), or just `CLASS/*`, of which a fifth of each class
            (at least one image) becomes the test part. A tenth of each training class (at least one) is for search.
        size: pixels of the square the images are resized and cropped to; by default the smaller side of the
            first image, 224 at most.
        seed: draws the parts.

    Raises:
        ValueError: no such folder, no class folders, other classes in test, a class with too few images.
    """
    root = Path(path)
    if not root.is_dir():
        raise ValueError(f"there is no folder {root}. Give the folder that holds one folder per class.")
    train_root = root / "train" if (root / "train").is_dir() else root
    names = sorted(p.name for p in train_root.iterdir() if p.is_dir())
    if len(names) < 2:
        raise ValueError(f"{train_root} holds {len(names)} class folders, at least 2 are needed: CLASS/image.jpg.")
    listed = _listed(train_root, names)
    few = next((n for n, files in zip(names, listed, strict=True) if len(files) < 4), None)
    if few is not None:
        raise ValueError(
            f"class {few!r} has {len(listed[names.index(few)])} images, at least 4 are needed to train, search "
            f"and test. "
            "Add images or remove the folder."
        )
    test_root = next((root / n for n in ("test", "val") if train_root != root and (root / n).is_dir()), None)
    train, search, test = [], [], []
    for label, files in enumerate(listed):
        order = torch.randperm(len(files), generator=torch_rng(seed, "folder", label)).tolist()
        shuffled = [(files[i], label) for i in order]
        if test_root is None:
            cut = max(1, len(shuffled) // 5)
            test += shuffled[:cut]
            shuffled = shuffled[cut:]
        cut = max(1, len(shuffled) // 10)
        search += shuffled[:cut]
        train += shuffled[cut:]
    if test_root is not None:
        others = sorted(p.name for p in test_root.iterdir() if p.is_dir())
        if others != names:
            differing = sorted(set(others) ^ set(names))
            raise ValueError(f"train and test have other classes: {differing[:5]} are in one of them only.")
        test = [(f, i) for i, files in enumerate(_listed(test_root, names)) for f in files]
    if size == 0:
        with Image.open(train[0][0]) as first:
            size = min(224, *first.size)
    parts = [
        _in_memory(FileImages([f for f, _ in part], torch.tensor([i for _, i in part]), size))
        for part in (train, search, test)
    ]
    return Data(*parts, class_names=tuple(names), augmentation="crop_flip")


def cifar10(path: str, search: int = 5000, size: int = 32) -> Data:
    """CIFAR-10 from the binary files `data_batch_1.bin` ... `test_batch.bin`, or one `.npz` of JPEG bytes.

    Args:
        path: the folder with the binary files, or an `.npz` with `train_jpeg`, `train_offsets`, `train_labels` and the
            same for test (read without pickle).
        search: how many of the 50,000 training images, drawn once and for all, are for search.
        size: pixels; images are averaged down to a smaller size, which divides 32.

    Reference: Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
    """
    names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    files = [f"data_batch_{i}.bin" for i in range(1, 6)]
    return _cifar(Path(path), names, files, "test_batch.bin", 1, search, size)


def cifar100(path: str, search: int = 5000, size: int = 32) -> Data:
    """CIFAR-100 (fine labels) from the binary files `train.bin` and `test.bin`; see `cifar10`."""
    names = tuple(f"class {i}" for i in range(100))
    label_file = Path(path) / "fine_label_names.txt"
    if label_file.is_file():
        names = tuple(label_file.read_text(encoding="utf-8").split())
    return _cifar(Path(path), names, ["train.bin"], "test.bin", 2, search, size)


def _cifar(
    path: Path, names: tuple[str, ...], train_files: list[str], test_file: str, label_bytes: int, search: int, size: int
) -> Data:
    if size < 1 or 32 % size:
        raise ValueError(f"size must divide 32, got {size}.")
    if path.is_file() and path.suffix == ".npz":
        images, labels = _packed(path)
    elif path.is_dir():
        if not (path / test_file).is_file():
            pickled = (path / "batches.meta").exists() or (path / "meta").exists()
            raise ValueError(
                f"{path} has no {test_file}. Give the folder of the binary version"
                + (": this is the Python version, which is pickled, and pickles are never loaded." if pickled else ".")
            )
        images, labels = {}, {}
        for part, files in (("train", train_files), ("test", [test_file])):
            raw = np.concatenate([_records(path / f, 3072 + label_bytes) for f in files])
            images[part] = torch.from_numpy(raw[:, label_bytes:].reshape(-1, 3, 32, 32).copy())
            labels[part] = torch.from_numpy(raw[:, label_bytes - 1].astype(np.int64))
    else:
        raise ValueError(f"there is no {path}. Give the folder of the binary files, or an .npz.")
    if not 0 < search < len(images["train"]):
        raise ValueError(f"search must leave training images of {len(images['train'])}, got {search}.")
    if size < 32:
        images = {n: F.avg_pool2d(x.float(), 32 // size).round().to(torch.uint8) for n, x in images.items()}
    # Drawn, not cut off: some copies of the files are sorted by class.
    order = torch.randperm(len(images["train"]), generator=torch_rng("cifar", "search"))
    taken, left = order[:search], order[search:].sort().values
    return Data(
        TensorImages(images["train"][left], labels["train"][left]),
        TensorImages(images["train"][taken], labels["train"][taken]),
        TensorImages(images["test"], labels["test"]),
        class_names=names,
        augmentation="crop_flip",
    )


def _records(path: Path, length: int) -> np.ndarray:
    if not path.is_file():
        raise ValueError(f"{path} is missing. Unpack the whole binary version.")
    raw = np.frombuffer(path.read_bytes(), np.uint8)
    if len(raw) == 0 or len(raw) % length:
        raise ValueError(f"{path} is cut short: {len(raw)} bytes are no multiple of {length}. Fetch it again.")
    return raw.reshape(-1, length)


def _packed(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    images, labels = {}, {}
    try:
        with np.load(path, allow_pickle=False) as held:
            for part in ("train", "test"):
                data, offsets = held[f"{part}_jpeg"].tobytes(), held[f"{part}_offsets"].astype(int)
                pictures = [
                    np.asarray(Image.open(io.BytesIO(data[a:b])).convert("RGB")) for a, b in itertools.pairwise(offsets)
                ]
                images[part] = torch.from_numpy(np.stack(pictures).transpose(0, 3, 1, 2).copy())
                labels[part] = torch.from_numpy(held[f"{part}_labels"].astype(np.int64))
    except (KeyError, ValueError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a packed CIFAR file: {error}.") from error
    return images, labels


def _listed(root: Path, names: Sequence[str]) -> list[list[Path]]:
    known = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff"}
    return [sorted(p for p in (root / n).rglob("*") if p.suffix.lower() in known) for n in names]


def _in_memory(files: FileImages, limit: int = 2**30) -> Images:
    """Files decoded once into memory where they fit in a gibibyte as uint8."""
    if len(files) * 3 * files.size**2 > limit:
        return files
    pixels = torch.cat(
        [(files.take(chunk) * 255).round().to(torch.uint8) for chunk in torch.arange(len(files)).split(256)]
    )
    return TensorImages(pixels, files.labels)


def _statistics(train: Images) -> Preprocessing:
    count = min(len(train), 10_000)
    chosen = torch.randperm(len(train), generator=torch_rng("statistics"))[:count]
    pixels = train.take(chosen)
    std, mean = torch.std_mean(pixels.double(), (0, 2, 3))
    # A constant channel carries nothing; dividing it by 1 keeps it harmless.
    std = torch.where(std > 1e-6, std, 1.0)
    height, width = pixels.shape[2:]
    rounded = [tuple(round(v, 6) for v in values.tolist()) for values in (mean, std)]
    return Preprocessing(height=height, width=width, mean=rounded[0], std=rounded[1])
