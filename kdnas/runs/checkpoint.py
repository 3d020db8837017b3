"""Nested state in one safetensors file: no pickle, written atomically, refused when damaged."""

import json
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import save_file
from torch import Tensor

from kdnas.runs.files import write_atomically


def save_state(path: Path, state: Any) -> None:
    """Write nested dicts, lists and tuples of tensors and plain values; the file appears whole or not at all."""
    tensors: dict[str, Tensor] = {}
    structure = json.dumps(_encode(state, tensors))
    write_atomically(path, lambda draft: save_file(tensors, draft, metadata={"structure": structure}))


def load_state(path: Path) -> Any:
    """The state that `save_state` wrote.

    Raises:
        ValueError: no such file, or one that is damaged or was written by something else.
    """
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {path}.")
    try:
        with safetensors.safe_open(path, "pt") as file:
            structure = json.loads((file.metadata() or {})["structure"])
            return _decode(structure, file.get_tensor)
    except (safetensors.SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is damaged or no checkpoint of kdnas ({error}). Remove it to start the phase again."
        ) from error


def _encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = f"t{len(tensors)}"
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[_encode(k, tensors), _encode(v, tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        return {"list" if isinstance(value, list) else "tuple": [_encode(v, tensors) for v in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a checkpoint holds tensors and plain values, got {type(value).__name__}")


def _decode(value: Any, tensor: Any) -> Any:
    if not isinstance(value, dict):
        return value
    kind, content = next(iter(value.items()))
    if kind == "tensor":
        return tensor(content)
    if kind == "dict":
        return {_decode(k, tensor): _decode(v, tensor) for k, v in content}
    values = [_decode(v, tensor) for v in content]
    return values if kind == "list" else tuple(values)
