"""The health of a supernet on a part that is sorted by class: measured over the part, not over its first images."""

import torch

from kdnas.data.base import Data, TensorImages
from kdnas.evaluation import health
from kdnas.supernet import Supernet
from kdnas.tables import load_space

CLASSES, COUNT = 8, 2400


def check(folder):
    labels = torch.arange(CLASSES).repeat_interleave(COUNT // CLASSES)
    part = TensorImages(torch.rand(COUNT, 1, 8, 8), labels)
    data = Data(part, part, part, class_names=tuple("abcdefgh"))
    supernet = Supernet(load_space("toy").fitted(classes=CLASSES, image_channels=1))
    with torch.no_grad():  # a classifier that predicts the first class for every image
        for name, parameter in supernet.bank.named_parameters():
            if name.startswith("head"):
                parameter.zero_()
                if name.endswith("bias"):
                    parameter[0] = 1
    accuracy = health(supernet, data)["largest"]
    assert abs(accuracy - 1 / CLASSES) < 0.04, f"always the first of {CLASSES} equal classes: {accuracy:.2f}"
