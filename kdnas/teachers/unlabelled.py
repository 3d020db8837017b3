"""Data whose labels are not learnt from: a network learns the features of a teacher."""

import dataclasses
from typing import final

import torch
from torch import Tensor

from kdnas.data.assembly import NO_CLASS, without_labels
from kdnas.data.base import Data, Images
from kdnas.network import default_device
from kdnas.preprocessing import Preprocessing
from kdnas.specs import Spec
from kdnas.tasks.features import Neighbours, Similarity
from kdnas.teachers.base import Teacher, made_for
from kdnas.teachers.combined import Joined

_AT_ONCE = 50  # images in a call of the teacher


def unlabelled(data: Spec, teacher: Spec, widths: tuple[int, ...]) -> Data:
    """The same data for the task of learning a teacher's features; see `kdnas.tasks.features`.

    Labels, where there are any, are for measuring only (`Neighbours`). Where there are none, the label of an image of
    the search or the test part is the teacher's vector for it (`Similarity`).

    Args:
        data: makes the data, with class labels or without labels.
        teacher: makes the teacher.
        widths: numbers of its features, one for each member of an ensemble.
    """
    with without_labels():
        plain: Data = data.build(Data)
    names = tuple(f"feature {number}" for number in range(sum(widths)))
    if plain.class_names != (NO_CLASS,):
        return dataclasses.replace(plain, class_names=names, task=Neighbours(widths))
    module = made_for(teacher, 0, plain.preprocessing).to(default_device())
    search, test = (_Labelled(part, vectors_of(module, part)) for part in (plain.search, plain.test))
    return dataclasses.replace(plain, search=search, test=test, class_names=names, task=Similarity(widths))


def widths_of(source: Spec, preprocessing: Preprocessing) -> tuple[int, ...]:
    """Numbers of features that a teacher without classes gives, one for each member of an ensemble.

    Args:
        source: makes the teacher.
        preprocessing: the data's.
    """
    teacher = made_for(source, 0, preprocessing).to(default_device())
    image = (len(preprocessing.mean), preprocessing.height, preprocessing.width)
    pixels = torch.zeros(2, *image, device=default_device())
    members = teacher.teachers if isinstance(teacher, Joined) else (teacher,)
    return tuple(member(pixels).logits.shape[1] for member in members)


def vectors_of(teacher: Teacher, part: Images) -> Tensor:
    """A teacher's vector for each image of a part, `[images, dims]`."""
    device = default_device()
    return torch.cat([teacher(pixels.to(device)).logits.cpu() for pixels, _ in part.batches(_AT_ONCE)])


@final
class _Labelled(Images):
    """The images of a part with other labels, which follow from them: the digest is that of the part."""

    def __init__(self, part: Images, labels: Tensor) -> None:
        self.part, self.labels = part, labels

    def take(self, indices: Tensor) -> Tensor:
        """The part's images."""
        return self.part.take(indices)

    def digest(self) -> str:
        """The part's."""
        return self.part.digest()
