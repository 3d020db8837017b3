"""Images of torch datasets, read into memory."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kdnas.data.base import Data, TensorImages
from kdnas.data.files import pixels_of
from kdnas.data.pixels import as_labels, as_pixels
from kdnas.randomness import torch_rng

_SEARCH, _TEST = 0.1, 0.1  # shares of the images, where parts are cut off
_IMAGE, _LABEL = ("image", "img", "pixel_values"), ("label", "labels", "fine_label", "target")


def from_dataset(train: Dataset[Any] | Any, test: Dataset[Any] | Any = None, *, seed: int = 0) -> Data:
    """The parts of a data set of pairs `(image, label)`, with a tenth of `train` as the search part.

    An entry may also be a mapping with the keys `image` and `label`, as data hubs have them; of a `DataLoader` its data
    set is read.

    Args:
        train: images as PIL images, arrays or tensors `[channels, height, width]`, as `TensorImages` takes them, all of
            one size; labels as integers from 0, or texts. The attribute `classes` gives the class names, where there
            is one; else they are the sorted texts, or the numbers.
        test: the test part; by default another tenth of `train`.
        seed: draws the parts.

    Raises:
        ValueError: no images, images of several sizes, or an entry that is no pair.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> images = torch.rand(40, 3, 8, 8)
        >>> data = from_dataset(TensorDataset(images, torch.arange(40) % 2))
        >>> len(data.train), len(data.search), len(data.test)
        (32, 4, 4)
    """
    images, labels = _read(train)
    test_images, test_labels = ([], []) if test is None else _read(test)
    classes, numbers = _numbered(labels + test_labels, getattr(_source(train), "classes", None))
    pixels, indices = _stacked(images), numbers[: len(labels)]
    order = torch.randperm(len(images), generator=torch_rng("dataset", seed))
    num_search = max(1, round(_SEARCH * len(images)))
    num_test = max(1, round(_TEST * len(images))) if test is None else 0
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


def _read(dataset: Any) -> tuple[list[Any], list[Any]]:
    """Images and labels of every entry."""
    dataset = _source(dataset)
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise ValueError(
            f"a data set must have a length and entries by index, got a {type(dataset).__name__}. Read it into "
            "TensorImages."
        )
    images, labels = [], []
    for index in range(len(dataset)):
        image, label = _pair(dataset[index], index)
        images.append(_pixels(image, index))
        labels.append(label)
    if not images:
        raise ValueError("the data set has no images.")
    return images, labels


def _pair(entry: Any, index: int) -> tuple[Any, Any]:
    if isinstance(entry, Mapping):
        keys = [next((key for key in known if key in entry), None) for known in (_IMAGE, _LABEL)]
        if None not in keys:
            return entry[keys[0]], entry[keys[1]]
        raise ValueError(f"entry {index} of the data set must have the keys image and label, got {sorted(entry)}.")
    if not isinstance(entry, tuple | list) or len(entry) != 2:
        raise ValueError(f"entry {index} of the data set must be a pair (image, label), got {type(entry).__name__}.")
    return entry[0], entry[1]


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


def _numbered(labels: list[Any], classes: Any) -> tuple[tuple[str, ...], Tensor]:
    """Class names and labels as numbers.

    Raises:
        ValueError: labels that are neither whole numbers nor texts, or texts without a class.
    """
    if all(isinstance(label, str) for label in labels):
        names = tuple(classes) if classes else tuple(sorted(set(labels)))
        places = {name: place for place, name in enumerate(names)}
        unknown = next((label for label in labels if label not in places), None)
        if unknown is not None:
            raise ValueError(f"labels must be among the data set's classes, got {unknown!r}.")
        return names, torch.tensor([places[label] for label in labels])
    numbers = as_labels([_number(label) for label in labels], len(labels))
    return tuple(map(str, classes or range(int(numbers.max()) + 1))), numbers


def _number(label: Any) -> Any:
    return label.tolist() if isinstance(label, Tensor | np.ndarray | np.generic) else label
