"""Synaptic flow of a network with absolute weights."""

from typing import final

import torch
from torch import nn

from kdnas.outputs import Outputs
from kdnas.scorers._probing import Weights, probed
from kdnas.scorers.base import Evidence, Score, Scorer
from kdnas.specs import check_literals

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)


@final
class Synflow(Scorer):
    r"""`log sum(theta * d(sum of logits) / d theta)`, with absolute weights and an image of ones.

    The sum is over weights of two and more dimensions (convolutions and linear layers). Normalisation layers are
    removed; float64. The sum is of degree 1 in every layer: for a chain of ReLU layers it is the number of layers times
    the sum of the logits.

    Args:
        weights: `fresh` (initialised from the evidence's seed) or `inherited`.

    Raises:
        ValueError: the student has no such weights.

    Reference: Tanaka, Kunin, Yamins, Ganguli, Pruning Neural Networks without Any Data by Iteratively Conserving
        Synaptic Flow, NeurIPS 2020, equation 1; as a score: Abdelfattah et al., Zero-Cost Proxies for Lightweight
        NAS, ICLR 2021, section 3.
    Differs: the logarithm, which keeps the order; the sum is clamped to float64's range.
    """

    def __init__(self, *, weights: Weights = "fresh") -> None:
        check_literals(type(self), locals())
        self.weights = weights
        self.reads_weights = weights == "inherited"

    def score(self, student: nn.Module, evidence: Evidence) -> Score:
        """The student's score."""
        network = (
            _without_norms(probed(student, self.weights, evidence.seed, evidence.images.device))
            .double()
            .eval()
            .requires_grad_(True)
        )
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.abs_()
        weights = [p for p in network.parameters() if p.dim() > 1]
        if not weights:
            raise ValueError(f"synflow needs a convolution or linear layer, {type(student).__name__} has none.")
        with torch.enable_grad():
            outputs = network(torch.ones_like(evidence.images[:1], dtype=torch.float64))
            logits = outputs.logits if isinstance(outputs, Outputs) else outputs
            slopes = torch.autograd.grad(logits.sum(), weights, allow_unused=True)
        flow = sum((p.detach() * s).sum() for p, s in zip(weights, slopes, strict=True) if s is not None)
        limits = torch.finfo(torch.float64)
        value = float(torch.as_tensor(flow, dtype=torch.float64).clamp(limits.tiny, limits.max).log())
        return Score(value, {"synflow": value})


def _without_norms(network: nn.Module) -> nn.Module:
    for name, child in network.named_children():
        if isinstance(child, _NORMS):
            setattr(network, name, nn.Identity())
        else:
            _without_norms(child)
    return network
