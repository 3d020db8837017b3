"""Weights from a file in the ways that people save them; nothing in a file is ever run."""

import argparse
import collections
import logging
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdnas.network import load_strictly
from kdnas.runs.checkpoint import load_tensors

_log = logging.getLogger(__name__)

Weights = Mapping[str, Tensor]


_AUXILIARY = "aux_classifier."
"""What torchvision's networks for segmentation have beside them while they are trained."""
_HARMLESS: list[Any] = [
    *(argparse.Namespace, collections.defaultdict, dict, np.dtype, np.ndarray),
    *(type(np.dtype(kind)) for kind in ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?")),
    *(
        (getattr(np._core.multiarray, name), f"numpy.{core}.multiarray.{name}")
        for core in ("core", "_core")
        for name in ("scalar", "_reconstruct")
    ),
]
"""What training scripts save beside weights: options and numbers. Making one runs nothing else."""


def load_weights(module: nn.Module, path: Path, *, new_head: bool = False) -> None:
    """Load a module's weights from a file, strictly.

    The file is safetensors, or what `torch.save` wrote, whatever its suffix: the weights, or a dictionary with them at
    some key, of which the one that fits best is used, and of equal ones the first that is no moving average (a log line
    says which). What wrappers put before every name (`module.`, `_orig_mod.`, `model.`) is removed,
    and missing counts of batch norms' batches are 0.

    Args:
        module: the network.
        path: the file; what `torch.save` wrote is read with `weights_only=True`.
        new_head: let the head keep its own weights where the file's is for another number of classes.

    Raises:
        ValueError: no such file, a damaged one, one that holds code or no weights, or weights of another network; the
            message counts and names what differs.
    """
    if not path.is_file():
        raise ValueError(f"no weights file {path}. Check the path.")
    put_weights(module, _read(path), str(path), new_head=new_head)


def head_size(module: nn.Module, path: Path) -> int | None:
    """The number of classes in a file of weights that differs from the module's in that alone; else None."""
    if not path.is_file():
        return None
    expected = module.state_dict()
    for weights in (_renamed(each, set(expected)) for _, each in _dictionaries(_read(path))):
        head = _head(expected, weights)
        if head:
            return weights[head[0]].shape[0]
    return None


def put_weights(module: nn.Module, content: Any, path: str, *, new_head: bool = False) -> None:
    """Load a module's weights from what a file held; see `load_weights`."""
    expected = module.state_dict()
    names = set(expected)
    candidates = {key: _renamed(weights, names) for key, weights in _dictionaries(content)}
    if not candidates:
        raise ValueError(f"{path} holds no weights: it must be names and tensors, as `state_dict()` gives them.")
    matches = {key: len(names & set(weights)) for key, weights in candidates.items()}
    best = [key for key, count in matches.items() if count == max(matches.values())]
    key = min(best, key=lambda key: "ema" in key.casefold())
    if len(best) > 1:
        _log.info(f"{path} holds weights of the network at {' and '.join(best)}; those at {key} are loaded")
    weights = dict(candidates[key])
    _check_numbers(expected, weights, path)
    for name, value in expected.items():
        if name.endswith(".num_batches_tracked") and name not in weights:
            weights[name] = torch.zeros_like(value)
    head = _head(expected, weights)
    if head and not new_head:
        old, new = weights[head[0]].shape[0], expected[head[0]].shape[0]
        raise ValueError(
            f"{path} does not fit the network: its head ({head[0].rpartition('.')[0]}) has {old} classes, the data "
            f"{new}. Use weights of this data's classes, or fine-tune the network: kdnas fit --network NAME@WEIGHTS "
            "--data DATA --out FOLDER."
        )
    try:
        load_strictly(module, weights | {name: expected[name] for name in head}, path)
    except ValueError as error:
        positions = [n for n in weights if "pos" in n and n in expected and weights[n].shape != expected[n].shape]
        size = " Give the image size that it was trained with: NAME@WEIGHTS,size=N." if positions else ""
        raise ValueError(f"{error}{size}") from error


def _check_numbers(expected: Weights, weights: Weights, path: str) -> None:
    """Raise a ValueError for weights that are no plain floats where the network has floats."""
    for name, value in weights.items():
        if value.is_quantized or value.is_meta or value.layout is not torch.strided:
            raise ValueError(f"{path} must hold dense tensors with values, {name} is none. Save plain weights.")
        if name in expected and expected[name].is_floating_point() and not value.is_floating_point():
            raise ValueError(
                f"{path} must hold floats, {name} has {str(value.dtype).removeprefix('torch.')}. Quantised weights "
                "cannot be loaded: use those that they were made from."
            )


def _read(path: Path) -> Any:
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith((b"version https://git-lfs", b"<")):
        kind = "a web page" if head.startswith(b"<") else "a pointer of Git LFS (run `git lfs pull`)"
        raise ValueError(f"{path} is {kind}, and not the file that it stands for. Download it again.")
    if head[8:9] == b"{" or (path.suffix == ".safetensors" and not head.startswith(b"PK")):
        return load_tensors(path, "Write or download it again.")[0]
    if any(name.endswith("constants.pkl") for name in members_of(path)):
        raise ValueError(
            f"{path} is a TorchScript program, which holds code. Save the weights alone: "
            "torch.save(torch.jit.load(PATH).state_dict(), NEW_PATH)."
        )
    try:
        with torch.serialization.safe_globals(_HARMLESS), path.open("rb") as file:  # of a path torch reads the suffix
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        blocked = re.search(r"GLOBAL ([\w.]+)", str(error))
        if blocked is not None:
            raise ValueError(
                f"{path} holds more than weights ({blocked[1]}), and nothing in a file is run. Where it was written, "
                "save the weights alone: torch.save(network.state_dict(), PATH)."
            ) from error
        raise _damaged(path) from error
    except Exception as error:  # of a damaged file, anything
        raise _damaged(path) from error


def _damaged(path: Path) -> ValueError:
    reason = "" if path.stat().st_size else " (it is empty)"
    return ValueError(f"{path} is damaged or cut short, or not of torch{reason}. Write or download it again.")


def members_of(path: Path) -> list[str]:
    """The names of the members of a zip file that torch wrote; none of a file in its older form.

    Raises:
        ValueError: it is damaged, or compressed: torch compresses nothing, and what grows fills the memory.
    """
    try:
        if not zipfile.is_zipfile(path):  # which raises, too
            return []
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception as error:  # of a damaged directory, anything
        raise _damaged(path) from error
    size = sum(entry.file_size for entry in entries)
    if size > 2 * path.stat().st_size + 2**20:
        raise ValueError(f"{path} would take {size:,} bytes of memory, more than its own. Write it with torch anew.")
    return [entry.filename for entry in entries]


def _dictionaries(content: Any, depth: int = 3, key: str = "its top") -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every dictionary of names and tensors in what a file holds, with its key."""
    if not isinstance(content, Mapping):
        return
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if tensors and len(tensors) > len(content) / 2:
        yield key, tensors
    if depth:
        for name, value in content.items():
            yield from _dictionaries(value, depth - 1, str(name) if key == "its top" else f"{key}.{name}")


def _renamed(weights: Weights, names: set[str]) -> Weights:
    """The weights without what stands before every name, as long as more of them are then known."""
    weights = {name: value for name, value in weights.items() if name != "n_averaged"}  # of torch's AveragedModel
    best = weights
    while weights:
        first = {name.partition(".")[0] for name in weights}
        if len(first) > 1 or any("." not in name for name in weights):
            break
        weights = {name.partition(".")[2]: value for name, value in weights.items()}
        if len(names & set(weights)) > len(names & set(best)):
            best = weights
    best = {re.sub(r"(^|\.)_orig_mod\.", r"\1", name): value for name, value in best.items()}
    return {name: value for name, value in best.items() if name in names or not name.startswith(_AUXILIARY)}


def _head(expected: Weights, weights: Weights) -> list[str]:
    """The names of the weights that differ, where they do in the number of outputs alone; else none."""
    if set(expected) != set(weights):
        return []
    pairs = {name: (weights[name].shape, expected[name].shape) for name in expected}
    others = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    heads = all(len(old) == len(new) > 0 and old[1:] == new[1:] for old, new in others.values())
    return list(others) if heads and len({(old[0], new[0]) for old, new in others.values()}) == 1 else []
