"""Exact parameters, multiply-accumulates and peak memory of a blueprint, and budgets."""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
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


COUNTS = Cost._fields
_UNITS = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9}
_OF = {
    "memory": {**_UNITS, "B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30},
    "latency": {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6},
}


@final
@dataclass(frozen=True)
class Budget:
    """Upper bounds, all of which a network must satisfy. None is no bound.

    Attributes:
        params: most parameters.
        macs: most multiply-accumulates for one image.
        memory: most bytes of activations alive at once, for one image in float32: `peak_memory`. Weights come on top,
            four bytes each.
        latency: most seconds for one image, as a `LatencyTable` of the device says.
    """

    params: float | None = None
    macs: float | None = None
    memory: float | None = None
    latency: float | None = None

    def admits(self, cost: Cost, **measured: float) -> bool:
        """Whether the network is within every bound."""
        return self.excess(cost, **measured) <= 0

    def excess(self, cost: Cost, **measured: float) -> float:
        """The largest relative overshoot over a bound; not positive when the network is admitted.

        Args:
            cost: what can be counted.
            **measured: memory and latency, where they are bounded.
        """
        spent = {**cost._asdict(), **measured}
        self.only(tuple(spent), "this")
        return max((spent[name] / bound - 1 for name, bound in self.bounds().items()), default=0.0)

    def bounds(self) -> dict[str, float]:
        """The bounds that are set."""
        return {name: bound for name, bound in dataclasses.asdict(self).items() if bound is not None}

    def only(self, names: Sequence[str], job: str) -> None:
        """Raise a ValueError where something else is bounded than what this job can bound."""
        others = [name for name in self.bounds() if name not in names]
        if others:
            raise ValueError(f"{job} bounds {' and '.join(names)}, got a bound on {others[0]}. Leave that bound out.")

    def __str__(self) -> str:
        return ", ".join(f"{name} <= {amount(name, bound)}" for name, bound in self.bounds().items()) or "no bound"

    @classmethod
    def parse(cls, texts: Iterable[str]) -> "Budget":
        """A budget from texts such as `macs=5e6`, `params=2M`, `memory=256KiB` or `latency=5ms`.

        Raises:
            ValueError: another form, an unknown or repeated name, or a bound that is not a positive number.
        """
        bounds: dict[str, float] = {}
        known = [f.name for f in dataclasses.fields(cls)]
        for text in texts:
            name, separator, number = text.partition("=")
            if not separator:
                raise ValueError(f"a budget is written name=number, such as macs=5e6, got {text!r}.")
            if name not in known:
                raise ValueError(
                    f"a budget bounds {', '.join(known[:-1])} or {known[-1]}, got {name!r}.{nearest(name, known)}"
                )
            if name in bounds:
                raise ValueError(f"{name} is bounded twice. Give it once.")
            units = _OF.get(name, _UNITS)
            written = re.fullmatch(r"\s*(.*?[\d.])\s*([A-Za-z]*)\s*", number)
            try:
                bounds[name] = float(written[1]) * units[written[2]] if written else float(number)
            except (ValueError, KeyError):
                raise ValueError(
                    f"the bound of {name} must be a number, with one of the units {', '.join(filter(None, units))} or "
                    f"none, got {number!r}."
                ) from None
            if not 0 < bounds[name] < float("inf"):
                raise ValueError(f"the bound of {name} must be positive, got {number}.")
        return cls(**bounds)


def amount(name: str, value: float) -> str:
    """A cost as people read it: milliseconds, bytes, or a whole number."""
    if name == "latency":
        return f"{1e3 * value:,.3g} ms"
    return f"{value:,.0f} bytes" if name == "memory" else f"{value:,.0f}"


def cost(blueprint: Blueprint) -> Cost:
    """Exact cost, summed over layers; each layer is measured once per input shape, on tensors without storage."""
    return sum_costs(layer_costs(blueprint).values())


def layer_costs(blueprint: Blueprint) -> dict[str, Cost]:
    """The cost of every position of the blueprint."""
    return {name: _measure(layer, shape)[0] for name, layer, shape in layer_inputs(blueprint)}


def feature_shapes(blueprint: Blueprint) -> dict[str, tuple[int, ...]]:
    """The output shape of every position for a batch of one."""
    return {name: _measure(layer, shape)[1] for name, layer, shape in layer_inputs(blueprint)}


def layer_inputs(blueprint: Blueprint) -> Iterator[tuple[str, Layer, tuple[int, ...]]]:
    """Every position with its layer and the shape of the layer's input for a batch of one."""
    shape: tuple[int, ...] = (1, *blueprint.image)
    for name, layer in blueprint.named():
        yield name, layer, shape
        _, shape = _measure(layer, shape)


def peak_memory(blueprint: Blueprint) -> int:
    """The most bytes of activations alive at once, for one image in float32, in inference.

    Layer after layer as PyTorch runs them without gradients: the layer's input, what it has computed and still needs,
    and its output. Neither weights, nor what a convolution's algorithm takes for its own work; a runtime that fuses
    layers or computes in place needs less.
    """
    return max(_peak(layer, shape) for _, layer, shape in layer_inputs(blueprint))


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


@functools.cache
def _peak(layer: Layer, shape: tuple[int, ...]) -> int:
    with torch.device("meta"):
        module = build(layer).eval()
        image = torch.empty(shape)
    return peak_activations(lambda: module(image), image, module)


def peak_activations(call: Callable[[], Any], image: Tensor, module: nn.Module) -> int:
    """The most bytes that tensors made by a call, and its image, hold at once; the module's own are not counted."""
    with torch.no_grad(), _Alive(image, [*module.parameters(), *module.buffers()]) as alive:
        call()
    return alive.peak


class _Alive(TorchDispatchMode):
    """Counts the bytes of the storages that exist after each operation."""

    def __init__(self, image: Tensor, own: Iterable[Tensor]) -> None:
        super().__init__()
        self.own = {t.untyped_storage()._cdata for t in own}
        self.held: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0
        self._see(image)

    def _see(self, found: Any) -> None:
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.own:
                    self.held[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.held = {key: (ref, size) for key, (ref, size) in self.held.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.held.values()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and count."""
        found = func(*args, **(kwargs or {}))
        self._see(found)
        return found
