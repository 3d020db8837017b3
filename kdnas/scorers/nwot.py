"""NASWOT: the kernel of activation patterns of an untrained network."""

from typing import final

import torch
from torch import Tensor, nn

from kdnas.network import batch_statistics
from kdnas.scorers._probing import ACTIVATIONS, Weights, probed, watching
from kdnas.scorers.base import Evidence, Score, Scorer
from kdnas.specs import check_literals


@final
class Nwot(Scorer):
    r"""`log det K`, where `K_ij` is the number of activations with equal sign for images i and j.

    A unit's code for an image is whether its activation's input is positive; `K` sums the agreements over all units of
    all activation layers, so `K_ii` is the number of units. Natural logarithm, no division: the score grows with the
    network's size, which makes it a control. Eigenvalues below rounding error (two images with one code) are set to
    it, so that the score is finite.

    Args:
        num_images: number of the evidence's images in `K`.
        weights: `fresh` (initialised from the evidence's seed) or `inherited`.

    Raises:
        ValueError: the network has no activation modules.

    Reference: Mellor, Turner, Storkey, Crowley, Neural Architecture Search without Training, ICML 2021, section 3.
    Differs: codes of SiLU, Hardswish and GELU too, by the sign of their inputs; 32 images where the authors take 128.
    """

    def __init__(self, *, num_images: int = 32, weights: Weights = "fresh") -> None:
        check_literals(type(self), locals())
        if num_images < 2:
            raise ValueError(f"num_images must be at least 2, got {num_images}.")
        self.num_images, self.weights = num_images, weights
        self.reads_weights = weights == "inherited"

    def score(self, student: nn.Module, evidence: Evidence) -> Score:
        """The student's score."""
        images = evidence.images[: self.num_images]
        network = probed(student, self.weights, evidence.seed, evidence.images.device)
        kernel = torch.zeros(len(images), len(images), dtype=torch.float64, device=images.device)
        units = 0

        def see(_: nn.Module, x: Tensor) -> None:
            nonlocal units
            signs = torch.where(x.flatten(1) > 0, 1.0, -1.0)
            # Sums of +-1 are exact in float32 up to 2^24 units of a layer.
            kernel.add_((signs @ signs.T + signs.shape[1]) / 2)
            units += signs.shape[1]

        with torch.no_grad(), batch_statistics(network), watching(network, ACTIVATIONS, see):
            network(images)
        if not units:
            raise ValueError(
                "scorer 'nwot' needs activation modules (ReLU, SiLU, Hardswish, GELU), and the network has none. Make "
                "its activations modules or use another scorer."
            )
        least = units * len(images) * torch.finfo(kernel.dtype).eps
        value = float(torch.linalg.eigvalsh(kernel).clamp_min(least).log().sum())
        return Score(value, {"nwot": value, "units": float(units)})
