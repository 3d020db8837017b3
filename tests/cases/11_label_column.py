"""Labels of shape [count, 1]: accepted as [count], or refused in a sentence about labels."""

import torch

from kdnas.data.base import Data, TensorImages
from tests.cases import outcome


def check(folder):
    images = torch.randint(0, 256, (12, 1, 8, 8), dtype=torch.uint8)
    labels = torch.arange(12).remainder(2).unsqueeze(1)

    def build():
        part = TensorImages(images, labels)
        return Data(part, part, part, class_names=("cat", "dog"))

    data = outcome(build, "labels", raw=RuntimeError)
    assert data is None or data.train.labels.shape == (12,)
