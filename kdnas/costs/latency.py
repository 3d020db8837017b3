"""Latency of networks on a device: a table of layers, each measured once, and their sum."""

import hashlib
import json
import platform
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from kdnas.architecture import Architecture, Choice, Value
from kdnas.compilation import any_number
from kdnas.costs.count import Shapes, layer_inputs
from kdnas.costs.target import Target
from kdnas.network import build
from kdnas.randomness import python_rng
from kdnas.runs.files import CHECKSUM, checksum
from kdnas.runtimes import executorch_bytes, executorch_function, onnx_bytes, onnx_function, require
from kdnas.space import Blueprint, Layer, SearchSpace

REPEATS = 15
_SPREAD = 1.2  # of sums that an offset can be told from
_WARM = 2  # calls that are not timed: the first ones choose algorithms and fill caches


class LayerTable(ABC):
    r"""A cost of whole networks from one number per layer: $a + s \sum_l t_l$.

    a and s correct what layers alone cannot show; they are fitted to a few whole networks (`calibrate`).
    """

    def __init__(self, write: Callable[[dict[str, Any]], None]) -> None:
        self.write = write
        self.offset, self.scale = 0.0, None
        self.layers: dict[str, float] = {}

    offset: float
    scale: float | None

    @abstractmethod
    def whole(self, blueprint: Blueprint) -> float:
        """The cost of the whole network, measured now."""

    @abstractmethod
    def _alone(self, layer: Layer, shapes: Shapes) -> float:
        """The cost of a layer alone on inputs of these shapes for one image."""

    def sum(self, blueprint: Blueprint) -> float:
        """The sum over the layers; those that are not in the table yet are measured."""
        return sum(self._layer(layer, shapes) for _, layer, shapes in layer_inputs(blueprint))

    def predict(self, blueprint: Blueprint) -> float:
        """The cost of a network by its layers."""
        return self.offset + self.sum(blueprint) * (1.0 if self.scale is None else self.scale)

    def calibrate(self, blueprints: Sequence[Blueprint]) -> None:
        """Fit offset and scale to whole networks, once."""
        if self.scale is None:
            sums, wholes = [self.sum(b) for b in blueprints], [self.whole(b) for b in blueprints]
            self.offset, self.scale = linear_fit(sums, wholes)
            fit = {"scale": self.scale, "offset": self.offset, "sums": sums, "wholes": wholes}
            self.write(fit)

    def _layer(self, layer: Layer, shapes: Shapes) -> float:
        key = layer_key(layer, shapes)
        if key not in self.layers:
            self.layers[key] = self._alone(layer, shapes)
            self.write({"layer": key, "seconds": self.layers[key]})
        return self.layers[key]


def layer_key(layer: Layer, shapes: Shapes) -> str:
    """The name of a layer with its inputs in a table."""
    return json.dumps([layer.make.to_json(), *shapes])


def linear_fit(sums: Sequence[float], wholes: Sequence[float]) -> tuple[float, float]:
    """Offset and scale with the least squares of relative errors; no offset where it would be negative, or sums alike.

    Args:
        sums: of each network's layers.
        wholes: what each network costs.

    Example:
        >>> offset, scale = linear_fit([1.0, 2.0, 4.0], [2.5, 4.5, 8.5])
        >>> round(offset, 9), round(scale, 9)
        (0.5, 2.0)
    """
    x, y = np.asarray(sums), np.asarray(wholes)
    if len(x) > 2 and x.max() > _SPREAD * x.min():
        (offset, scale), *_ = np.linalg.lstsq(np.stack([1 / y, x / y], 1), np.ones(len(x)))
        if offset >= 0 and scale > 0:
            return float(offset), float(scale)
    return 0.0, statistics.median(float(ratio) for ratio in y / x)


def calibration_networks(space: SearchSpace, count: int = 8) -> list[Architecture]:
    """The smallest and the largest network, and others whose options are drawn around levels between them."""
    rng = python_rng(0, "latency")
    networks = [space.smallest, space.largest]
    for place in range(count - 2):
        level = (place + 0.5) / (count - 2)

        def pick(choice: Choice, level: float = level) -> Value:
            last = len(choice.options) - 1
            return choice.options[min(last, max(0, round(level * last + rng.uniform(-1, 1))))]

        networks.append(space.decide(pick))
    return list(dict.fromkeys(networks))


class NotMeasured(ValueError):
    """A table that was measured elsewhere lacks a layer."""


@final
class LatencyTable(LayerTable):
    r"""Seconds of one call of a network: $a + s \sum_l (t_l - t_0)$, with $t_l$ the seconds of layer l alone.

    Every layer is timed in turn with one reference convolution, call by call; its seconds are the median of the
    ratios of the two, times the seconds of the convolution when the table was created. So a machine that slows down
    while the table grows, or between two calls, does not make layers look slower. Where one thread of a CPU
    computes, only its own time counts, as other processes may have its core meanwhile. $t_0$ is the time of a call
    that does next to nothing (`least`), which a whole network has once and not for every layer; in `eager` it has
    it for every layer, and $t_0$ is 0. Offset a and scale s are fitted to whole networks (`calibrate`): layers in a
    network find their input in the cache.

    Args:
        device: where to measure `eager` and `compile`; the other runtimes are measured on the CPU.
        rows: rows that `write` received earlier; their layers are not measured again. Those of other targets are left
            out.
        write: called with every new row, a JSON object.
        repeats: timed calls of each layer.
        target: the runtime, its threads, and the batch; with a `table`, rows are those of another device, and nothing
            is measured.
        beside: the network that whole networks are timed beside in place of the convolution, call by call: what slows
            one down for a while slows down the other alike. None for the convolution.

    Raises:
        ValueError: the rows are from another device or number of threads, or damaged; the target's extra is not
            installed; or it is a table that is not known here.

    Reference: additive tables: Cai et al., ProxylessNAS, ICLR 2019, appendix B; Cai et al., Once for All, ICLR 2020,
        section 3.3 and appendix.
    Differs: the median of ratios to a reference timed beside it, instead of a mean; offset and scale fitted to whole
        networks.
    """

    def __init__(
        self,
        device: torch.device,
        rows: Iterable[Mapping[str, Any]] = (),
        write: Callable[[dict[str, Any]], None] = lambda row: None,
        repeats: int = REPEATS,
        target: Target = Target(),  # noqa: B008
        beside: Blueprint | None = None,
    ) -> None:
        name = "" if target == Target() else str(target)
        super().__init__(lambda row: write(row | {"target": name} if name else row))
        check_runtime(target)
        self.target, self.repeats = target, repeats
        self.threads = target.threads or torch.get_num_threads()
        self.device = device if target.runtime in ("eager", "compile") else torch.device("cpu")
        self.base, self.call, self.beside = None, None, beside
        own = [{k: v for k, v in row.items() if k != "target"} for row in rows if row.get("target", "") == name]
        if target.table and not own:
            own = adopted(target.table)
            for row in own:
                self.write(row)
        for row in own:
            self._read(row)
        if target.table:
            self.base = self.base or 1.0
            return
        self._reference = nn.Conv2d(32, 32, 3, padding=1).to(self.device).eval()
        self._input = torch.zeros(1, 32, 32, 32, device=self.device)
        if self.base is None:
            self.base = statistics.median(self._times(lambda: self._reference(self._input)))
            self.write({"reference": self.base, **self._here})

    base: float | None
    call: float | None

    @property
    def _here(self) -> dict[str, Any]:
        return {"device": _name(self.device), "threads": self.threads}

    def _read(self, row: Mapping[str, Any]) -> None:
        """Take a stored row."""
        try:
            if "reference" in row:
                here = self._here
                there = {name: row[name] for name in here}
                if there != here and not self.target.table:
                    raise ValueError(
                        f"the latency table was measured on {there['device']} with {there['threads']} threads, "
                        f"this is {here['device']} with {here['threads']} threads. Search there, or begin another "
                        "run."
                    )
                self.base = _positive(verified(row)["reference"])
            elif "scale" in row:
                self.scale = _positive(verified(row)["scale"])
                self.offset = _positive(row.get("offset", 0.0), or_zero=True)
            elif "call" in row:
                self.call = _positive(verified(row)["call"], or_zero=True)
            else:
                self.layers[row["layer"]] = _positive(verified(row)["seconds"], or_zero=True)
        except (KeyError, TypeError, OverflowError) as error:
            raise ValueError(
                f"a row of the latency table is damaged ({error!r}): {str(row)[:200]}. Remove it."
            ) from error

    def seconds(self, blueprint: Blueprint) -> float:
        """Predicted seconds of a call; layers that are not in the table yet are measured."""
        return self.predict(blueprint)

    def whole(self, blueprint: Blueprint) -> float:
        """Seconds of the whole network, measured now, relative to the reference as the table's layers are."""
        return self.timer(blueprint)()

    def measured(self, blueprint: Blueprint) -> float:
        """Seconds of the whole network, measured once and stored as a row."""
        return self._once(blueprint, self.whole)

    def timer(self, blueprint: Blueprint) -> Callable[[], float]:
        """What measures the whole network each time it is called; the network is made for the runtime once."""
        module, shapes = build(blueprint.chain), ((1, *blueprint.image),)
        return self._timer(module, shapes, None if self.beside is None else self._beside)

    @cached_property
    def _beside(self) -> tuple[Callable[[], Any], float]:
        """A call of the network that whole networks are timed beside, and its seconds."""
        assert self.beside is not None
        module, shapes = build(self.beside.chain), ((1, *self.beside.image),)
        return self._call(module, shapes), self._once(self.beside, lambda _: self._measure(module, shapes))

    def _once(self, blueprint: Blueprint, measure: Callable[[Blueprint], float]) -> float:
        key = "network " + hashlib.sha256(json.dumps(blueprint.to_json()).encode()).hexdigest()[:32]
        if key not in self.layers:
            self.layers[key] = measure(blueprint)
            self.write({"layer": key, "seconds": self.layers[key]})
        return self.layers[key]

    def drift(self) -> float:
        """How much slower the reference runs now than when the table was created: 0.1 is 10 %."""
        assert self.base is not None
        return statistics.median(self._times(lambda: self._reference(self._input))) / self.base - 1

    def _alone(self, layer: Layer, shapes: Shapes) -> float:
        if self.target.table:
            sizes = " and ".join(map(str, map(list, shapes)))
            raise NotMeasured(f"the latency table {self.target.table} has no layer {layer} for inputs of {sizes}.")
        if self.call is None and self.target.runtime != "eager":
            self.call = self._measure(*least(self.target.runtime))
            self.write({"call": self.call})
        try:
            return max(0.0, self._measure(build(layer), shapes) - (self.call or 0.0))
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                f"the layer {layer} cannot be run on {self.target.runtime}: {str(error)[:300]} Use another target."
            ) from error

    def _measure(self, module: nn.Module, shapes: Shapes) -> float:
        return self._timer(module, shapes)()

    def _timer(
        self, module: nn.Module, shapes: Shapes, beside: tuple[Callable[[], Any], float] | None = None
    ) -> Callable[[], float]:
        """What measures a module, beside a call whose seconds are known: by default that of the reference."""
        assert self.base is not None
        other, base = beside or ((lambda: self._reference(self._input)), self.base)
        call = self._call(module, shapes)

        def measure() -> float:
            ratios = []
            with threads(self.threads):
                for _ in range(_WARM + self.repeats):
                    (reference,) = self._times(other, 1)
                    (seconds,) = self._times(call, 1)
                    ratios.append(seconds / reference)
            return statistics.median(ratios[_WARM:]) * base

        return measure

    def _call(self, module: nn.Module, shapes: Shapes) -> Callable[[], Any]:
        """A call of the module in the target's runtime."""
        inputs = tuple(torch.zeros((shape[0] * self.target.batch, *shape[1:]), device=self.device) for shape in shapes)
        with threads(self.threads):
            return runner(self.target.runtime, module.to(self.device).eval(), inputs, self.threads)

    def _times(self, call: Callable[[], Any], repeats: int | None = None) -> list[float]:
        warm = _WARM if repeats is None else 0
        return timed(call, self.device, repeats or self.repeats, warm)


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Inside, PyTorch computes with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def least(runtime: str) -> tuple[nn.Module, Shapes]:
    """The module that takes no time but that of a call, and the shape of its one input.

    What PyTorch compiles has a convolution of one pixel: without any kernel the compiled program is left out of the
    call, which then takes half as long as that of a layer.
    """
    return (nn.Conv2d(1, 1, 1), ((1, 1, 1, 1),)) if runtime == "compile" else (nn.Identity(), ((1, 8),))


def check_runtime(target: Target) -> None:
    """Raise a ValueError where what a target needs is not installed; a table from elsewhere needs nothing."""
    extra = {"onnxruntime": "onnx", "executorch": "executorch"}.get(target.runtime)
    if extra is not None and not target.table:
        require(extra, f"latency on {target.runtime}")


def runner(runtime: str, module: nn.Module, inputs: tuple[Tensor, ...], threads: int) -> Callable[[], Any]:
    """A function that runs the module on its inputs in a runtime."""
    if runtime == "eager":
        return lambda: module(*inputs)
    if runtime == "compile":
        compiled = torch.compile(module, dynamic=False)
        with any_number(), torch.no_grad():
            compiled(*inputs)
        return lambda: compiled(*inputs)
    if runtime == "onnxruntime":
        form = onnx_function(onnx_bytes(module, inputs, any_batch=False), threads)
    else:
        form = executorch_function(executorch_bytes(module, inputs), threads)
    return lambda: form(*inputs)


_ADOPTED: dict[str, list[dict[str, Any]]] = {}
"""Rows of tables that were measured elsewhere, by digest, until a run stores them."""


def adopt_rows(digest: str, rows: list[dict[str, Any]]) -> None:
    """Let this process know a table that was measured elsewhere."""
    _ADOPTED[digest] = rows


def adopted(digest: str) -> list[dict[str, Any]]:
    """The rows of a table that `kdnas.costs.elsewhere.adopt` has read in this process.

    Raises:
        ValueError: it has read none of this digest.
    """
    if digest not in _ADOPTED:
        raise ValueError(f"the latency table {digest} is not known here. Give it again with --latency-table FILE.")
    return _ADOPTED[digest]


def _positive(value: Any, *, or_zero: bool = False) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not (0 < value < float("inf") or (or_zero and value == 0)):
        raise TypeError(f"must be a number above 0, got {value!r}")
    return float(value)


def verified(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without its own checksum, which those of other devices and of runs of format 1 have."""
    if CHECKSUM in row and checksum(row) != row[CHECKSUM]:
        raise TypeError("its checksum is another than when it was written")
    return {key: value for key, value in row.items() if key != CHECKSUM}


def timed(call: Callable[[], Any], device: torch.device, repeats: int, warm: int = _WARM) -> list[float]:
    """Seconds of each of `repeats` calls without gradients, after `warm` calls that are not timed.

    Where one thread of a CPU computes, they are its own: those in which another process has its core do not count.
    """
    clock = time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    seconds = []
    with torch.no_grad():
        for _ in range(warm + repeats):
            began = clock()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(clock() - began)
    return seconds[warm:]


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()})"
