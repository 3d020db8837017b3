"""`kdnas convert`: a trained network as a search space and a supernet to start from, in a folder."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from kdnas.conversion.base import Conversion
from kdnas.conversion.convert import convert
from kdnas.preprocessing import Preprocessing
from kdnas.runs.files import new_folder
from kdnas.specs import Spec
from kdnas.tables import table_of
from kdnas.teachers.base import Frozen
from kdnas.teachers.zoo import zoo_teacher

SPACE, WEIGHTS, REPORT = "space.toml", "supernet.safetensors", "report.txt"


def load_source(text: str, *, size: int = 224, classes: int = 1000) -> nn.Module:
    """A trained network from its name on the command line.

    Args:
        text: `torchvision:NAME` or `timm:NAME`, with the zoo's own pretrained weights or, after `@`, a safetensors
            file; or `package.module:function` that returns a module.
        size: height and width of its images.
        classes: number of its classes.

    Raises:
        ValueError: another form, no such network, weights that cannot be loaded or do not fit, other classes.
    """
    kind, _, rest = text.partition(":")
    if kind in ("torchvision", "timm") and rest:
        name, _, weights = rest.partition("@")
        images = Preprocessing(height=size, width=size, mean=(0.0,) * 3, std=(1.0,) * 3)
        teacher = zoo_teacher(zoo=kind, name=name, weights=weights, classes=classes, preprocessing=images)
        assert isinstance(teacher, Frozen)
        return teacher.module
    if rest.isidentifier():
        module = Spec(text).build()
        if not isinstance(module, nn.Module):
            raise ValueError(f"{text} must return a torch module, it returned a {type(module).__name__}.")
        return module
    raise ValueError(f"a network must be torchvision:NAME, timm:NAME or package.module:function, got {text!r}.")


def convert_source(text: str, out: Path, *, size: int = 224, classes: int = 1000, channels: int = 3) -> Conversion:
    """Convert a network and write its space, its weights and the report into a folder, whole or not at all.

    `space.toml` is a table for `--space`; `supernet.safetensors` are the weights a run's supernet starts from,
    `--weights`.

    Args:
        text: see `load_source`.
        out: the folder.
        size: height and width of the images.
        classes: of a zoo's network.
        channels: of the images.

    Raises:
        ValueError: the folder is not empty, or the network cannot be loaded or converted.
    """
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"the folder {out} must be empty. Choose another one, or remove it.")
    source = load_source(text, size=size, classes=classes)
    conversion = convert(source, image=(channels, size, size), name=text.partition("@")[0].rpartition(":")[2])
    with new_folder(out) as new:
        (new / SPACE).write_text(_toml(table_of(conversion.space)), encoding="utf-8")
        save_file({n: t.contiguous().clone() for n, t in conversion.supernet.state_dict().items()}, new / WEIGHTS)
        (new / REPORT).write_text(f"{conversion}\n", encoding="utf-8")
    return conversion


def _toml(table: dict[str, Any]) -> str:
    return "".join(f"{name} = {_value(value)}\n" for name, value in table.items())


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{name} = {_value(inner)}" for name, inner in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    return json.dumps(value)  # numbers, strings and booleans are written alike
