"""Teachers from student folders, torchvision, timm and functions of a user."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdnas.network import load_strictly
from kdnas.preprocessing import Preprocessing
from kdnas.specs import Spec, nearest
from kdnas.students.folder import read_student
from kdnas.teachers.base import Frozen, Teacher


def student_teacher(path: str, classes: int, preprocessing: Preprocessing) -> Teacher:
    """The network of a student folder, or the teacher that a run trained, as a teacher."""
    del preprocessing
    network, card = read_student(Path(path))
    teacher = _check_classes(Frozen(network, preprocessing=card.preprocessing), classes, path)
    teacher.class_names = card.class_names
    return teacher


def zoo_teacher(
    zoo: str, name: str, weights: str, classes: int, preprocessing: Preprocessing, stages: tuple[str, ...] = ()
) -> Teacher:
    """A network of torchvision or timm.

    With a weights file it is built for the data's classes and loads that file; without, it has the zoo's own pretrained
    weights (downloaded by the zoo if they are not in its cache) and their preprocessing.

    Args:
        zoo: `torchvision` or `timm`.
        name: the network's name there.
        weights: a safetensors file, or empty.
        classes: number of classes of the data.
        preprocessing: the data's, for a network with a weights file.
        stages: submodules whose outputs are the features; by default those that `Frozen` finds.

    Raises:
        ValueError: an unknown network, weights that cannot be downloaded or do not fit, other classes.
    """
    if zoo == "torchvision":
        from torchvision import models

        if name not in models.list_models():
            raise ValueError(f"torchvision has no {name!r}.{nearest(name, models.list_models())}")
        if weights:
            module = models.get_model(name, weights=None, num_classes=classes)
        else:
            pretrained: Any = models.get_model_weights(name)
            module = _download(lambda: models.get_model(name, weights=pretrained.DEFAULT), f"torchvision:{name}")
            transforms = pretrained.DEFAULT.transforms()
            side = transforms.crop_size[0]
            mean, std = tuple(transforms.mean), tuple(transforms.std)
            preprocessing = Preprocessing(height=side, width=side, mean=mean, std=std)
    else:
        try:
            timm: Any = importlib.import_module("timm")
        except ImportError:
            raise ValueError("timm is not installed. Run: pip install 'kdnas[timm]'") from None
        if name not in timm.list_models():
            raise ValueError(f"timm has no {name!r}.{nearest(name, timm.list_models())}")
        if weights:
            module = timm.create_model(name, pretrained=False, num_classes=classes)
        else:
            module = _download(lambda: timm.create_model(name, pretrained=True), f"timm:{name}")
            config: Any = module.pretrained_cfg
            _, height, width = config["input_size"]
            preprocessing = Preprocessing(height=height, width=width, mean=config["mean"], std=config["std"])
    if weights:
        load_weights(module, Path(weights))
    return _check_classes(Frozen(module, preprocessing=preprocessing, stages=stages or None), classes, f"{zoo}:{name}")


def own_teacher(function: str, classes: int, preprocessing: Preprocessing) -> Teacher:
    """The teacher that a user's function without arguments returns; see `as_frozen`."""
    return as_frozen(Spec(function).build(), function, classes, preprocessing)


def as_frozen(module: object, name: str, classes: int, preprocessing: Preprocessing) -> Teacher:
    """A Teacher, or a module that takes the student's images, as a frozen teacher.

    Raises:
        ValueError: it is no torch module, or has another number of classes.
    """
    if not isinstance(module, Teacher):
        if not isinstance(module, nn.Module):
            raise ValueError(f"{name} must return a torch module, it returned a {type(module).__name__}.")
        module = Frozen(module, preprocessing=preprocessing)
    return _check_classes(module.freeze(), classes, name)


def load_weights(module: nn.Module, path: Path) -> None:
    """Load a module's weights from a safetensors file, strictly.

    Raises:
        ValueError: no such file, another format, or weights of another network.
    """
    import safetensors
    from safetensors.torch import load_file

    if path.suffix != ".safetensors":
        raise ValueError(f"weights are read from safetensors files only, which contain no code, got {path.name}.")
    if not path.is_file():
        raise ValueError(f"no weights file {path}.")
    try:
        state = load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file ({error}). Write or copy it again.") from error
    load_strictly(module, state, str(path))


def _download(make: Callable[[], nn.Module], name: str) -> nn.Module:
    try:
        return make()
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"pretrained weights of {name} are not in the local cache and cannot be downloaded ({error}). "
            f"Name a weights file: {name}@weights.safetensors."
        ) from error


def _check_classes(teacher: Teacher, classes: int, name: str) -> Teacher:
    preprocessing = getattr(teacher, "preprocessing", None)
    if preprocessing is not None:
        probe = torch.zeros(2, len(preprocessing.mean), preprocessing.height, preprocessing.width)
        outputs = teacher(probe).logits.shape[1]
        if outputs != classes:
            raise ValueError(
                f"the teacher {name} has {outputs} classes, the data {classes}. Fine-tune it on this data first, "
                "or use --teacher fit."
            )
    return teacher
