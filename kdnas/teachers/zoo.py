"""Teachers from student folders, torchvision, timm and functions of the user."""

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdnas.preprocessing import Preprocessing
from kdnas.specs import Spec, nearest
from kdnas.teachers.base import Frozen, Teacher


def student_teacher(path: str, classes: int, preprocessing: Preprocessing) -> Teacher:
    """A student folder, or the teacher that a run trained, as a teacher."""
    from kdnas.students.folder import read_student  # student knows teachers' floor, not the other way round

    del preprocessing
    network, card = read_student(Path(path))
    teacher = _checked(Frozen(network, preprocessing=card.preprocessing), classes, path)
    teacher.class_names = card.class_names
    return teacher


def zoo_teacher(
    zoo: str, name: str, weights: str, classes: int, preprocessing: Preprocessing, stages: tuple[str, ...] = ()
) -> Teacher:
    """A network of torchvision or timm, showing the submodules named, or those that `Frozen` finds.

    With a weights file it is built for the data's classes and filled from it; without, the zoo's own pretrained
    weights are used (downloaded by the zoo when they are not in its cache) with their own preprocessing.

    Raises:
        ValueError: no such network, weights that cannot be had or do not fit, other classes.
    """
    if zoo == "torchvision":
        from torchvision import models

        if name not in models.list_models():
            raise ValueError(f"torchvision has no {name!r}.{nearest(name, models.list_models())}")
        if weights:
            module = models.get_model(name, weights=None, num_classes=classes)
        else:
            chosen: Any = next(iter(models.get_model_weights(name)))
            chosen = type(chosen).DEFAULT
            module = _downloaded(lambda: models.get_model(name, weights=chosen), f"torchvision:{name}")
            ready = chosen.transforms()
            side = ready.crop_size[0]
            preprocessing = Preprocessing(height=side, width=side, mean=tuple(ready.mean), std=tuple(ready.std))
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
            module = _downloaded(lambda: timm.create_model(name, pretrained=True), f"timm:{name}")
            own: Any = module.pretrained_cfg
            _, height, width = own["input_size"]
            preprocessing = Preprocessing(height=height, width=width, mean=own["mean"], std=own["std"])
    if weights:
        load_weights(module, Path(weights))
    return _checked(Frozen(module, preprocessing=preprocessing, stages=stages or None), classes, f"{zoo}:{name}")


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
    return _checked(module.freeze(), classes, name)


def load_weights(module: nn.Module, path: Path) -> None:
    """Fill a module from a safetensors file, strictly.

    Raises:
        ValueError: no such file, another format, or weights of another network.
    """
    import safetensors
    from safetensors.torch import load_file

    if path.suffix != ".safetensors":
        raise ValueError(f"weights are read from safetensors files only, which hold no code, got {path.name}.")
    if not path.is_file():
        raise ValueError(f"there is no weights file {path}.")
    try:
        module.load_state_dict(load_file(path), strict=True)
    except (safetensors.SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path} does not fit the network: {str(error).splitlines()[0]}") from error


def _downloaded(make: Any, what: str) -> nn.Module:
    try:
        return make()
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"the pretrained weights of {what} are not in the local cache and cannot be downloaded ({error}). "
            f"Give a weights file: {what}@weights.safetensors."
        ) from error


def _checked(teacher: Teacher, classes: int, what: str) -> Teacher:
    preprocessing = getattr(teacher, "preprocessing", None)
    if preprocessing is not None:
        probe = torch.zeros(2, len(preprocessing.mean), preprocessing.height, preprocessing.width)
        found = teacher(probe).logits.shape[1]
        if found != classes:
            raise ValueError(
                f"the teacher {what} knows {found} classes, the data has {classes}. Fine-tune it on this data first, "
                "or use --teacher fit."
            )
    return teacher
