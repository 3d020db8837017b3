"""Zen-score: the expressivity of a network with Gaussian weights."""

import dataclasses
import inspect
import math
from typing import final

import torch
from torch import Tensor, nn

from kdnas.network import BATCH_NORMS, Network, batch_statistics
from kdnas.randomness import initialised, torch_rng
from kdnas.scorers._probing import probed, watching
from kdnas.scorers.base import Evidence, Score, Scorer, outputs_of
from kdnas.space import Layer
from kdnas.specs import resolve


@final
class Zen(Scorer):
    r"""`log E ||f(x) - f(x + 0.01 e)||_1 + sum_norms log sqrt(mean_channels variance)`, weights, `x` and `e` Gaussian.

    `f` is the deepest stage's feature map, before the head's convolution and pooling; its norm is a sum over the map,
    `E` a mean over images and repeats. The second term compensates for batch norm, which divides by the standard
    deviation of the batch: the variance of its input over images and positions, averaged over channels. The score
    depends on the architecture and the shape of its images alone: weights and images are drawn from the evidence's
    seed.

    Args:
        repeats: draws of weights, images and noise, averaged. One suffices to rank: over NAS-Bench-Macro the standard
            deviation of the score is 5 between networks and 0.05 between draws.
        batch_size: images per draw.

    Raises:
        ValueError: the network has no feature maps.

    Reference: Lin et al., Zen-NAS: A Zero-Shot NAS for High-Performance Deep Image Recognition, ICCV 2021,
        algorithm 1.
    Differs: shortcuts are removed where a layer has an argument `shortcut`, as in the paper; other networks keep
        theirs. The variance is that of the batch, whereas the authors read running averages. Weights are drawn at every
        repeat.
    """

    reads_weights = False

    def __init__(self, *, repeats: int = 1, batch_size: int = 8) -> None:
        if repeats < 1 or batch_size < 2:
            raise ValueError(
                f"`repeats` must be at least 1 and `batch_size` at least 2, got {repeats} and {batch_size}."
            )
        self.repeats, self.batch_size = repeats, batch_size

    def score(self, student: nn.Module, evidence: Evidence) -> Score:
        """The student's score."""
        device = evidence.images.device
        network = (
            _without_shortcuts(student).to(device)
            if isinstance(student, Network)
            else probed(student, "inherited", 0, device)
        )
        image = network.blueprint.image if isinstance(network, Network) else evidence.images.shape[1:]
        shape = (self.batch_size, *image)
        values = []
        for repeat in range(self.repeats):
            rng = torch_rng("zen", evidence.seed, repeat)
            _draw(network, rng)
            x, noise = (torch.randn(shape, generator=rng).to(device) for _ in range(2))
            scales: list[Tensor] = []

            def see(_: nn.Module, y: Tensor, scales: list[Tensor] = scales) -> None:
                over = [d for d in range(y.dim()) if d != 1]
                scales.append(y.float().var(over, correction=0).mean().clamp_min(1e-30).log() / 2)

            with torch.no_grad(), batch_statistics(network):
                with watching(network, BATCH_NORMS, see):
                    first = _map(network, x)
                second = _map(network, x + 0.01 * noise)
            distance = (first - second).double().flatten(1).abs().sum(1).mean()
            values.append(float(distance.clamp_min(1e-30).log()) + sum(map(float, scales)))
        value = math.fsum(values) / len(values)
        return Score(value, {"zen": value})


def _map(network: nn.Module, images: Tensor) -> Tensor:
    if isinstance(network, Network):
        x = network.stem(images)
        for stage in network.stages:
            x = stage(x)
        return x
    features = outputs_of(network, images).features
    if not features:
        raise ValueError("scorer 'zen' needs the feature map before pooling; the network has none. Return Outputs.")
    return features[-1]


def _draw(network: nn.Module, rng: torch.Generator) -> None:
    """Weights of two and more dimensions from the unit Gaussian; scales of norms 1; biases 0."""
    with torch.no_grad():
        for module in network.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() > 1:
                    parameter.copy_(torch.randn(parameter.shape, generator=rng))
                else:
                    parameter.fill_(float(name == "weight"))


def _without_shortcuts(network: Network) -> Network:
    blueprint = network.blueprint
    stages = tuple(tuple(_without_shortcut(layer) for layer in stage) for stage in blueprint.stages)
    return initialised(lambda: Network(dataclasses.replace(blueprint, stages=stages)), 0)


def _without_shortcut(layer: Layer) -> Layer:
    if "shortcut" not in inspect.signature(resolve(layer.make.make)).parameters:
        return layer
    return dataclasses.replace(layer, make=layer.make.replace(shortcut="none"))
