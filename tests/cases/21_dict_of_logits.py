"""A teacher function whose module returns {"logits": ...}: its logits are used, or it is refused in a sentence."""

import torch
from torch import nn

from kdnas.preprocessing import Preprocessing
from kdnas.teachers.zoo import own_teacher
from tests.cases import outcome


class Hub(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 6, 3, stride=2, padding=1), nn.ReLU())
        self.classifier = nn.Linear(6, 4)

    def forward(self, x):
        return {"logits": self.classifier(self.features(x).mean((2, 3)))}


def hub():
    return Hub()


def check(folder):
    preprocessing = Preprocessing(height=8, width=8, mean=(0.5,), std=(0.5,))
    teacher = outcome(lambda: own_teacher(f"{__name__}:hub", 4, preprocessing), "dict", raw=AttributeError)
    assert teacher is None or teacher(torch.rand(3, 1, 8, 8)).logits.shape == (3, 4)
