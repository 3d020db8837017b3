"""Images of torch datasets, read into memory."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from kdnas.data.base import Data, TensorImages
from kdnas.randomness import torch_rng

_SEARCH, _TEST = 0.1, 0.1  # shares of the images, where parts are cut off


def from_dataset(train: Dataset[Any], test: Dataset[Any] | None = None, *, seed: int = 0) -> Data:
    """The parts of a data set of pairs `(image, label)`, with a tenth of `train` as the search part.

    Args:
        train: images as PIL images or as tensors `[channels, height, width]`, uint8 or float in [0, 1], all of one
            size; labels as integers from 0. The attribute `classes` gives the class names, where there is one.
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
    order = torch.randperm(len(images), generator=torch_rng("dataset", seed))
    num_search = max(1, round(_SEARCH * len(images)))
    num_test = max(1, round(_TEST * len(images))) if test is None else 0
    searching, testing, training = order.split([num_search, num_test, len(images) - num_search - num_test])
    test_images, test_labels = (images[testing], labels[testing]) if test is None else _read(test)
    classes = getattr(train, "classes", None) or range(int(max(labels.max(), test_labels.max())) + 1)
    return Data(
        TensorImages(images[training], labels[training]),
        TensorImages(images[searching], labels[searching]),
        TensorImages(test_images, test_labels),
        class_names=tuple(map(str, classes)),
    )


def _read(dataset: Any) -> tuple[Tensor, Tensor]:
    images, labels = [], []
    for index in range(len(dataset)):
        entry = dataset[index]
        if not isinstance(entry, tuple | list) or len(entry) != 2:
            raise ValueError(
                f"entry {index} of the data set must be a pair (image, label), got {type(entry).__name__}."
            )
        images.append(_tensor(entry[0]))
        labels.append(int(entry[1]))
        if images[-1].shape != images[0].shape:
            raise ValueError(
                f"images must have one shape, image {index} has {tuple(images[-1].shape)}, image 0 "
                f"{tuple(images[0].shape)}. Resize them in the data set's transform."
            )
    if not images:
        raise ValueError("the data set has no images.")
    return torch.stack(images), torch.tensor(labels)


def _tensor(image: Any) -> Tensor:
    if isinstance(image, Tensor):
        return image
    array = np.asarray(image)
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())
