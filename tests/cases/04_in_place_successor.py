"""A named stage whose output a later layer changes in place: the teacher returns the stage's output, or refuses it."""

import torch
from torch import nn

from kdnas.preprocessing import Preprocessing
from kdnas.teachers.base import Frozen
from tests.cases import outcome


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.branch = nn.Conv2d(6, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = self.stem(x)
        y = self.norm(self.branch(x))
        y += x
        return self.head(y.relu_().mean((2, 3)))


def check(folder):
    module = Residual().eval()
    pixels = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        expected = module.norm(module.branch(module.stem(pixels)))
    preprocessing = Preprocessing(height=16, width=16, mean=(0.0,) * 3, std=(1.0,) * 3)
    teacher = outcome(lambda: Frozen(module, preprocessing=preprocessing, stages=("norm",)), "norm")
    if teacher is not None:
        feature = outcome(lambda: teacher(pixels), "norm")
        assert feature is None or torch.allclose(feature.features[0], expected, atol=1e-5)
