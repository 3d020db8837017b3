"""Latency of networks on a device: a table of layers, each measured once, and their sum."""

import hashlib
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, final

import torch
from torch import nn

from kdnas.costs.count import layer_inputs
from kdnas.network import Network, build
from kdnas.space import Blueprint, Layer

REPEATS = 15
_WARM = 2  # calls that are not timed: the first ones choose algorithms and fill caches


@final
class LatencyTable:
    r"""Seconds for one image: $s \sum_l t_l$, with $t_l$ the seconds of layer l alone, each measured once.

    A time is the least of several calls: other processes on the machine only add to it. Every layer is timed in turn
    with one reference convolution, call by call; its seconds are the ratio of the two times the seconds of the
    convolution when the table was created. So a machine that slows down while the table grows does not make later
    layers look slower. The factor s is the median ratio of whole networks to the sums of their layers (`calibrate`):
    layers in a network find their input in the cache.

    Args:
        device: where to measure.
        rows: rows that `write` received earlier; their layers are not measured again.
        write: called with every new row, a JSON object.
        repeats: timed calls of each layer.

    Raises:
        ValueError: the rows are from another device or number of threads, or damaged.

    Reference: additive tables: Cai et al., ProxylessNAS, ICLR 2019, appendix B; Cai et al., Once for All, ICLR 2020,
        section 3.3 and appendix.
    Differs: the least instead of the mean; relative to a reference timed beside it; a scale fitted to whole networks.
    """

    def __init__(
        self,
        device: torch.device,
        rows: Iterable[Mapping[str, Any]] = (),
        write: Callable[[dict[str, Any]], None] = lambda row: None,
        repeats: int = REPEATS,
    ) -> None:
        self.device, self.write, self.repeats = device, write, repeats
        self.scale: float | None = None
        self.layers: dict[str, float] = {}
        self._reference = nn.Conv2d(32, 32, 3, padding=1).to(device).eval()
        self._input = torch.zeros(1, 32, 32, 32, device=device)
        here = {"device": _name(device), "threads": torch.get_num_threads()}
        base: float | None = None
        for row in rows:
            try:
                if "reference" in row:
                    there = {name: row[name] for name in here}
                    if there != here:
                        raise ValueError(
                            f"the latency table was measured on {there['device']} with {there['threads']} threads, "
                            f"this is {here['device']} with {here['threads']} threads. Search there, or begin another "
                            "run."
                        )
                    base = _positive(_verified(row)["reference"])
                elif "scale" in row:
                    self.scale = _positive(_verified(row)["scale"])
                else:
                    self.layers[row["layer"]] = _positive(_verified(row)["seconds"])
            except (KeyError, TypeError, OverflowError) as error:
                raise ValueError(
                    f"a row of the latency table is damaged ({error!r}): {str(row)[:200]}. Remove it."
                ) from error
        if base is None:
            base = min(self._times(lambda: self._reference(self._input)))
            self.write(_signed({"reference": base, **here}))
        self.base = base

    def seconds(self, blueprint: Blueprint) -> float:
        """Predicted seconds of a network; layers that are not in the table yet are measured."""
        total = sum(self._layer(layer, shape) for _, layer, shape in layer_inputs(blueprint))
        return total * (1.0 if self.scale is None else self.scale)

    def calibrate(self, blueprints: Sequence[Blueprint]) -> None:
        """Fit the scale to whole networks, once."""
        if self.scale is None:
            ratios = [self.whole(blueprint) / self.seconds(blueprint) for blueprint in blueprints]
            self.scale = statistics.median(ratios)
            self.write(_signed({"scale": self.scale, "ratios": ratios}))

    def whole(self, blueprint: Blueprint) -> float:
        """Seconds of the whole network, measured now, relative to the reference as the table's layers are."""
        return self._measure(Network(blueprint), tuple((1, *blueprint.image)))

    def drift(self) -> float:
        """How much slower the reference runs now than when the table was created: 0.1 is 10 %."""
        return min(self._times(lambda: self._reference(self._input))) / self.base - 1

    def _layer(self, layer: Layer, shape: tuple[int, ...]) -> float:
        key = json.dumps([layer.make.to_json(), shape])
        if key not in self.layers:
            self.layers[key] = self._measure(build(layer), shape)
            self.write(_signed({"layer": key, "seconds": self.layers[key]}))
        return self.layers[key]

    def _measure(self, module: nn.Module, shape: tuple[int, ...]) -> float:
        module = module.to(self.device).eval()
        image = torch.zeros(shape, device=self.device)
        seconds, reference = [], []
        for _ in range(_WARM + self.repeats):
            reference += self._times(lambda: self._reference(self._input), 1)
            seconds += self._times(lambda: module(image), 1)
        return min(seconds[_WARM:]) / min(reference[_WARM:]) * self.base

    def _times(self, call: Callable[[], Any], repeats: int | None = None) -> list[float]:
        warm = _WARM if repeats is None else 0
        return timed(call, self.device, repeats or self.repeats, warm)


def _positive(value: Any) -> float:
    if not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise TypeError(f"must be a number above 0, got {value!r}")
    return float(value)


def _signed(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with the checksum of its values."""
    return {**row, "checksum": hashlib.blake2b(json.dumps(dict(row)).encode(), digest_size=8).hexdigest()}


def _verified(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without its checksum; one from before there were any has none."""
    plain = {key: value for key, value in row.items() if key != "checksum"}
    if "checksum" in row and _signed(plain) != row:
        raise TypeError("its checksum is another than when it was written")
    return plain


def timed(call: Callable[[], Any], device: torch.device, repeats: int, warm: int = _WARM) -> list[float]:
    """Seconds of each of `repeats` calls without gradients, after `warm` calls that are not timed."""
    seconds = []
    with torch.no_grad():
        for _ in range(warm + repeats):
            began = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - began)
    return seconds[warm:]


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()})"
