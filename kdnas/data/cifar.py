"""CIFAR-10 and CIFAR-100 as their authors distribute them."""

import io
import itertools
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from kdnas.data.base import Data, TensorImages
from kdnas.data.files import arrays_of
from kdnas.plain import reason
from kdnas.randomness import torch_rng
from kdnas.values import Count, Size


def cifar10(path: str, search: Count = 5000, size: Size = 32) -> Data:
    """CIFAR-10 from the binary files `data_batch_1.bin` ... `test_batch.bin`, or one `.npz` of JPEG bytes.

    Args:
        path: the folder with the binary files, or an `.npz` with `train_jpeg`, `train_offsets`, `train_labels` and the
            same for test (read without pickle).
        search: number of the 50,000 training images that become the search part, always the same ones.
        size: pixels; images are averaged down to a smaller size, a divisor of 32.

    Reference: Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
    """
    names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    files = [f"data_batch_{i}.bin" for i in range(1, 6)]
    return _cifar(Path(path), names, files, "test_batch.bin", 1, search, size)


def cifar100(path: str, search: Count = 5000, size: Size = 32) -> Data:
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
        raise ValueError(f"`size` must divide 32, got {size}.")
    if path.is_file() and path.suffix == ".npz":
        images, labels = _packed(path)
    elif path.is_dir():
        if not (path / test_file).is_file():
            pickled = (path / "batches.meta").exists() or (path / "meta").exists()
            raise ValueError(
                f"{path} has no {test_file}. Use the folder of the binary version"
                + (": this is the pickled Python version, and pickles are never loaded." if pickled else ".")
            )
        images, labels = {}, {}
        for part, files in (("train", train_files), ("test", [test_file])):
            raw = np.concatenate([_records(path / f, 3072 + label_bytes) for f in files])
            images[part] = torch.from_numpy(raw[:, label_bytes:].reshape(-1, 3, 32, 32).copy())
            labels[part] = torch.from_numpy(raw[:, label_bytes - 1].astype(np.int64))
    else:
        raise ValueError(f"{path} does not exist. Use the folder of the binary files, or an .npz file.")
    if not 0 < search < len(images["train"]):
        raise ValueError(f"`search` must be between 1 and {len(images['train']) - 1}, got {search}.")
    if size < 32:
        images = {n: F.avg_pool2d(x.float(), 32 // size).round().to(torch.uint8) for n, x in images.items()}
    # Sampled, not cut off: some copies of the files are sorted by class.
    order = torch.randperm(len(images["train"]), generator=torch_rng("cifar", "search"))
    held_out, rest = order[:search], order[search:].sort().values
    return Data(
        TensorImages(images["train"][rest], labels["train"][rest]),
        TensorImages(images["train"][held_out], labels["train"][held_out]),
        TensorImages(images["test"], labels["test"]),
        class_names=names,
        augmentation="crop_flip",
    )


def _records(path: Path, length: int) -> np.ndarray:
    if not path.is_file():
        raise ValueError(f"{path} does not exist. Unpack the whole binary version.")
    raw = np.frombuffer(path.read_bytes(), np.uint8)
    if len(raw) == 0 or len(raw) % length:
        raise ValueError(f"{path} is cut short: {len(raw)} bytes are no multiple of {length}. Download it again.")
    return raw.reshape(-1, length)


def _packed(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    images, labels = {}, {}
    try:
        arrays = arrays_of(path)
        for part in ("train", "test"):
            data, offsets = arrays[f"{part}_jpeg"].tobytes(), arrays[f"{part}_offsets"].astype(int)
            pictures = [_picture(data[a:b]) for a, b in itertools.pairwise(offsets)]
            images[part] = torch.from_numpy(np.stack(pictures).transpose(0, 3, 1, 2).copy())
            labels[part] = torch.from_numpy(arrays[f"{part}_labels"].astype(np.int64))
    except Exception as error:  # of damaged headers, streams and pictures, anything
        words = reason(error, named=isinstance(error, KeyError))
        raise ValueError(f"{path} is not a packed CIFAR file: {words}.") from error
    return images, labels


def _picture(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as picture:
        if picture.size != (32, 32):
            raise ValueError(f"an image has {picture.width} x {picture.height} pixels, not 32 x 32")
        return np.asarray(picture.convert("RGB"))
