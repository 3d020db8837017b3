"""Teachers and data sets that exist in this process only: a run stores a digest of them, not a way to make them."""

import copy
import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from kdnas.data.base import Data
from kdnas.data.datasets import from_dataset
from kdnas.preprocessing import Preprocessing
from kdnas.specs import Spec, spec
from kdnas.teachers.base import Teacher
from kdnas.teachers.zoo import Function, as_frozen

IN_MEMORY = __name__
"""The module that the specs of such objects name."""
_KEPT: dict[str, Any] = {}


def keep(value: object) -> Spec:
    """The spec of a teacher or a data set in memory; equal content gives an equal spec.

    Args:
        value: a torch module, a `Data`, a torch `Dataset` or another sequence of pairs, see `from_dataset`, or a pair
            of these for training and test.

    Raises:
        ValueError: another type.
    """
    if isinstance(value, Function):
        key, make = _digest(*_told_apart(value.function)), teacher_in_memory
    elif isinstance(value, nn.Module):
        key, make = _digest(type(value).__qualname__, *value.state_dict().values()), teacher_in_memory
    elif isinstance(value, Data | Dataset | DataLoader | tuple) or hasattr(value, "__getitem__"):
        value = value if isinstance(value, Data) else from_dataset(*(value if isinstance(value, tuple) else (value,)))
        key, make = _digest(f"Data.{value.augmentation}{value.fingerprint}"), data_in_memory
    else:
        raise ValueError(
            "a teacher must be a text, a spec, a torch module or a function, and data a text, a spec, a Data or a "
            f"torch Dataset, got {type(value).__name__}."
        )
    _KEPT[key] = value
    return spec(make, key=key)


def is_kept(value: object) -> bool:
    """Whether this is the spec of an object in memory."""
    return isinstance(value, Spec) and value.make.partition(":")[0] == __name__


def teacher_in_memory(key: str, classes: int, preprocessing: Preprocessing, dense: bool = False) -> Teacher:
    """A frozen copy of a module that this process keeps; it takes the student's images unless it is a Teacher."""
    return as_frozen(copy.deepcopy(_recall(key, "teacher")), f"teacher {key}", classes, preprocessing, dense=dense)


def data_in_memory(key: str) -> Data:
    """A data set that this process keeps."""
    data = _recall(key, "data")
    assert isinstance(data, Data)
    return data


def _recall(key: str, name: str) -> Any:
    if key not in _KEPT:
        raise ValueError(
            f"{name} was an object in the memory of another process. Pass it again from Python: kdnas.search(RUN, "
            f"{name}=...), and likewise kdnas.export, kdnas.why and kdnas.retrain."
        )
    return _KEPT[key]


def _told_apart(function: Any) -> tuple[Any, ...]:
    """What tells a function from another one: a text of its name and code, and the weights that it closes over."""
    code = getattr(function, "__code__", None)
    name = getattr(function, "__qualname__", type(function).__qualname__)
    values = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    weights = [w for value in values if isinstance(value, nn.Module) for w in value.state_dict().values()]
    return f"function.{name}{code and (code.co_code, code.co_names)}", *weights


def _digest(name: str, *tensors: Tensor) -> str:
    digest = hashlib.sha256(name.encode())
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{tuple(plain.shape)}{plain.dtype}".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"{name.partition('.')[0][:20]}-{digest.hexdigest()[:12]}"
