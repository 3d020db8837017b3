"""A student as a module that takes images, for Python programs."""

from pathlib import Path
from typing import final

from torch import Tensor, nn

from kdnas.blocks.basic import resize
from kdnas.data.base import normalise
from kdnas.network import Network
from kdnas.students.folder import Card, read_student
from kdnas.trust import trusting


@final
class Student(nn.Module):
    """A trained student with its preprocessing: images in [0, 1] to logits `[batch, classes]`.

    Args:
        network: takes normalised images.
        card: describes the student.
    """

    def __init__(self, network: Network, card: Card) -> None:
        super().__init__()
        self.network, self.card = network, card

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name per logit."""
        return self.card.class_names

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images `[batch, channels, height, width]`, float in [0, 1], of any height and width."""
        p = self.card.preprocessing
        pixels = images if self.card.blueprint.dense else resize(images, p.height, p.width)
        logits = self.network(normalise(pixels, p)).logits
        assert isinstance(logits, Tensor)
        return logits


def load_student(folder: str | Path, *, trust: bool = False) -> Student:
    """The student of a folder, in evaluation mode; its `student.py` is not executed.

    Args:
        folder: as `kdnas export` and `kdnas retrain` write it.
        trust: build layers that are not kdnas's own.

    Raises:
        Untrusted: its card names such layers; see `kdnas.trust.admit`.
        ValueError: a file is missing, damaged, or belongs to another student.

    Example:
        >>> load_student("no/such/folder")
        Traceback (most recent call last):
        ValueError: there is no student no/such/folder. Write one with `kdnas export`.
    """
    with trusting(trust):
        return Student(*read_student(folder)).eval()
