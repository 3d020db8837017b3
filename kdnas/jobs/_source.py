"""The trained network that a student is cut out of."""

import copy
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from kdnas.conversion.convert import convert
from kdnas.conversion.export import check_forward
from kdnas.data.base import Data
from kdnas.jobs.convert import LogitMaps, Plain, load_source
from kdnas.network import Network
from kdnas.preprocessing import Preprocessing
from kdnas.randomness import initialised
from kdnas.spaces.converted import Converted
from kdnas.supernet import Supernet
from kdnas.teachers.base import Frozen, Teacher


class Source(NamedTuple):
    """A network as a supernet of its subnets.

    Attributes:
        space: its largest network is the source.
        supernet: with the source's weights.
        preprocessing: how images become its input.
    """

    space: Converted
    supernet: Supernet
    preprocessing: Preprocessing


def load(text: str, teacher: Teacher | None, data: Data, seed: int) -> Source:
    """The source as a supernet.

    Args:
        text: `teacher` for the teacher's own network, `checkpoint:FOLDER`, or as `kdnas convert` takes it.
        teacher: needed for `teacher`.
        data: gives the classes, and the size of a zoo's network.
        seed: of fresh weights, where the source has no others.

    Raises:
        ValueError: the teacher is not one network, the source cannot be converted or is a transformer, or it has other
            classes or another input size than the data.
    """
    module, preprocessing = _module(text, teacher, data, seed)
    fed_as(data, preprocessing)
    if data.task.dense:
        module = module if isinstance(module, Plain) else LogitMaps(module, data.classes)
        check_forward(module, data.image, dense=True)
    conversion = convert(module, image=data.image, needs_choices=False)
    if conversion.space.dense != data.task.dense:
        raise ValueError(
            f"the source {text} must answer for whole images, as the task {data.task.name} needs, got one for every "
            "pixel."
        )
    if conversion.space.classes != data.classes:
        raise ValueError(
            f"the source {text} has {conversion.space.classes} classes, the data {data.classes}. Use a network of this "
            "data's classes."
        )
    if not isinstance(conversion.space, Converted):
        raise ValueError(
            f"channels are removed from convolutions, but the source {text} is a vision transformer. Make it elastic "
            "with `kdnas convert` and search its subnets."
        )
    return Source(conversion.space, conversion.supernet, preprocessing)


def _module(text: str, teacher: Teacher | None, data: Data, seed: int) -> tuple[nn.Module, Preprocessing]:
    if text != "teacher":
        build = partial(load_source, text, size=data.image[1], classes=data.classes)
        module, own = initialised(build, seed)
        return module, own if own and text.startswith("checkpoint:") else data.preprocessing
    if not isinstance(teacher, Frozen):
        raise ValueError(
            "the teacher must be one network to be cut down, got several. Name the network by --source, such as "
            "checkpoint:FOLDER."
        )
    module = teacher.module
    plain = Plain(module) if isinstance(module, Network) else module
    return copy.deepcopy(plain), teacher.preprocessing


def fed_as(data: Data, preprocessing: Preprocessing) -> Data:
    """The same images, normalised as a trained network expects them.

    Raises:
        ValueError: the network is for images of another size or other channels.
    """
    own: Any = data.preprocessing
    if own == preprocessing:
        return data
    sizes = [(len(p.mean), p.height, p.width) for p in (own, preprocessing)]
    if sizes[0] != sizes[1]:
        texts = [" x ".join(map(str, size)) for size in sizes]
        raise ValueError(
            f"the network was trained on images of {texts[1]} (channels, height, width), the data has {texts[0]}. "
            f"Load the data at that size (DATA,size={min(sizes[1][1:])}), or name the size it was trained on "
            "(NAME@W,size=N)."
        )
    data = copy.copy(data)
    object.__setattr__(data, "preprocessing", preprocessing)
    return data
