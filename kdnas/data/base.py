"""Labelled images in three parts: train for weights, search for ranking, test for the closing table only."""

import abc
import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kdnas.data.augmentation import Augmentation, augment
from kdnas.preprocessing import Preprocessing
from kdnas.randomness import torch_rng


class Images(abc.ABC):
    """A part of a data set: images and labels by index."""

    labels: Tensor

    @abc.abstractmethod
    def take(self, indices: Tensor) -> Tensor:
        """Images `[len(indices), channels, height, width]`, float32 in [0, 1]."""

    @final
    def batches(self, size: int = 500) -> Iterator[tuple[Tensor, Tensor]]:
        """Every image with its label, in order: pairs of images as `take` gives them and labels, `size` at a time."""
        for indices in torch.arange(len(self)).split(size):
            yield self.take(indices), self.labels[indices]

    @final
    def __len__(self) -> int:
        return len(self.labels)


@final
class TensorImages(Images):
    """Images in memory, uint8 or float in [0, 1].

    Raises:
        ValueError: another shape, counts that differ, values outside [0, 1], or NaN.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        if images.dim() != 4 or len(images) != len(labels):
            raise ValueError(
                f"`images` must be [count, channels, height, width] with one label each, got {tuple(images.shape)} "
                f"and {len(labels)} labels."
            )
        if images.is_floating_point():
            broken = ~torch.isfinite(images).flatten(1).all(1)
            if broken.any():
                raise ValueError(
                    f"`images` must be finite: {int(broken.sum())} of {len(images)} hold NaN or infinity, first number "
                    f"{int(broken.nonzero()[0])}. Remove or repair them."
                )
            if images.min() < 0 or images.max() > 1:
                raise ValueError(
                    f"float `images` must be in [0, 1], got {images.min():.3g} to {images.max():.3g}. Divide by 255."
                )
        self.images, self.labels = images, labels.long()

    def take(self, indices: Tensor) -> Tensor:
        """Images by index."""
        images = self.images[indices]
        return images.float() if images.is_floating_point() else images.float() / 255


@final
class FileImages(Images):
    """Images decoded from files (or encoded bytes) by `take`, resized and centre-cropped to a square.

    Raises:
        ValueError: from `take`, for a file that is no image; the message names it.
    """

    def __init__(self, sources: Sequence[Path | bytes], labels: Tensor, size: int, mode: str = "RGB") -> None:
        self.sources, self.labels, self.size, self.mode = sources, labels.long(), size, mode

    def take(self, indices: Tensor) -> Tensor:
        """Images by index."""
        with ThreadPoolExecutor(2) as pool:
            return torch.stack(list(pool.map(lambda i: self._decode(self.sources[i]), indices.tolist())))

    def _decode(self, source: Path | bytes) -> Tensor:
        try:
            picture = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source).convert(self.mode)
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
        train: for weights.
        search: for the ranking of subnets and accuracies during training, never for weights.
        test: for the closing table only.
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
                raise ValueError(f"the {name} part must have images, got none.")
            counts = torch.bincount(part.labels, minlength=self.classes)
            if part.labels.min() < 0 or len(counts) > self.classes:
                worst = int(part.labels.min() if part.labels.min() < 0 else part.labels.max())
                raise ValueError(f"labels must be 0 to {self.classes - 1}, the {name} part has {worst}.")
            if name == "train" and counts.min() < 2:
                rare = int(counts.argmin())
                raise ValueError(
                    f"every class must have at least 2 training images, class {self.class_names[rare]!r} has "
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

    @property
    def image(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return self.channels, self.preprocessing.height, self.preprocessing.width

    def normalise(self, pixels: Tensor) -> Tensor:
        """Pixels in [0, 1] as a student's input."""
        return normalise(pixels, self.preprocessing)

    def indices(self, seed: int, step: int, batch_size: int) -> Tensor:
        """Indices of a step's batch: a new random order for each epoch, without its incomplete last batch."""
        size = min(batch_size, len(self.train))
        per_epoch = len(self.train) // size
        order = torch.randperm(len(self.train), generator=torch_rng(seed, "order", step // per_epoch))
        place = step % per_epoch
        return order[place * size : (place + 1) * size]

    def pixels(self, indices: Tensor, seed: int, step: int) -> Tensor:
        """Augmented training images in [0, 1]; the augmentation is a function of (seed, step)."""
        return augment(self.train.take(indices), self.augmentation, torch_rng(seed, "augmentation", step))

    def view(self, indices: Tensor, seed: int, view: int) -> Tensor:
        """Training images in [0, 1] under a fixed augmentation: a function of (seed, view, index) for each image."""
        pixels = self.train.take(indices)
        if self.augmentation == "none":
            return pixels
        rngs = [torch_rng(seed, "view", view, index) for index in indices.tolist()]
        return torch.cat([augment(p[None], self.augmentation, rng) for p, rng in zip(pixels, rngs, strict=True)])


def normalise(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """`(pixels - mean) / std` per channel."""
    mean = torch.tensor(preprocessing.mean, device=pixels.device)[:, None, None]
    return (pixels - mean) / torch.tensor(preprocessing.std, device=pixels.device)[:, None, None]


def _statistics(train: Images) -> Preprocessing:
    count = min(len(train), 10_000)
    pixels = train.take(torch.randperm(len(train), generator=torch_rng("statistics"))[:count])
    std, mean = torch.std_mean(pixels.double(), (0, 2, 3))
    # A constant channel carries nothing; dividing it by 1 keeps it harmless.
    std = torch.where(std > 1e-6, std, 1.0)
    height, width = pixels.shape[2:]
    rounded = [tuple(round(v, 6) for v in values.tolist()) for values in (mean, std)]
    return Preprocessing(height=height, width=width, mean=rounded[0], std=rounded[1])
