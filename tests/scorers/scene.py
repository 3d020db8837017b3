"""Evidence on toy data with a teacher of the toy space, and modules of every kind."""

import dataclasses

import torch
from torch import nn

from kdnas.network import Network, batch_statistics
from kdnas.outputs import Outputs
from kdnas.randomness import initialised
from kdnas.scorers.base import Evidence, Score, Scorer
from kdnas.supernet import Supernet
from kdnas.tables import load_space
from kdnas.teachers.base import Frozen
from tests.toy import data

SPACE = load_space("toy").fitted(classes=3, image_channels=3)
DATA = data()


def network(seed=5, architecture=SPACE.largest):
    return initialised(lambda: Network(SPACE.blueprint(architecture)), seed).eval()


def supernet():
    return initialised(lambda: Supernet(SPACE), 0).eval()


def evidence(images=20, taught=None):
    """The teacher's outputs are computed as a student's are: with the batch's statistics."""
    teacher = Frozen(network() if taught is None else taught, preprocessing=DATA.preprocessing)
    pixels = DATA.search.take(torch.arange(images))
    with batch_statistics(teacher.module):
        outputs = teacher(pixels)
    return Evidence(
        pixels, DATA.normalise(pixels), DATA.search.labels[:images], outputs, teacher, DATA, supernet=supernet()
    )


def with_teacher(held, **changes):
    """The same evidence with other outputs of the teacher, and nothing cached."""
    return dataclasses.replace(held, teacher=held.teacher._replace(**changes))


def reordered(held, order):
    return dataclasses.replace(
        held,
        pixels=held.pixels[order],
        images=held.images[order],
        labels=held.labels[order],
        teacher=held.teacher.map(lambda x: x[order]),
    )


class Shows(nn.Module):
    """Gives the outputs it was made with, whatever it sees."""

    def __init__(self, logits, *features):
        super().__init__()
        self.outputs = Outputs(logits, features)

    def forward(self, images):
        return self.outputs


class Plain(nn.Module):
    """Someone's own network: logits only, its stages are to be found."""

    def __init__(self):
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, 3)

    def forward(self, images):
        return self.head(self.two(self.one(images)).mean((2, 3)))


class Flat(nn.Module):
    """A linear classifier: nothing in it is a map."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(192, 3)

    def forward(self, images):
        return self.head(images.flatten(1))


class Slow(Scorer):
    """Parameters to a power, and how often it was asked."""

    asked = 0

    def __init__(self, power: float = 0.5) -> None:
        self.power = power

    def score(self, student, evidence):
        type(self).asked += 1
        return Score(sum(p.numel() for p in student.parameters()) ** self.power, {})
