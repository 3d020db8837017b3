"""Labelled images in three parts: train for weights, search for ranking, test for the closing table only."""

import abc
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor

from kdnas.data.augmentation import EVERY, Augmentation, augment, sources
from kdnas.data.pixels import as_pixels
from kdnas.plain import printable
from kdnas.preprocessing import Preprocessing
from kdnas.randomness import torch_rng
from kdnas.space import SearchSpace
from kdnas.specs import check_literals
from kdnas.tasks.base import Task
from kdnas.tasks.classification import CLASSIFICATION


class Images(abc.ABC):
    """A part of a data set: images and labels by index.

    Attributes:
        labels: of all images, as the data's task has them; small integers save memory.
        is_decoded: whether `take` decodes pictures, so that other processes should do so ahead of need.
    """

    labels: Tensor
    is_decoded: ClassVar[bool] = False

    @abc.abstractmethod
    def take(self, indices: Tensor) -> Tensor:
        """Images `[len(indices), channels, height, width]`, float32 in [0, 1]."""

    @final
    def truths(self, indices: Tensor) -> Tensor:
        """Labels by index, integers as int64."""
        labels = self.labels[indices]
        return labels if labels.is_floating_point() else labels.long()

    @final
    def batches(self, size: int = 500) -> Iterator[tuple[Tensor, Tensor]]:
        """Every image with its label, in order: pairs of images as `take` gives them and labels, `size` at a time."""
        for indices in torch.arange(len(self)).split(size):
            yield self.take(indices), self.truths(indices)

    def digest(self) -> str:
        """Changes when the images or labels do: of all labels and 256 images, evenly spread."""
        return _digest(self.take(torch.linspace(0, len(self) - 1, min(256, len(self))).long()), self.labels)

    @final
    def sample(self, most: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images and labels of at most so many, drawn without repetition: a part may be sorted by class."""
        indices = torch.randperm(len(self), generator=rng)[:most] if len(self) > most else torch.arange(len(self))
        return self.take(indices), self.truths(indices)

    @final
    def __len__(self) -> int:
        return len(self.labels)


@final
class TensorImages(Images):
    """Images in memory.

    Args:
        images: `[count, channels, height, width]`, a tensor or a numpy array; uint8, uint16, bool, or floats in [0, 1];
            see `as_pixels`.
        labels: one per image, of the task: for classification a class index; see `kdnas.tasks.labels.as_labels`.
        task: what the labels are for.

    Raises:
        ValueError: another shape or type, counts that differ, values outside [0, 1], or NaN.

    Example:
        >>> import numpy as np
        >>> part = TensorImages(np.zeros((4, 16, 16, 3), np.uint8), [0, 1, 0, 1])
        >>> part.take(torch.tensor([2])).shape
        torch.Size([1, 3, 16, 16])
    """

    def __init__(self, images: Any, labels: Any, task: Task = CLASSIFICATION) -> None:
        self.images = as_pixels(images)
        self.labels = task.as_labels(labels, len(self.images))

    def take(self, indices: Tensor) -> Tensor:
        """Images by index."""
        images = self.images[indices]
        return images.float() if images.is_floating_point() else images.float() / 255

    def digest(self) -> str:
        """Of every pixel and label."""
        return _digest(self.images, self.labels)


@final
@dataclass(frozen=True, eq=False)
class Data:
    """A data set in its three roles.

    Attributes:
        train: for weights.
        search: for the ranking of subnets and accuracies during training, never for weights.
        test: for the closing table only.
        class_names: one per output of a network, which is a class for most tasks.
        preprocessing: size, and mean and standard deviation of the train part.
        augmentation: `none`, `shift` (by up to an eighth of the size, zero filled) or `crop_flip` (the same, and
            mirrored half of the time), or `strong_shift` and `strong_crop_flip` (the same, then two random
            operations on each image; see `distorted`).
        source: a sentence on where the images come from and what was recognised there; "" if unknown.
        task: what labels are, and what networks are measured by.

    Raises:
        ValueError: an empty part, labels that the task refuses (of classification those without a class, and a class
            with fewer than 2 training images), or images of several shapes.
    """

    advice: ClassVar[str] = " `kdnas.data.from_dataset` makes one of a torch data set; see docs/data.md."

    train: Images
    search: Images
    test: Images
    class_names: tuple[str, ...]
    augmentation: Augmentation = "none"
    source: str = ""
    task: Task = CLASSIFICATION
    preprocessing: Preprocessing = field(init=False)

    def __post_init__(self) -> None:
        names = self.class_names
        if isinstance(names, str) or not names or not all(isinstance(name, str) for name in names):
            raise ValueError(f"`class_names` must be texts, one per class, got {names!r}.")
        if len(set(names)) < len(names):
            twice = next(name for name in names if list(names).count(name) > 1)
            raise ValueError(f"`class_names` must differ, {twice!r} is there twice.")
        hidden = next((name for name in names if printable(name) != name), None)
        if hidden is not None:
            raise ValueError(f"`class_names` must be printable, got {printable(hidden)!r}. Rename that class.")
        object.__setattr__(self, "class_names", tuple(names))
        object.__setattr__(self, "source", printable(self.source))
        check_literals(type(self), {"augmentation": self.augmentation})
        shapes = {name: self._checked(name) for name in ("train", "search", "test")}
        if len(set(shapes.values())) > 1:
            raise ValueError(f"images of all parts must have one shape, got {shapes}. Resize them to one.")
        object.__setattr__(self, "preprocessing", _statistics(self.train))

    def _checked(self, name: str) -> tuple[int, ...]:
        """The shape of a part's images."""
        part: Any = getattr(self, name)
        if not isinstance(part, Images):
            raise ValueError(
                f"`{name}` must be Images, such as TensorImages(images, labels), got {type(part).__name__}."
            )
        if len(part) == 0:
            raise ValueError(f"the {name} part must have images, got none.")
        self.task.check(name, part.labels, self.class_names)
        image = part.take(torch.tensor([len(part) - 1]))
        if image.dim() != 4 or image.dtype is not torch.float32:
            raise ValueError(
                f"`take` of the {name} part must return float32 [count, channels, height, width], got {image.dtype} "
                f"{tuple(image.shape)}."
            )
        self.task.fits(name, part.labels, (image.shape[2], image.shape[3]))
        return tuple(image.shape[1:])

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """Number and digest of every part's images, and a digest of the class names: other data, other values."""
        parts = {"train": self.train, "search": self.search, "test": self.test}
        names = hashlib.blake2b(repr(self.class_names).encode(), digest_size=8).hexdigest()
        return {name: f"{len(part)} {part.digest()}" for name, part in parts.items()} | {"class names": names}

    @property
    def classes(self) -> int:
        """Number of classes, or of what else the outputs of a network are."""
        return len(self.class_names)

    @property
    def is_imbalanced(self) -> bool:
        """Whether in the train or the test part some class has more than twice the images of another."""
        counts = [self.counts(part) for part in (self.train, self.test)]
        return any(each is not None and int(each.max()) > 2 * int(each.min()) for each in counts)

    def counts(self, part: Images) -> Tensor | None:
        """The number of a part's images of each class, `[classes]`; None where images have no classes."""
        classes = self.task.image_classes(part.labels)
        return None if classes is None else torch.bincount(classes, minlength=self.classes)

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return len(self.preprocessing.mean)

    @property
    def image(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return self.channels, self.preprocessing.height, self.preprocessing.width

    def fitted(self, space: SearchSpace) -> SearchSpace:
        """The space for the classes and images of these data.

        Raises:
            ValueError: its networks answer for images and the task is about pixels, or the other way round.
        """
        if space.dense != self.task.dense:
            kinds = "whole images", "every pixel"
            raise ValueError(
                f"the networks of the space {space.name or type(space).__name__} answer for {kinds[space.dense]}, the "
                f"task {self.task.name} needs answers for {kinds[self.task.dense]}. Use "
                f"--space {'elastic_segmenter' if self.task.dense else 'elastic_resnet'}, for example."
            )
        return space.fitted(classes=self.classes, image_channels=self.channels, size=self.image[1:])

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

    def pixels(self, indices: Tensor, seed: int, step: int, part: slice = EVERY) -> Tensor:
        """Augmented training images in [0, 1]; the augmentation is a function of (seed, step).

        Args:
            indices: of the images of a whole batch.
            seed: of the augmentation.
            step: of the augmentation.
            part: which images of the batch to return.
        """
        rng = torch_rng(seed, "augmentation", step)
        return augment(self.train.take(indices[part]), self.augmentation, rng, part, len(indices))

    def labels(self, indices: Tensor, seed: int, step: int, part: slice = EVERY) -> Tensor:
        """The labels of `pixels`, which follow the images where the task's do."""
        labels = self.train.truths(indices[part])
        if not self._moves:
            return labels
        rng = torch_rng(seed, "augmentation", step)
        return self.task.moved(labels, *sources(self.augmentation, *self.image[1:], rng, part, len(indices)))

    def view(self, indices: Tensor, seed: int, view: int) -> Tensor:
        """Training images in [0, 1] under a fixed augmentation: a function of (seed, view, index) for each image."""
        pixels = self.train.take(indices)
        if self.augmentation == "none":
            return pixels
        rngs = [torch_rng(seed, "view", view, index) for index in indices.tolist()]
        return torch.cat([augment(p[None], self.augmentation, rng) for p, rng in zip(pixels, rngs, strict=True)])

    def view_labels(self, indices: Tensor, seed: int, view: int) -> Tensor:
        """The labels of `view`, which follow the images where the task's do."""
        labels = self.train.truths(indices)
        if not self._moves:
            return labels
        rngs = [torch_rng(seed, "view", view, index) for index in indices.tolist()]
        places = [sources(self.augmentation, *self.image[1:], rng, EVERY, 1) for rng in rngs]
        rows, columns = (torch.cat(each) for each in zip(*places, strict=True))
        return self.task.moved(labels, rows, columns)

    @property
    def _moves(self) -> bool:
        """Whether labels follow images that are augmented."""
        return self.task.follows and self.augmentation != "none"


def normalise(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """`(pixels - mean) / std` per channel."""
    mean = torch.tensor(preprocessing.mean, device=pixels.device)[:, None, None]
    return (pixels - mean) / torch.tensor(preprocessing.std, device=pixels.device)[:, None, None]


def prepare(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Pixels in [0, 1] as a network's input: resized to its size, then normalised."""
    size, mode = (preprocessing.height, preprocessing.width), preprocessing.interpolation
    if tuple(pixels.shape[2:]) != size:
        options: dict[str, Any] = {"mode": "nearest-exact"}
        if mode != "nearest":
            options = {"mode": mode, "align_corners": False, "antialias": True}
        pixels = F.interpolate(pixels, size, **options)
    return normalise(pixels, preprocessing)


def changes(before: Mapping[str, str], data: Data) -> str:
    """How data differ from those with an earlier fingerprint, in a few words; empty if they do not.

    Example:
        >>> from kdnas.data.builtin import digits
        >>> data = digits()
        >>> changes(data.fingerprint | {"test": "700 0123456789abcdef"}, data)
        'test has 697 images, had 700'
    """
    words = []
    for name, value in data.fingerprint.items():
        old = before.get(name, value)
        (count, _, _), (old_count, _, _) = value.partition(" "), old.partition(" ")
        if name != "class names" and count != old_count:
            words.append(f"{name} has {count} images, had {old_count}")
        elif value != old:
            words.append(f"{name} differ" if name == "class names" else f"{name} has other images or labels")
    return ", ".join(words)


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _statistics(train: Images) -> Preprocessing:
    """Size, mean and standard deviation (divisor: values - 1) of 10,000 images, drawn."""
    drawn = torch.randperm(len(train), generator=torch_rng("statistics"))[:10_000]
    total = squares = torch.zeros(())
    count, size = 0, (0, 0)
    for indices in drawn.split(500):  # in parts: large images would not fit in float64
        pixels = train.take(indices).double()
        low, high = float(pixels.min()), float(pixels.max())
        if not (low >= 0 and high <= 1):  # NaN is in no range
            raise ValueError(f"images of the train part must be in [0, 1], got {low:.3g} to {high:.3g}.")
        count, size = count + pixels.numel() // pixels.shape[1], (pixels.shape[2], pixels.shape[3])
        total, squares = total + pixels.sum((0, 2, 3)), squares + pixels.square().sum((0, 2, 3))
    mean = total / count
    std = ((squares - count * mean.square()).clamp(min=0) / max(1, count - 1)).sqrt()
    # A constant channel carries nothing; dividing it by 1 keeps it harmless.
    std = torch.where(std > 1e-6, std, 1.0)
    rounded = [tuple(round(v, 6) for v in values.tolist()) for values in (mean, std)]
    return Preprocessing(height=size[0], width=size[1], mean=rounded[0], std=rounded[1])
