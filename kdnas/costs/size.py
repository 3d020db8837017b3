"""Exact bytes of the file that is shipped: a network's weights, or its graph in 8-bit integers."""

import functools
import json
import math
from typing import Any

import torch
from torch import Tensor, nn

from kdnas.blocks.basic import chained
from kdnas.network import Network, as_input, as_logits, without_weights
from kdnas.runtimes import onnx_bytes, quantized, require
from kdnas.space import Blueprint

_BYTES = {torch.float32: 4, torch.int64: 8}
_NAMES = {torch.float32: "F32", torch.int64: "I64"}
_STAMP = f"1 {'0' * 32} {'0' * 32}"  # format, checksum of the file and of what its card computes


@functools.lru_cache(maxsize=10_000)
def shipped_bytes(blueprint: Blueprint, format: str) -> int:
    """The bytes of a file whatever the weights are.

    Args:
        blueprint: the network.
        format: `fp32` for `weights.safetensors`, computed; `int8` for `student-int8.onnx`, which is written to see
            (seconds for each network); zero points take some bytes more or less.

    Raises:
        ValueError: the network cannot be expressed in that form, or the extra `onnx` is not installed.
    """
    return weights_bytes(blueprint) if format == "fp32" else _integer_bytes(blueprint)


def check_format(format: str) -> None:
    """Raise a ValueError where what a format needs is not installed."""
    if format == "int8":
        require("onnx", "a bound on the size in int8")


def weights_bytes(blueprint: Blueprint) -> int:
    """Numbers, a header with their names, types, shapes and places, and two checksums."""
    state = without_weights(blueprint).state_dict()
    # The widest numbers come first, then names decide.
    entries = sorted(state.items(), key=lambda item: (-_BYTES[item[1].dtype], item[0]))
    header: dict[str, Any] = {"__metadata__": {"kdnas": _STAMP}}
    end = 0
    for name, tensor in entries:
        begin, end = end, end + tensor.numel() * _BYTES[tensor.dtype]
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + math.ceil(length / 8) * 8 + end


class _Shipped(nn.Module):
    """A network as student.py has it: images in [0, 1] to logits, under the same names."""

    mean: Tensor
    std: Tensor

    def __init__(self, blueprint: Blueprint) -> None:
        super().__init__()
        network = Network(blueprint)
        self.blueprint, channels = blueprint, blueprint.image[0]
        self.register_buffer("mean", torch.full((channels, 1, 1), 0.5), persistent=False)
        self.register_buffer("std", torch.full((channels, 1, 1), 0.25), persistent=False)
        self.stem, self.stages, self.head = network.stem, nn.Sequential(*network.stages), network.head

    def forward(self, images: Tensor) -> Tensor:
        x = (as_input(images, self.blueprint) - self.mean) / self.std
        logits = chained([*self.stages, self.head], self.blueprint.head.reads, self.stem(x))
        return as_logits(logits, images, self.blueprint)


def _integer_bytes(blueprint: Blueprint) -> int:
    check_format("int8")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = _Shipped(blueprint).eval()
        for tensor in module.state_dict().values():  # zero biases, as of an untrained network, would be left out
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
        images = torch.rand(2, *blueprint.image)
    graph = onnx_bytes(module, torch.zeros(2, *blueprint.image))
    return len(quantized(graph, [images.numpy()]))
