"""A teacher whose forward calls one pooling module twice. Its stages are in order of depth."""

import torch
import torch.nn.functional as F
from torch import nn

from kdnas.preprocessing import Preprocessing
from kdnas.teachers.base import Frozen


class TwoConvolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 5)
        self.conv2 = nn.Conv2d(4, 8, 5)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(8 * 5 * 5, 3)

    def forward(self, x):
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        return self.head(x.flatten(1))


def check(folder):
    preprocessing = Preprocessing(height=32, width=32, mean=(0.5,), std=(0.5,))
    teacher = Frozen(TwoConvolutions(), preprocessing=preprocessing)
    sides = [feature.shape[-1] for feature in teacher(torch.rand(2, 1, 32, 32)).features]
    assert sides == sorted(sides, reverse=True), f"{teacher.stages} have sides {sides}"
