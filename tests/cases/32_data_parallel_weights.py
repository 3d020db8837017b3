"""Weights saved from a wrapped network, each name beginning with `module.`: loaded, or the message names the prefix."""

import torch
from safetensors.torch import save_file
from torch import nn

from kdnas.teachers.zoo import load_weights
from tests.cases import outcome


def check(folder):
    wrapped, network = (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)) for _ in range(2))
    path = folder / "wrapped.safetensors"
    save_file({f"module.{name}": value for name, value in wrapped.state_dict().items()}, path)
    loaded = outcome(lambda: load_weights(network, path) or "loaded", "module.")
    assert loaded is None or torch.equal(network[0].weight, wrapped[0].weight)
