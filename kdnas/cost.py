"""Exact parameters and multiply-accumulates of a blueprint, and budgets on them."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch.utils.flop_counter import FlopCounterMode

from kdnas.network import build
from kdnas.space import Blueprint, Layer
from kdnas.spec import nearest


class Cost(NamedTuple):
    """What a network costs.

    Attributes:
        params: number of parameters.
        macs: multiply-accumulates for one image: convolutions, linear layers and matrix products; no
            normalisation, activation or bias, as every cited paper counts.
    """

    params: int
    macs: int


@final
@dataclass(frozen=True)
class Budget:
    """Upper bounds, all of which a network must satisfy. None is no bound.

    Attributes:
        params: most parameters.
        macs: most multiply-accumulates for one image.
    """

    params: float | None = None
    macs: float | None = None

    def admits(self, cost: Cost) -> bool:
        """Whether the network is within every bound."""
        return self.excess(cost) <= 0

    def excess(self, cost: Cost) -> float:
        """The largest relative overshoot over a bound; not positive when the network is admitted."""
        return max(
            (getattr(cost, name) / bound - 1 for name, bound in self.bounds().items()),
            default=0.0,
        )

    def bounds(self) -> dict[str, float]:
        """The bounds that are set."""
        return {n: b for n, b in (("params", self.params), ("macs", self.macs)) if b is not None}

    def __str__(self) -> str:
        return ", ".join(f"{name} <= {bound:,.0f}" for name, bound in self.bounds().items()) or "no bound"

    @classmethod
    def parse(cls, texts: Iterable[str]) -> "Budget":
        """A budget from texts such as `macs=5e6`.

        Raises:
            ValueError: another form, an unknown or repeated name, or a bound that is not a positive number.
        """
        bounds: dict[str, float] = {}
        for text in texts:
            name, separator, number = text.partition("=")
            if not separator:
                raise ValueError(f"a budget is written name=number, such as macs=5e6, got {text!r}.")
            if name not in Cost._fields:
                raise ValueError(
                    f"a budget bounds {' or '.join(Cost._fields)}, got {name!r}.{nearest(name, Cost._fields)}"
                )
            if name in bounds:
                raise ValueError(f"{name} is bounded twice. Give it once.")
            try:
                bounds[name] = float(number)
            except ValueError:
                raise ValueError(f"the bound of {name} must be a number, got {number!r}.") from None
            if not bounds[name] > 0:
                raise ValueError(f"the bound of {name} must be positive, got {number}.")
        return cls(**bounds)


def cost(blueprint: Blueprint) -> Cost:
    """Exact cost, summed over layers; each layer is measured once per input shape, on tensors without storage."""
    return sum_costs(layer_costs(blueprint).values())


def layer_costs(blueprint: Blueprint) -> dict[str, Cost]:
    """The cost of every position of the blueprint."""
    shape: tuple[int, ...] = (1, *blueprint.image)
    costs = {}
    for name, layer in blueprint.named():
        costs[name], shape = _measure(layer, shape)
    return costs


def feature_shapes(blueprint: Blueprint) -> dict[str, tuple[int, ...]]:
    """The output shape of every position for a batch of one."""
    shape: tuple[int, ...] = (1, *blueprint.image)
    shapes = {}
    for name, layer in blueprint.named():
        _, shape = _measure(layer, shape)
        shapes[name] = shape
    return shapes


def sum_costs(costs: Iterable[Cost]) -> Cost:
    """The sum."""
    listed = list(costs)
    return Cost(sum(c.params for c in listed), sum(c.macs for c in listed))


@functools.cache
def _measure(layer: Layer, shape: tuple[int, ...]) -> tuple[Cost, tuple[int, ...]]:
    with torch.device("meta"):
        module = build(layer).eval()
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            output = module(torch.empty(shape))
    # The counter counts a multiplication and an addition apart.
    macs = counter.get_total_flops() // 2
    return Cost(sum(p.numel() for p in module.parameters()), macs), tuple(output.shape)
