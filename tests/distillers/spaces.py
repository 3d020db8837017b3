"""Small spaces, and what the tests of distillers are made of."""

import torch

from kdnas.distillers.base import Batch
from kdnas.network import Network
from kdnas.randomness import initialised
from kdnas.supernet import Supernet
from kdnas.tables import load_space, space_from_table
from kdnas.teachers.base import Frozen
from tests.toy import data

DATA = data()
TOY = load_space("toy").fitted(classes=3, image_channels=3)
ELASTIC = space_from_table(
    {
        "family": "mbconv",
        "name": "elastic",
        "classes": 3,
        "resolutions": [8],
        "per": "block",
        "stem": {"width": [8], "stride": 1},
        "stages": [
            {"width": [8], "depth": [1, 2], "kernel": [3, 5, 7], "expansion": [2, 3, 4]},
            {"width": [16], "depth": [1, 2], "kernel": [3, 5], "expansion": [2, 3, 4], "se": True, "stride": 2},
        ],
    }
)
OPERATIONS = space_from_table(
    {
        "family": "mbconv",
        "name": "operations",
        "classes": 3,
        "resolutions": [8],
        "per": "block",
        "shared": False,
        "stem": {"width": [4], "stride": 1},
        "stages": [
            {"width": [4], "depth": [2], "kernel": [3, 5], "expansion": [1, 2]},
            {"width": [8], "depth": [1], "kernel": [3, 5], "expansion": [2], "stride": 2},
        ],
    }
)


def supernet(space=TOY, **more):
    return initialised(lambda: Supernet(space, **more), 0)


def teacher(space=TOY):
    return Frozen(initialised(lambda: Network(space.blueprint(space.largest)), 5), preprocessing=DATA.preprocessing)


def batch(taught=None, count=12):
    ids = torch.arange(count)
    return Batch(DATA.train.take(ids), DATA.train.labels[ids], ids, DATA, taught)


def gradients(model):
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def watched(model):
    """The architectures that the model is run with from now on, each with its modes."""
    seen = []
    forward = model.forward

    def watching(images, architecture, **modes):
        seen.append((architecture, modes, torch.is_grad_enabled()))
        return forward(images, architecture, **modes)

    model.forward = watching
    return seen
