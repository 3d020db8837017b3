"""Pixels as int16 up to 4095: refused, or scaled into [0, 1]; only uint8 is divided by 255."""

import torch

from kdnas.data.base import TensorImages
from tests.cases import outcome


def check(folder):
    images = torch.linspace(0, 4095, 6 * 64).round().to(torch.int16).reshape(6, 1, 8, 8)
    part = outcome(lambda: TensorImages(images, torch.zeros(6, dtype=torch.long)), "int16")
    if part is not None:
        largest = part.take(torch.arange(6)).max().item()
        assert largest <= 1, f"pixels reach {largest:.2f}"
