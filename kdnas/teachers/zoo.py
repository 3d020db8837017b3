"""Teachers from student folders, torchvision, timm and functions of a user."""

import dataclasses
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
from torch import nn

from kdnas.preprocessing import Interpolation, Preprocessing
from kdnas.runs.checkpoint import save_tensors
from kdnas.runs.files import Damaged, current_folder, new_folder, read_json, write_json
from kdnas.runs.folder import MANIFEST, TEACHER, WEIGHTS, top_of
from kdnas.runs.places import portable
from kdnas.specs import Spec, check_literals, nearest
from kdnas.students.folder import read_student
from kdnas.tables import structure, unstructure
from kdnas.teachers.base import Frozen, Teacher
from kdnas.teachers.stages import ImagesRefused, check_logits
from kdnas.teachers.weights import load_weights as load_weights
from kdnas.teachers.weights import put_weights
from kdnas.values import Side

ZOO_CARD = "teacher.json"
_AGAIN = "Train the teacher again with `kdnas fit`."


class _ZooCard(TypedDict):
    zoo: Literal["torchvision", "timm"]
    name: str
    size: int
    preprocessing: dict[str, Any]
    class_names: list[str]


def student_teacher(path: str, classes: int | None, preprocessing: Preprocessing | None = None) -> Teacher:
    """The network of a student folder, of a folder of `kdnas fit`, or the teacher that a run trained, as a teacher.

    Any number of classes is accepted where `classes` is None.
    """
    del preprocessing
    folder = Path(path)
    if (folder / MANIFEST).is_file():
        folder = folder / TEACHER
        if not current_folder(folder).is_dir():
            raise ValueError(f"{path} has no finished teacher yet. Let the command that trains it finish.")
    if (current_folder(folder) / ZOO_CARD).is_file():
        return _from_folder(folder, classes)
    network, card = read_student(folder)
    teacher = _check_classes(Frozen(network, preprocessing=card.preprocessing), classes, path)
    teacher.class_names = card.class_names
    return teacher


def zoo_teacher(
    zoo: str,
    name: str,
    weights: str,
    classes: int,
    preprocessing: Preprocessing,
    stages: tuple[str, ...] = (),
    size: Side = 0,
    normalise: Literal["zoo", "data"] = "zoo",
    interpolation: Interpolation | Literal[""] = "",
) -> Teacher:
    """A network of torchvision or timm, with images of the size and normalisation that the zoo trains it with.

    With a weights file it is built for the data's classes and loads that file; without, it has the zoo's own pretrained
    weights (downloaded by the zoo if they are not in its cache).

    Args:
        zoo: `torchvision` or `timm`.
        name: the network's name there.
        weights: a file, see `load_weights`, or empty.
        classes: number of classes of the data.
        preprocessing: the data's.
        stages: submodules whose outputs are the features; by default those that `Frozen` finds.
        size: height and width of its images; 0 for the zoo's.
        normalise: by the mean and standard deviation of the zoo, or of the data.
        interpolation: how images are resized; empty for the zoo's way.

    Raises:
        ValueError: an unknown network, weights that cannot be loaded or do not fit, other classes.
    """
    check_literals(zoo_teacher, locals())
    if size < 0:
        raise ValueError(f"`size` must be at least 0, got {size}.")
    module, own = zoo_network(zoo, name, classes if weights else None, size)
    if weights:
        load_weights(module, Path(weights))
    if normalise == "data":
        own = dataclasses.replace(own, mean=preprocessing.mean, std=preprocessing.std)
    if interpolation:
        own = dataclasses.replace(own, interpolation=interpolation)
    teacher = Frozen(module, preprocessing=own, stages=stages or None, classes=classes)
    return _check_classes(teacher, classes, f"{zoo}:{name}")


def zoo_network(
    zoo: str, name: str, classes: int | None, size: int = 0, *, pretrained: bool = False
) -> tuple[nn.Module, Preprocessing]:
    """A network of torchvision or timm, and how it takes images.

    Args:
        zoo: `torchvision` or `timm`.
        name: the network's name there.
        classes: for how many classes; None for the zoo's pretrained weights with its own classes.
        size: height and width of its images; 0 for the zoo's.
        pretrained: begin with the zoo's weights, apart from the head.

    Raises:
        ValueError: an unknown network, or weights that cannot be downloaded.
    """
    make = _torchvision_network if zoo == "torchvision" else _timm_network
    module, own = make(name, classes, size, pretrained)
    return module, dataclasses.replace(own, height=size, width=size) if size else own


def _torchvision_network(
    name: str, classes: int | None, size: int, pretrained: bool
) -> tuple[nn.Module, Preprocessing]:
    from torchvision import models

    if name not in models.list_models():
        raise ValueError(f"torchvision has no {name!r}.{nearest(name, models.list_models())}")
    weights: Any = models.get_model_weights(name).DEFAULT  # type: ignore[attr-defined]
    transforms = weights.transforms()
    side = transforms.crop_size[0]
    if classes is None:
        module = _download(lambda: models.get_model(name, weights=weights), f"torchvision:{name}")
    else:
        sized = ({"image_size": size}, {"input_size": (size, size)}) if size not in (0, side) else ()
        module = _built(partial(models.get_model, name, weights=None, num_classes=classes), *sized)
        if pretrained:
            content = _download(lambda: weights.get_state_dict(progress=False), f"torchvision:{name}")
            put_weights(module, content, f"the pretrained weights of torchvision:{name}", new_head=True)
    kind = _interpolation(transforms.interpolation.value)
    mean, std = tuple(transforms.mean), tuple(transforms.std)
    return module, Preprocessing(height=side, width=side, mean=mean, std=std, interpolation=kind)


def _timm_network(name: str, classes: int | None, size: int, pretrained: bool) -> tuple[nn.Module, Preprocessing]:
    try:
        timm: Any = importlib.import_module("timm")
    except ImportError:
        raise ValueError("timm is not installed. Run: pip install 'kdnas[timm]'") from None
    if not timm.is_model(name):
        raise ValueError(f"timm has no {name!r}.{nearest(name.partition('.')[0], timm.list_models())}")
    options: dict[str, Any] = {"pretrained": pretrained or classes is None}
    options |= {} if classes is None else {"num_classes": classes}
    make = partial(timm.create_model, name, **options)
    module = _download(lambda: _built(make, *(({"img_size": size},) if size else ())), f"timm:{name}")
    config: Any = module.pretrained_cfg
    _, height, width = config["input_size"]
    kind = _interpolation(config["interpolation"])
    mean, std = tuple(config["mean"]), tuple(config["std"])
    return module, Preprocessing(height=height, width=width, mean=mean, std=std, interpolation=kind)


def _built(make: Callable[..., nn.Module], *sized: dict[str, Any]) -> nn.Module:
    """The module, made with the first of these arguments that it takes: only some networks are made for one size."""
    for options in sized:
        try:
            return make(**options)
        except TypeError:
            continue
    return make()


def _interpolation(name: str) -> Interpolation:
    """The nearest of the ways that there are here."""
    return "bilinear" if name in ("bilinear", "box", "hamming") else "nearest" if "nearest" in name else "bicubic"


def write_zoo_teacher(
    folder: Path, module: nn.Module, source: Mapping[str, Any], preprocessing: Preprocessing, names: Sequence[str]
) -> None:
    """Write a fine-tuned network as a folder that `student_teacher` reads: `teacher.json` and its weights.

    Args:
        folder: where to; it appears whole or not at all.
        module: the network.
        source: `zoo`, `name` and `size`, as `zoo_network` takes them, and plain JSON on its origin under `origin`.
        preprocessing: how it takes images.
        names: its classes.
    """
    card = {**source, "preprocessing": unstructure(preprocessing), "class_names": list(names)}
    with new_folder(folder) as new:
        write_json(new / ZOO_CARD, portable(card, folder, top_of(folder)))
        save_tensors(new / WEIGHTS, module.state_dict())


def _from_folder(folder: Path, classes: int | None) -> Teacher:
    current = current_folder(folder)
    card = read_json(current / ZOO_CARD, _ZooCard, _AGAIN)
    try:
        preprocessing = structure(card["preprocessing"], Preprocessing)
    except ValueError as error:
        raise Damaged(folder / ZOO_CARD, f"its 'preprocessing' is wrong: {error}", _AGAIN) from error
    names = tuple(card["class_names"])
    module, _ = zoo_network(card["zoo"], card["name"], len(names), card["size"])
    load_weights(module, current / WEIGHTS)
    teacher = Frozen(module, preprocessing=preprocessing, classes=len(names))
    teacher.class_names = names
    return _check_classes(teacher, classes, str(folder))


def own_teacher(function: str, classes: int, preprocessing: Preprocessing) -> Teacher:
    """The teacher that a user's function without arguments returns; see `as_frozen`."""
    return as_frozen(Spec(function).build(), function, classes, preprocessing)


def as_frozen(module: object, name: str, classes: int, preprocessing: Preprocessing) -> Teacher:
    """A Teacher, or a module that takes the data's images, as a frozen teacher.

    A module that fails on the data's size and says which size it was made for (a hub's `config.image_size`,
    torchvision's `image_size`, timm's `patch_embed.img_size`) gets that size.

    Raises:
        ValueError: it is no torch module, or has another number of classes.
    """
    if not isinstance(module, Teacher):
        if not isinstance(module, nn.Module):
            raise ValueError(f"{name} must return a torch module, it returned a {type(module).__name__}.")
        size = declared_size(module)
        try:
            module = Frozen(module, preprocessing=preprocessing, classes=classes)
            module.assumes_size = True
        except ImagesRefused:
            if size is None or size == (preprocessing.height, preprocessing.width):
                raise
            own = dataclasses.replace(preprocessing, height=size[0], width=size[1])
            module = Frozen(module, preprocessing=own, classes=classes)
            module.assumes_size = True
    return _check_classes(module.freeze(), classes, name)


def declared_size(module: nn.Module) -> tuple[int, int] | None:
    """Height and width of the images that a network says it was made for; None where it says nothing.

    Read are `config.image_size`, `image_size` and `patch_embed.img_size`; then the second and third entry of
    `pretrained_cfg["input_size"]`; of the network, then of the modules right inside of it.
    """
    for value in (value for part in (module, *module.children()) for value in _sizes(part)):
        size = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, tuple | list) else ()
        if len(size) == 2 and all(isinstance(side, int) for side in size):
            return size[0], size[1]
    return None


def _sizes(module: nn.Module) -> Iterator[Any]:
    yield getattr(getattr(module, "config", None), "image_size", None)
    yield getattr(module, "image_size", None)
    yield getattr(getattr(module, "patch_embed", None), "img_size", None)
    config = getattr(module, "pretrained_cfg", None)
    yield tuple(config.get("input_size", ()))[1:] if isinstance(config, Mapping) else None


def declared_names(module: nn.Module) -> tuple[str, ...] | None:
    """The names of a network's classes, in the order of its logits; None where it has none.

    Read are a hub's `config.id2label`, unless it numbers them (`LABEL_0`), then the attributes `class_names` and
    `classes`; of the network, then of the modules right inside of it.
    """
    for names in (names for part in (module, *module.children()) for names in _class_lists(part)):
        if isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names):
            return None if names[0] == "LABEL_0" else tuple(names)
    return None


def _class_lists(module: nn.Module) -> Iterator[Any]:
    labels = getattr(getattr(module, "config", None), "id2label", None)
    if isinstance(labels, Mapping) and all(str(key).isdecimal() for key in labels):
        yield [labels[key] for key in sorted(labels, key=int)]
    yield getattr(module, "class_names", None)
    yield getattr(module, "classes", None)


def _download(make: Callable[[], Any], name: str) -> Any:
    try:
        return make()
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"pretrained weights of {name} are not in the local cache and cannot be downloaded ({error}). "
            f"Name a weights file: {name}@WEIGHTS."
        ) from error


def _check_classes(teacher: Teacher, classes: int | None, name: str) -> Teacher:
    preprocessing = getattr(teacher, "preprocessing", None)
    if preprocessing is not None and classes is not None:
        device = next((p.device for p in teacher.parameters()), torch.device("cpu"))
        probe = torch.zeros(2, len(preprocessing.mean), preprocessing.height, preprocessing.width, device=device)
        logits = teacher(probe).logits
        check_logits(logits, len(probe), name)
        outputs = logits.shape[1]
        if outputs == 1 and classes == 2:
            raise ValueError(
                f"the teacher {name} has 1 output, the data 2 classes. Return two logits: torch.cat([0 * x, x], 1)."
            )
        if outputs != classes:
            raise ValueError(
                f"the teacher {name} has {outputs} classes, the data {classes}. Fine-tune it on this data: kdnas fit "
                "--network NETWORK --data DATA --out FOLDER; then --teacher FOLDER."
            )
    return teacher
