"""The result of a conversion: an elastic supernet, a report, and the deviation from the source."""

from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import nn

from kdnas.costs.count import cost
from kdnas.network import as_logits
from kdnas.randomness import torch_rng
from kdnas.spaces.converted import Converted
from kdnas.spaces.vit import ViT
from kdnas.supernet import Supernet

TOLERANCE = 1e-5


class ModuleReport(NamedTuple):
    """One module of the source.

    Attributes:
        module: its path.
        elastic: whether some subnet has less of it.
        reason: what can be chosen, or why nothing can.
    """

    module: str
    elastic: bool
    reason: str


@final
@dataclass(frozen=True)
class Conversion:
    """A converted network.

    Attributes:
        space: its search space; the largest network is the source.
        supernet: with the source's weights, in evaluation mode.
        report: every module of the source with weights, elastic or fixed, and why; of a transformer also dropouts.
        error: largest difference between the logits of the source and of the largest subnet, on random images, as a
            share of the source's largest logit, or of 1 where that is below.
    """

    space: Converted | ViT
    supernet: Supernet
    report: tuple[ModuleReport, ...]
    error: float

    def smallest_shares(self) -> dict[str, float]:
        """The params and MACs of the smallest subnet, as shares of the source's."""
        smallest, largest = (cost(self.space.blueprint(a)) for a in (self.space.smallest, self.space.largest))
        return {name: getattr(smallest, name) / getattr(largest, name) for name in smallest._fields}

    def __str__(self) -> str:
        width = max(len(row.module) for row in self.report)
        rows = [f"{r.module:<{width}}  {'elastic' if r.elastic else 'fixed':<7}  {r.reason}" for r in self.report]
        elastic = sum(row.elastic for row in self.report)
        rows.append(f"{elastic} of {len(rows)} modules are elastic; {self.space.count():,} subnets; ")
        image = " x ".join(map(str, self.space.blueprint(self.space.largest).image))
        rows[-1] += f"the largest reproduces the source within {self.error:.1e} on images of {image}"
        shares = self.smallest_shares()
        rows.append(f"the smallest has {shares['macs']:.1%} of the MACs and {shares['params']:.1%} of the params")
        return "\n".join(rows)


def compare(module: nn.Module, supernet: Supernet) -> float:
    """The largest difference between the logits of the source and of the largest subnet, on random images.

    Maps of logits are enlarged to the images, and compared for images of another size too. It is a share of the
    source's largest logit, or of 1 where that is below.

    Raises:
        ValueError: it is above 1e-5 of the source's largest logit, or above 1e-5 where that is below 1.
    """
    largest = supernet.space.largest
    blueprint = supernet.space.blueprint(largest)
    channels, height, width = blueprint.image
    sizes = [(height, width), *([(height + 5, width + 18)] if blueprint.dense else [])]
    difference = 0.0
    for size in sizes:
        images = torch.randn(2, channels, *size, generator=torch_rng("convert"))
        with torch.no_grad():
            source = as_logits(module(images), images, blueprint)
            apart = float((source - supernet(images, largest).logits).abs().max())
        if not bool(source.isfinite().all()):
            raise ValueError("the network gives NaN or infinity on random images. Check its weights.")
        difference = max(difference, apart / max(1.0, float(source.abs().max())))
    if not difference <= TOLERANCE:
        raise ValueError(
            f"the largest subnet differs from the source by {difference:.3g}. The source may be random or depend on "
            f"the batch{', or on the size of the images,' * blueprint.dense} in evaluation mode."
        )
    return difference
