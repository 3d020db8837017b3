"""Images in one folder per class."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from kdnas.data.base import Data, FileImages, Images, TensorImages
from kdnas.randomness import torch_rng


def folder(path: str, size: int = 0, seed: int = 0) -> Data:
    """Images in class folders.

    Args:
        path: holds `train/CLASS/*` and `test/CLASS/*` (or `val`), or just `CLASS/*`, of which a fifth of each class
            (at least one image) becomes the test part. A tenth of each training class (at least one) is for search.
        size: side in pixels of the square that images are resized and cropped to; 0 for the smaller side of the first
            image, 224 at most.
        seed: random seed of the split.

    Raises:
        ValueError: no such folder, no class folders, other classes in test, a class with too few images.
    """
    root = Path(path)
    if not root.is_dir():
        raise ValueError(f"there is no folder {root}. Use a folder that holds one folder per class.")
    train_root = root / "train" if (root / "train").is_dir() else root
    names = sorted(p.name for p in train_root.iterdir() if p.is_dir())
    if len(names) < 2:
        raise ValueError(f"{train_root} must hold at least 2 class folders (CLASS/image.jpg), got {len(names)}.")
    files_of = _image_files(train_root, names)
    few = next((n for n, files in zip(names, files_of, strict=True) if len(files) < 4), None)
    if few is not None:
        raise ValueError(
            f"every class must have at least 4 images to train, search and test, class {few!r} has "
            f"{len(files_of[names.index(few)])}. Add images or remove the folder."
        )
    test_root = next((root / n for n in ("test", "val") if train_root != root and (root / n).is_dir()), None)
    train, search, test = [], [], []
    for label, files in enumerate(files_of):
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
            raise ValueError(f"train and test must have the same classes, {differing[:5]} are in one of them only.")
        test = [(f, i) for i, files in enumerate(_image_files(test_root, names)) for f in files]
    if size == 0:
        with Image.open(train[0][0]) as first:
            size = min(224, *first.size)
    parts = [
        _in_memory(FileImages([f for f, _ in part], torch.tensor([i for _, i in part]), size))
        for part in (train, search, test)
    ]
    return Data(*parts, class_names=tuple(names), augmentation="crop_flip")


def _image_files(root: Path, names: Sequence[str]) -> list[list[Path]]:
    suffixes = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff"}
    return [sorted(p for p in (root / n).rglob("*") if p.suffix.lower() in suffixes) for n in names]


def _in_memory(files: FileImages, limit: int = 2**30) -> Images:
    """Files decoded once into memory where they fit in a gibibyte as uint8."""
    if len(files) * 3 * files.size**2 > limit:
        return files
    pixels = torch.cat([(images * 255).round().to(torch.uint8) for images, _ in files.batches(256)])
    return TensorImages(pixels, files.labels)
