"""`kdnas latency`: a script that measures the layers of a space on another device."""

import base64
import dataclasses
import inspect
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdnas.architecture import Architecture
from kdnas.costs import portable
from kdnas.costs.count import Shapes, layer_inputs
from kdnas.costs.latency import calibration_networks, layer_key, least
from kdnas.costs.target import Target
from kdnas.jobs._arguments import as_run, as_space
from kdnas.network import build
from kdnas.randomness import python_rng
from kdnas.runs.files import write_atomically, write_text
from kdnas.runs.folder import MANIFEST
from kdnas.runtimes import onnx_bytes, require
from kdnas.space import Layer, SearchSpace
from kdnas.students.definitions import Definitions, Import
from kdnas.students.source import layer_code, nested_specs

_FRUITLESS = 200  # draws in turn that bring no further layer
_MOST_LAYERS = 2000
_Inputs = tuple[Layer, Shapes]


def space_of(
    value: str | Path | SearchSpace, *, classes: int | None, channels: int | None, size: int | None
) -> SearchSpace:
    """The space of a run folder, or of a table or a name, for other images and classes.

    Raises:
        ValueError: numbers beside a run, whose data give them.
    """
    if isinstance(value, str | Path) and (Path(value) / MANIFEST).is_file():
        if (classes, channels, size) != (None, None, None):
            raise ValueError(f"`classes`, `channels` and `size` are those of the run {value}. Drop them.")
        return as_run(value).space
    space = as_space(value)
    if size is not None:
        space = dataclasses.replace(space, resolutions=(size,))
    return space.fitted(classes=classes or space.classes, image_channels=channels or space.image_channels)


def write_measuring_script(space: SearchSpace, out: Path, target: Target, num_networks: int) -> dict[str, Any]:
    """Write the script.

    Args:
        space: whose layers are measured: those of its smallest and largest network, of all that differ from them in one
            choice, and of random ones until 200 in turn bring no other.
        out: the file.
        target: the runtime on the device, its threads, and the batch.
        num_networks: whole networks that are measured too.

    Returns:
        The file, its bytes, and the number of layers and networks.

    Raises:
        ValueError: a runtime that the script does not measure, or no Python file.
    """
    if out.suffix != ".py":
        raise ValueError(f"`write_script` must be a .py file, got {out.name}.")
    if target.runtime == "executorch":
        raise ValueError(
            "`target` must be onnxruntime, eager or compile, got executorch, which needs more than torch to measure. "
            "Measure it here: --budget latency=5ms@executorch."
        )
    target = dataclasses.replace(target, threads=target.threads or 1)
    layers = list(dict.fromkeys(_layers(space)))
    networks = [space.blueprint(a) for a in calibration_networks(space, max(3, num_networks))]
    keys = {pair: layer_key(*pair) for pair in layers}
    payload: dict[str, Any] = {"target": str(target), "runtime": target.runtime, "threads": target.threads}
    images = [[[target.batch, *blueprint.image]] for blueprint in networks]
    named = [[keys[layer, shapes] for _, layer, shapes in layer_inputs(blueprint)] for blueprint in networks]
    chains = [blueprint.chain for blueprint in networks]
    if target.runtime == "onnxruntime":
        require("onnx", "a script for onnxruntime")
        module, shapes = least(target.runtime)
        payload["call"] = _graph(module, [*map(list, shapes)])
        payload["layers"] = [{"key": keys[p], **_graph(build(p[0]), _batch(p[1], target))} for p in layers]
        graphs = [_graph(build(chain), image) for chain, image in zip(chains, images, strict=True)]
        payload["networks"] = [{"keys": k, **g} for k, g in zip(named, graphs, strict=True)]
        code = ""
    else:
        payload["call"] = {"module": 0, "shapes": [[1, 1, 1, 1]]}
        payload["layers"] = [
            {"key": keys[pair], "module": place, "shapes": _batch(pair[1], target)}
            for place, pair in enumerate(layers, 1)
        ]
        payload["networks"] = [
            {"keys": k, "module": place, "shapes": image}
            for place, (k, image) in enumerate(zip(named, images, strict=True), len(layers) + 1)
        ]
        code = _modules([*(layer for layer, _ in layers), *chains])
    text = _script(code, payload)
    write_atomically(out, lambda draft: write_text(draft, text))
    return {"script": str(out), "bytes": len(text.encode()), "layers": len(layers), "networks": len(networks)}


def _script(code: str, payload: dict[str, Any]) -> str:
    modules = ", MODULES" if code else ""
    end = f'\n\nif __name__ == "__main__":\n    main(json.loads(PAYLOAD), sys.argv[1:]{modules})\n'
    return f"{inspect.getsource(portable)}\n\n{code}\n\nPAYLOAD = {json.dumps(payload)!r}{end}"


def _batch(shapes: Shapes, target: Target) -> list[list[int]]:
    return [[shape[0] * target.batch, *shape[1:]] for shape in shapes]


def _layers(space: SearchSpace) -> Iterator[_Inputs]:
    """The layers of networks that differ from each other, with their inputs."""
    rng, seen = python_rng(0, "layers"), set[_Inputs]()

    def new(architecture: Architecture) -> list[_Inputs]:
        pairs = [(layer, shapes) for _, layer, shapes in layer_inputs(space.blueprint(architecture))]
        fresh = [pair for pair in pairs if pair not in seen]
        seen.update(fresh)
        return fresh

    corners = calibration_networks(space, 32)
    for corner in corners:
        yield from new(corner)
        for choice in space.choices:
            for option in choice.options if choice.name in corner else ():
                change = lambda c, choice=choice, option=option, corner=corner: (  # noqa: E731
                    option if c == choice else corner.get(c.name, c.options[0])
                )
                yield from new(space.decide(change))
    fruitless = 0
    while fruitless < _FRUITLESS and len(seen) < _MOST_LAYERS:
        fresh = new(space.sample(rng))
        fruitless = 0 if fresh else fruitless + 1
        yield from fresh


def _graph(module: nn.Module, shapes: list[list[int]]) -> dict[str, Any]:
    """A graph with equal numbers for all weights, which take no time more or less and compress to nothing."""
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.fill_(0.015625)
    content = onnx_bytes(module.eval(), tuple(map(torch.zeros, shapes)), any_batch=False)
    return {"graph": base64.b64encode(zlib.compress(content, 9)).decode(), "shapes": shapes}


def _modules(layers: list[Layer]) -> str:
    """The code of the layers, and a list of functions that make them; the first makes that of a call."""
    makes = [make for layer in layers for make in nested_specs(layer.make)]
    own = {make.make.partition(":")[0].partition(".")[0] for make in makes}
    known = [name for name in vars(portable) if not name.startswith("__")]
    definitions = Definitions({"kdnas", *own}, reserved=(*known, "MODULES", "PAYLOAD"))
    for statement in (Import("torch"), Import("torch", "nn"), Import("torch", "Tensor")):
        definitions.name_import(statement)
    lines = [line for layer in layers for line in layer_code("lambda: ", layer.make, ",", 4, definitions)]
    texts = [f"\n\n{text}" for text in definitions.texts()]
    return "\n".join(
        [*definitions.import_lines(), *texts, "", "", "MODULES = [", "    lambda: nn.Conv2d(1, 1, 1),", *lines, "]"]
    )
