"""Copies of networks with fresh weights, and the inputs of modules during a forward pass."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from kdnas.network import BATCH_NORMS, Network, hooked
from kdnas.randomness import initialised

ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.GELU)
Weights = Literal["fresh", "inherited"]


def probed(network: nn.Module, weights: Weights, seed: int, device: torch.device) -> nn.Module:
    """A copy of the network that may be modified; `fresh` weights are initialised from the seed.

    Drawn on the CPU, so that a score is the same on every device. Norms start at scale one even where a search space
    starts them at zero, which would hide a branch. A module that is not a Network is initialised by its submodules'
    `reset_parameters`; parameters of modules without that method keep their values.
    """
    if weights == "inherited":
        return copy.deepcopy(network).to(device)
    if isinstance(network, Network):
        fresh = initialised(lambda: Network(network.blueprint), seed)
        for module in fresh.modules():
            if isinstance(module, BATCH_NORMS):
                module.reset_parameters()
        return fresh.to(device)
    copied = copy.deepcopy(network).cpu()

    def reset() -> nn.Module:
        for module in copied.modules():
            if isinstance(reset_parameters := getattr(module, "reset_parameters", None), Callable):
                reset_parameters()
        return copied

    return initialised(reset, seed).to(device)


@contextmanager
def watching(
    network: nn.Module, kinds: tuple[type[nn.Module], ...], see: Callable[[nn.Module, Tensor], None]
) -> Iterator[None]:
    """Within the context, `see(module, input)` is called before every call of a module of these kinds."""
    modules = [module for module in network.modules() if isinstance(module, kinds)]
    with hooked(modules, before=lambda module, inputs: see(module, inputs[0].detach())):
        yield
