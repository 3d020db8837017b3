"""CamVid as a classification of crops: street scenes cut into squares of one class, in folders that kdnas reads.

python experiments/camvid_crops.py camvid_small.npz runs/crops
kdnas fit --data folder:runs/crops --blocks 1 --width 16 --steps 400 --batch-size 64 --out runs/crops-teacher
kdnas run --data folder:runs/crops --teacher runs/crops-teacher --budget macs=25% --steps 300 --batch-size 64
    --out runs/crops-student

Brostow, Fauqueur, Cipolla, Semantic Object Classes in Video, Pattern Recognition Letters 2009 (images and labels).

A crop is 32x32 pixels, at multiples of 16, with one class on at least 80 % of its pixels; void is no class. Parts are
those of the images, so that no image is in two: `train`, `val` (the search part) and `test`. At most 500 crops of a
class are drawn for training and 150 for each other part; classes with fewer than 100 training crops are left out.

The .npz holds JPEG images and PNG label maps end to end: `train_jpeg`, `train_jpeg_offsets`, `train_mask_png`, ...
"""

import argparse
import io
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIDE, STRIDE, SHARE = 32, 16, 0.8
MOST = {"train": 500, "val": 150, "test": 150}
LEAST = 100


def pictures(content: Mapping[str, Any], name: str) -> Iterator[np.ndarray]:
    """The images of one array of bytes."""
    ends = content[f"{name}_offsets"]
    for begin, end in itertools.pairwise(ends):
        yield np.asarray(Image.open(io.BytesIO(content[name][begin:end].tobytes())))


def crops(content: Mapping[str, Any], part: str, classes: int) -> list[list[np.ndarray]]:
    """The crops of a part by class, in the order of the images."""
    by_class: list[list[np.ndarray]] = [[] for _ in range(classes)]
    for image, labels in zip(pictures(content, f"{part}_jpeg"), pictures(content, f"{part}_mask_png"), strict=True):
        for top in range(0, image.shape[0] - SIDE + 1, STRIDE):
            for left in range(0, image.shape[1] - SIDE + 1, STRIDE):
                window = np.s_[top : top + SIDE, left : left + SIDE]
                counts = np.bincount(labels[window].ravel(), minlength=classes + 1)[:classes]
                if counts.max() >= SHARE * SIDE * SIDE:
                    by_class[int(counts.argmax())].append(image[window])
    return by_class


def main() -> None:
    """Write the folders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("npz", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    content = dict(np.load(options.npz))
    names = [str(name) for name in content["classes"]]
    rng = np.random.default_rng(0)
    parts = {part: crops(content, part, len(names)) for part in MOST}
    chosen = [
        i for i, listed in enumerate(parts["train"]) if len(listed) >= LEAST and all(p[i] for p in parts.values())
    ]
    for part, by_class in parts.items():
        for i in chosen:
            folder = options.out / part / names[i]
            folder.mkdir(parents=True, exist_ok=True)
            drawn = rng.permutation(len(by_class[i]))[: MOST[part]]
            for number, place in enumerate(sorted(drawn)):
                Image.fromarray(by_class[i][place]).save(folder / f"{number:04}.png")
    for part, by_class in parts.items():
        print(part, {names[i]: min(MOST[part], len(by_class[i])) for i in chosen})


if __name__ == "__main__":
    main()
