"""Programs of torch.export as teachers."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, final

import torch
from torch import Tensor, nn

from kdnas.plain import reason
from kdnas.preprocessing import Preprocessing
from kdnas.runtimes import silenced
from kdnas.teachers.base import Frozen, Teacher
from kdnas.teachers.feeding import Normalisation, fed
from kdnas.teachers.weights import members_of
from kdnas.teachers.zoo import with_classes_of

_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def export_teacher(
    path: str,
    classes: int,
    preprocessing: Preprocessing,
    stages: tuple[str, ...] = (),
    normalise: Normalisation = "data",
    select: str = "",
    class_names: tuple[str, ...] = (),
    dense: bool = False,
) -> Teacher:
    """A program that `torch.export.save` wrote, of a network in evaluation mode, as a teacher.

    Its modules keep their names, so that its stages are those of the network. Images have the program's size; where it
    takes one number of images only, a batch is cut into calls of that many.

    A file of torch.export is a program: torch makes Python code of its graph. Objects that would run while they are
    read are refused, but open only files whose authors you trust.

    Args:
        path: the `.pt2` file.
        classes: number of the data's classes.
        preprocessing: the data's.
        stages: submodules whose outputs are the features; by default those that `Frozen` finds.
        normalise: how its images are normalised, which the file does not say; see `fed`.
        select: the program's class of each of the data's, see `columns_of`.
        class_names: the data's.
        dense: whether it answers for every pixel.

    Raises:
        ValueError: no such file, none of torch.export or a damaged one, a program that takes something else than one
            batch of images, or other classes.
    """
    name = f"export:{path}"
    program = _program(Path(path), name)
    batch, shape = _input(program, name)
    own = fed(shape, preprocessing, normalise, name)
    teacher = Frozen(
        Program(program), preprocessing=own, stages=stages or None, classes=classes, batch=batch, dense=dense
    )
    teacher.note = f"batches of {batch}" if batch else "batches of any size"
    return with_classes_of(teacher, name, classes, class_names, select)


@final
class Program(nn.Module):
    """An exported program as a module with the submodules that it was exported from.

    Args:
        program: of `torch.export.load`.
    """

    def __init__(self, program: Any) -> None:
        super().__init__()
        self.network = torch.export.unflatten(program)

    def train(self, mode: bool = True) -> Self:
        """What it does is fixed: it was exported in one mode."""
        self.training = mode
        return self

    def forward(self, images: Tensor) -> Any:
        """What the program returns."""
        return self.network(images)


def _program(path: Path, name: str) -> Any:
    if not path.is_file():
        raise ValueError(f"there is no file {path}. Write it with torch.export.save(program, PATH).")
    if not members_of(path):
        raise ValueError(
            f"{path} is damaged, or no file of torch.export. Write it with torch.export.save(program, PATH)."
        )
    try:
        with _only_weights(), silenced():
            return torch.export.load(path)
    except Exception as error:  # of a foreign file, anything
        raise ValueError(
            f"{name} cannot be loaded ({reason(error, named=True)}). Write it again with torch.export.save, with this "
            "version of torch."
        ) from error


@contextmanager
def _only_weights() -> Iterator[None]:
    """Inside, torch reads tensors and plain values only: torch.export would fall back to any pickle."""
    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = before


def _input(program: Any, name: str) -> tuple[int, tuple[int, int, int]]:
    """The number of images in a call (0 for any), and channels, height and width."""
    names = program.graph_signature.user_inputs
    values = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    if len(values) != 1 or not isinstance(values[0], Tensor) or values[0].dim() != 4:
        given = ", ".join(str(tuple(v.shape)) if isinstance(v, Tensor) else type(v).__name__ for v in values)
        raise ValueError(f"{name} must take one batch of images [batch, channels, height, width], it takes ({given}).")
    batch, *image = values[0].shape
    if not all(isinstance(side, int) for side in image):
        raise ValueError(
            f"{name} must take images of one size, its height or width is free. Export it with a fixed size."
        )
    return (batch if isinstance(batch, int) else 0), (image[0], image[1], image[2])
