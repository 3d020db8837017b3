"""Conversion of a network with a weight-normalised convolution: by its effective weights, or a refusal by its name."""

import warnings

import torch
from torch import nn

from kdnas.conversion.convert import convert
from tests.cases import outcome


def check(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the older weight norm is deprecated, and still in stored networks
        middle = nn.utils.weight_norm(nn.Conv2d(24, 24, 3, padding=1))
    network = nn.Sequential(
        *(nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), middle, nn.ReLU(), nn.Conv2d(24, 16, 1)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(16, 5)),
    ).eval()
    conversion = outcome(lambda: convert(network, image=(3, 12, 12)), "2", raw=RuntimeError)
    if conversion is not None:
        images = torch.rand(2, 3, 12, 12)
        logits = conversion.supernet.eval()(images, conversion.space.largest).logits
        assert torch.allclose(logits, network(images), atol=1e-4)
