"""`kdnas convert`: a trained network as a search space and a supernet to start from, in a folder."""

import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from kdnas.blocks.basic import chained
from kdnas.conversion.base import Conversion
from kdnas.conversion.convert import convert
from kdnas.costs.budget import Budget
from kdnas.jobs._checks import check_budget
from kdnas.network import Network
from kdnas.preprocessing import Preprocessing
from kdnas.runs.checkpoint import save_tensors
from kdnas.runs.files import new_folder, write_text
from kdnas.runs.lock import hold
from kdnas.settings import Search
from kdnas.specs import Spec
from kdnas.tables import table_of
from kdnas.teachers.base import Frozen
from kdnas.teachers.stages import logits_of
from kdnas.teachers.zoo import declared_size, load_weights, student_teacher, zoo_network
from kdnas.values import Side, Size, check_value

SPACE, WEIGHTS, REPORT = "space.toml", "supernet.safetensors", "report.txt"
_SIZE = 224  # of images, for a network that names no size
say = logging.getLogger(__name__).info


class Plain(nn.Module):
    """A kdnas network as a module that gives logits alone and resizes no images, for the tracer."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[batch, classes]`."""
        network = self.network
        return chained([*network.stages, network.head], network.blueprint.head.reads, network.stem(x))


class LogitMaps(nn.Module):
    """A network for every pixel as a module that gives its logits alone, for the tracer.

    Args:
        network: returns them, alone or among other outputs (`kdnas.teachers.stages.logits_of`).
        classes: number of classes.
    """

    def __init__(self, network: nn.Module, classes: int) -> None:
        super().__init__()
        self.network, self.classes = network, classes

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[batch, classes, height, width]`."""
        return logits_of(self.network(x), self.classes, dense=True)


class Source(NamedTuple):
    """A trained network and how it takes images.

    Attributes:
        module: returns logits.
        preprocessing: its own, or None where it says nothing.
    """

    module: nn.Module
    preprocessing: Preprocessing | None


def load_source(text: str, *, size: int = 0, classes: int = 1000) -> Source:
    """A trained network from its name on the command line.

    Args:
        text: `torchvision:NAME` or `timm:NAME`, with the zoo's own pretrained weights or, after `@`, a weights file;
            `checkpoint:FOLDER`, a student or a folder of `kdnas fit`; or `package.module:function` that returns a
            module.
        size: height and width of the images that a zoo's network is built for; 0 for its own.
        classes: of a zoo's network with a weights file.

    Raises:
        ValueError: another form, no such network, weights that cannot be loaded or do not fit.
    """
    kind, _, rest = text.partition(":")
    if kind in ("torchvision", "timm") and rest:
        name, _, weights = rest.partition("@")
        module, preprocessing = zoo_network(kind, name, classes if weights else None, size)
        if weights:
            load_weights(module, Path(weights))
        return Source(module, preprocessing)
    if kind == "checkpoint" and rest:
        teacher = student_teacher(rest, None)
        assert isinstance(teacher, Frozen)
        module = teacher.module
        return Source(Plain(module) if isinstance(module, Network) else module, teacher.preprocessing)
    if rest.isidentifier():
        module = Spec(text).build()
        if not isinstance(module, nn.Module):
            raise ValueError(f"{text} must return a torch module, it returned a {type(module).__name__}.")
        return Source(module, None)
    raise ValueError(
        "a network must be torchvision:NAME, timm:NAME, checkpoint:FOLDER or package.module:function, got "
        f"{text!r}.{_hint(text)}"
    )


def _hint(text: str) -> str:
    return f" Did you mean 'checkpoint:{text}'?" if Path(text).is_dir() else ""


def convert_source(
    text: str,
    out: Path,
    *,
    size: int | None = None,
    classes: int = 1000,
    channels: int | None = None,
    divisor: int = 0,
    budget: Budget = Budget(),
) -> Conversion:
    """Convert a network and write its space, its weights and the report into a folder, whole or not at all.

    `space.toml` is a table for `--space`; `supernet.safetensors` are the weights a run's supernet starts from,
    `--weights`.

    Args:
        text: see `load_source`.
        out: the folder.
        size: height and width of the images; by default the network's own, or 224 where it names none.
        classes: of a zoo's network.
        channels: of the images; by default the network's own, or 3.
        divisor: narrower widths are multiples of it; 0 for 8, and for 4 below 64 channels.
        budget: of a later search in the space.

    Raises:
        Infeasible: no subnet is within the budget; nothing is written.
        ValueError: the folder is not empty, or the network cannot be loaded or converted.
    """
    hold(out)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"the folder {out} must be empty. Choose another one, or remove it.")
    for name, number in (("size", size), ("classes", classes), ("channels", channels)):
        check_value(name, number, Size | None)
    check_value("divisor", divisor, Side)
    source = load_source(text, size=size or 0, classes=classes)
    image = _image(source, size, channels)
    conversion = convert(source.module, image=image, name=_name(text), divisor=divisor)
    check_budget(conversion.space, Search(budget=budget))
    with new_folder(out) as new:
        write_text(new / SPACE, _toml(table_of(conversion.space)))
        save_tensors(new / WEIGHTS, conversion.supernet.state_dict())
        write_text(new / REPORT, f"{conversion}\n")
    return conversion


def _image(source: Source, size: int | None, channels: int | None) -> tuple[int, int, int]:
    """Channels, height and width of the images; where they were not chosen, a line says which they are."""
    own = source.preprocessing
    sides = (own.height, own.width) if own else declared_size(source.module)
    height, width = (size, size) if size else sides or (_SIZE, _SIZE)
    channels = channels or (len(own.mean) if own else 3)
    if not size:
        origin = "the network's own size" if sides else "the default: the network names no size"
        say(f"convert: images of {channels} x {height} x {width} ({origin}). Another: --size")
    return channels, height, width


def _name(text: str) -> str:
    """The space's name: the network's, or the folder's."""
    return Path(text.partition(":")[2].partition("@")[0].rpartition(":")[2]).name


def _toml(table: dict[str, Any]) -> str:
    return "".join(f"{name} = {_value(value)}\n" for name, value in table.items())


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{name} = {_value(inner)}" for name, inner in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    return json.dumps(value)  # numbers, strings and booleans are written alike
