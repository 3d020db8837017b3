"""Tensors and nested state in safetensors files: no pickle, written atomically, verified when read."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
from safetensors.torch import save
from torch import Tensor

from kdnas.plain import reason
from kdnas.runs.files import FORMAT, Damaged, check_format, parse_json, write_atomically, write_bytes

_KEY = "kdnas"
# In the header: the file's format, the checksum of the whole file with zeros in its place, and what the file holds.
_STAMP = re.compile(rb'"kdnas":"(\d{1,9}) ([0-9a-f]{32}) ')
_ZEROS = b"0" * 32
_MOST_HEADER = 10**8  # bytes, the library's bound
_DEPTH = 256
_CHUNK = 2**20
_AGAIN = "Remove it to start the phase again."


def save_tensors(path: Path, tensors: Mapping[str, Tensor], structure: str = "") -> None:
    """Write named tensors with a checksum to a safetensors file, which appears whole or not at all.

    Args:
        path: of the file.
        tensors: on any device; tensors that share memory are written apart.
        structure: a text to keep beside them.
    """
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    content = memoryview(save(plain, {_KEY: f"{FORMAT} {_ZEROS.decode()} {structure}"}))
    end = 8 + int.from_bytes(content[:8], "little")
    header = bytes(content[:end])
    start = _STAMP.search(header).start(2)  # type: ignore[union-attr]
    checksum = hashlib.blake2b(content, digest_size=16).hexdigest().encode()
    header = header[:start] + checksum + header[start + len(checksum) :]
    write_atomically(path, lambda draft: write_bytes(draft, header, content[end:]))


def load_tensors(path: Path, advice: str) -> tuple[dict[str, Tensor], str]:
    """The tensors and the text that `save_tensors` wrote; of any other safetensors file no text.

    Args:
        path: of the file.
        advice: what to do about a damaged file, a sentence.

    Raises:
        Damaged: it is no safetensors file, or its checksum is another than when it was written.
        ValueError: a newer version of kdnas wrote it.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}. {advice}")
    with path.open("rb") as handle:
        is_stamped = _verify(handle, path, advice)
    try:
        with safetensors.safe_open(path, "pt") as file:
            names, metadata = file.keys(), file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in names}
    except (safetensors.SafetensorError, UnicodeError) as error:
        raise Damaged(path, f"is cut short or no safetensors file ({reason(error)})", advice) from error
    if is_stamped != (_KEY in metadata):
        raise Damaged(path, "its checksum cannot be read", advice)
    return tensors, metadata[_KEY].split(" ", 2)[2] if is_stamped else metadata.get("structure", "")


def _verify(handle: BinaryIO, path: Path, advice: str) -> bool:
    """Compare a file with the checksum in it; False where it has none."""
    prefix = handle.read(8)
    header = handle.read(min(int.from_bytes(prefix, "little"), _MOST_HEADER))
    stamp = _STAMP.search(header)
    if stamp is None:
        return False
    check_format(int(stamp[1]), path, advice)
    digest = hashlib.blake2b(prefix + header[: stamp.start(2)] + _ZEROS + header[stamp.end(2) :], digest_size=16)
    while chunk := handle.read(_CHUNK):
        digest.update(chunk)
    if digest.hexdigest().encode() != stamp[2]:
        raise Damaged(path, "its checksum is another than when it was written", advice)
    return True


def save_state(path: Path, state: Any) -> None:
    """Write nested dicts, lists and tuples of tensors and plain values; the file appears whole or not at all."""
    tensors: dict[str, Tensor] = {}
    structure = json.dumps(_encode(state, tensors))
    save_tensors(path, tensors, structure)


def load_state(path: Path) -> Any:
    """The state that `save_state` wrote.

    Raises:
        ValueError: no such file, or one that is damaged or was written by something else.
    """
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {path}.")
    tensors, structure = load_tensors(path, _AGAIN)
    content = parse_json(structure.encode(), path, _AGAIN, _DEPTH)
    try:
        return _decode(content, tensors.__getitem__)
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration) as error:
        raise Damaged(path, f"is no checkpoint of kdnas ({error!r})", _AGAIN) from error


def part_of(path: Path, *keys: str) -> Any:
    """A part of the state that `save_state` wrote, by the keys that lead to it.

    Raises:
        ValueError: as `load_state`, or there is no such part.
    """
    state = load_state(path)
    for key in keys:
        if not isinstance(state, dict) or key not in state:
            raise Damaged(path, f"has no {'.'.join(keys)!r}", _AGAIN)
        state = state[key]
    return state


def _encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = f"t{len(tensors)}"
        tensors[name] = value
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
