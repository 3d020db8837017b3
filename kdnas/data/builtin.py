"""Images that need no download."""

from typing import Any

import torch

from kdnas.data.base import Data, TensorImages


def digits() -> Data:
    """The 1,797 scanned 8x8 digits of scikit-learn, split by order: a random split would mix the writers.

    The last 697 are for test; of the first 1,100, 880 train and 220 search.

    Reference: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI repository, 1998 (its test file).
    """
    from sklearn.datasets import load_digits  # slow to import

    loaded: Any = load_digits()
    images = torch.from_numpy(loaded.images).float()[:, None] / 16
    labels = torch.from_numpy(loaded.target)
    cuts = slice(0, 880), slice(880, 1100), slice(1100, None)
    return Data(
        *(TensorImages(images[cut], labels[cut]) for cut in cuts),
        class_names=tuple(map(str, range(10))),
        augmentation="shift",
    )
