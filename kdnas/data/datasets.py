"""Images of torch datasets, read into memory."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kdnas.data.assembly import NO_CLASS, needs_labels
from kdnas.data.base import Data, TensorImages
from kdnas.data.files import pixels_of
from kdnas.data.pixels import as_pixels
from kdnas.plain import reason
from kdnas.randomness import torch_rng
from kdnas.tasks.labels import as_labels

_SEARCH, _TEST = 0.1, 0.1  # shares of the images, where parts are cut off
_IMAGE, _LABEL = ("image", "img", "pixel_values"), ("label", "labels", "fine_label", "target")


def from_dataset(train: Dataset[Any] | Any, test: Dataset[Any] | Any = None, *, seed: int = 0) -> Data:
    """The parts of a data set of pairs `(image, label)`, with a tenth of `train` as the search part.

    An entry may also be a mapping with the keys `image` and `label`, as data hubs have them; of a `DataLoader` its data
    set is read.

    Args:
        train: images as PIL images, arrays or tensors `[channels, height, width]`, as `TensorImages` takes them, all of
            one size; labels as integers from 0, or texts. The class names are those of the attribute `classes` or
            `class_to_idx`, or of a hub's features; else the sorted texts, or the numbers.
        test: the test part; by default another tenth of `train`.
        seed: draws the parts.

    Raises:
        ValueError: too few images, images of several sizes, an entry that is no pair or cannot be read, or other
            classes in `test`.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> images = torch.rand(40, 3, 8, 8)
        >>> data = from_dataset(TensorDataset(images, torch.arange(40) % 2))
        >>> len(data.train), len(data.search), len(data.test)
        (32, 4, 4)
    """
    names = _class_names(train)
    images, labels = _read(train)
    test_images, test_labels = ([], []) if test is None else _read(test)
    if test is not None and _class_names(test) not in (None, names):
        raise ValueError(f"both parts must have the same classes in one order, got {names} and {_class_names(test)}.")
    classes, numbers = numbered(labels + test_labels, names)
    pixels, indices = _stacked(images), numbers[: len(labels)]
    order = torch.randperm(len(images), generator=torch_rng("dataset", seed))
    num_search = max(1, round(_SEARCH * len(images)))
    num_test = max(1, round(_TEST * len(images))) if test is None else 0
    if len(images) <= num_search + num_test:
        raise ValueError(f"there must be images to train, search and test with, got {len(images)}.")
    searching, testing, training = order.split([num_search, num_test, len(images) - num_search - num_test])
    tested = TensorImages(pixels[testing], indices[testing])
    if test is not None:
        tested = TensorImages(_stacked(test_images), numbers[len(labels) :])
    return Data(
        TensorImages(pixels[training], indices[training]),
        TensorImages(pixels[searching], indices[searching]),
        tested,
        class_names=classes,
    )


def _source(dataset: Any) -> Any:
    return dataset.dataset if isinstance(dataset, DataLoader) else dataset


def _class_names(dataset: Any) -> tuple[str, ...] | None:
    """The class names that a data set has: `classes`, the keys of `class_to_idx`, or the names of a hub's label.

    Of a subset, of several joined, and of a `DataLoader`, they are those of what is inside.
    """
    while dataset is not None:
        places = getattr(dataset, "class_to_idx", None)
        features = getattr(dataset, "features", None)
        labels = [features[key] for key in _LABEL if key in features] if isinstance(features, Mapping) else []
        names = getattr(dataset, "classes", None) or (sorted(places, key=places.__getitem__) if places else None)
        names = names or next(filter(None, (getattr(label, "names", None) for label in labels)), None)
        if names:
            return tuple(map(str, names))
        joined = getattr(dataset, "datasets", None)
        dataset = joined[0] if joined else getattr(dataset, "dataset", None)
    return None


def _read(dataset: Any) -> tuple[list[Any], list[Any]]:
    """Images and labels of every entry."""
    dataset = _source(dataset)
    if isinstance(dataset, Mapping):
        raise ValueError(
            f"a data set must have entries by index, got a {type(dataset).__name__} of {sorted(map(str, dataset))}. "
            "Pass its parts: from_dataset(parts['train'], parts['test'])."
        )
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise ValueError(
            f"a data set must have a length and entries by index, got a {type(dataset).__name__}. Read it into "
            "TensorImages."
        )
    images, labels = [], []
    for index in range(len(dataset)):
        try:
            entry = dataset[index]
        except Exception as error:  # other people's data sets raise whatever they like
            raise ValueError(f"entry {index} of the data set cannot be read: {reason(error, named=True)}.") from error
        image, label = _pair(entry, index)
        images.append(_pixels(image, index))
        labels.append(label)
    if not images:
        raise ValueError("the data set has no images.")
    return images, labels


def _pair(entry: Any, index: int) -> tuple[Any, Any]:
    if not needs_labels() and (alone := _unlabelled(entry)) is not None:
        return alone, NO_CLASS
    if isinstance(entry, Mapping):
        keys = [next((key for key in known if key in entry), None) for known in (_IMAGE, _LABEL)]
        if None not in keys:
            return entry[keys[0]], entry[keys[1]]
        raise ValueError(f"entry {index} of the data set must have the keys image and label, got {sorted(entry)}.")
    if not isinstance(entry, tuple | list) or len(entry) != 2:
        raise ValueError(f"entry {index} of the data set must be a pair (image, label), got {type(entry).__name__}.")
    return entry[0], entry[1]


def _unlabelled(entry: Any) -> Any:
    """The image of an entry without a label; None where it has one."""
    if isinstance(entry, Mapping):
        return None if any(key in entry for key in _LABEL) else next((entry[k] for k in _IMAGE if k in entry), None)
    if isinstance(entry, tuple | list):
        return entry[0] if len(entry) == 1 else None
    return entry


def _pixels(image: Any, index: int) -> Tensor:
    """An image as `TensorImages` takes it, `[channels, height, width]`."""
    try:
        if isinstance(image, Image.Image):
            pixels = torch.from_numpy(pixels_of(image))
            levels = (pixels * 255).round()
            return levels.to(torch.uint8) if torch.allclose(levels / 255, pixels, rtol=0, atol=1e-6) else pixels
        return as_pixels(image[None] if isinstance(image, Tensor) else np.asarray(image)[None])[0]
    except ValueError as error:
        raise ValueError(f"image {index} of the data set: {error}") from error


def _stacked(images: list[Tensor]) -> Tensor:
    """Images of one size in one tensor; where some have colours, gray is repeated in three channels."""
    channels = max(len(image) for image in images)
    if channels == 3:
        images = [image.expand(3, -1, -1) if len(image) == 1 else image for image in images]
    for index, image in enumerate(images):
        if image.shape != images[0].shape:
            raise ValueError(
                f"images must have one shape, image {index} has {tuple(image.shape)}, image 0 "
                f"{tuple(images[0].shape)}. Resize them in the data set's transform."
            )
    if len({image.dtype for image in images}) > 1:
        images = [image.float() / (255 if image.dtype is torch.uint8 else 1) for image in images]
    return torch.stack(images)


def numbered(labels: list[Any], classes: tuple[str, ...] | None) -> tuple[tuple[str, ...], Tensor]:
    """Class names and labels as numbers.

    Raises:
        ValueError: labels that are neither whole numbers nor texts, or texts without a class.
    """
    if all(isinstance(label, str) for label in labels):
        names = classes or tuple(sorted(set(map(str, labels))))
        places = {name: place for place, name in enumerate(names)}
        unknown = next((label for label in labels if label not in places), None)
        if unknown is not None:
            raise ValueError(f"labels must be among the data set's classes, got {unknown!r}.")
        return names, torch.tensor([places[label] for label in labels])
    numbers = as_labels([_number(label) for label in labels], len(labels))
    return classes or tuple(map(str, range(int(numbers.max()) + 1))), numbers


def _number(label: Any) -> Any:
    return label.tolist() if isinstance(label, Tensor | np.ndarray | np.generic) else label
