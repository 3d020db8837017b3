"""Teachers from student folders, torchvision, timm and functions of a user."""

import contextlib
import dataclasses
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypedDict, final

import torch
from torch import Tensor, nn

from kdnas.plain import reason
from kdnas.preprocessing import Interpolation, Preprocessing
from kdnas.runs.checkpoint import save_tensors
from kdnas.runs.files import Damaged, current_folder, new_folder, read_json, write_json
from kdnas.runs.folder import MANIFEST, TEACHER, WEIGHTS, top_of
from kdnas.runs.places import portable
from kdnas.runtimes import library
from kdnas.specs import Spec, check_literals, nearest
from kdnas.students.folder import read_student
from kdnas.tables import structure, unstructure
from kdnas.teachers.base import Frozen, Teacher
from kdnas.teachers.classes import columns_of, same_names
from kdnas.teachers.stages import ImagesRefused, check_logits
from kdnas.teachers.timm_folder import built, interpolation_of, timm_folder, timm_preprocessing
from kdnas.teachers.weights import head_size, put_weights
from kdnas.teachers.weights import load_weights as load_weights
from kdnas.values import Share, Side, shown

ZOO_CARD = "teacher.json"
_ANY = 2  # classes of a network whose classifier is not used
_AGAIN = "Train the teacher again with `kdnas fit`."


class _ZooCard(TypedDict):
    zoo: Literal["torchvision", "timm"]
    name: str
    size: int
    preprocessing: dict[str, Any]
    class_names: list[str]


def student_teacher(
    path: str,
    classes: int | None,
    preprocessing: Preprocessing | None = None,
    class_names: tuple[str, ...] = (),
    select: str = "",
) -> Teacher:
    """The network of a student folder, of a folder of `kdnas fit`, or the teacher that a run trained, as a teacher.

    Any number of classes is accepted where `classes` is None; for `select` see `columns_of`.
    """
    del preprocessing
    folder = Path(path)
    if (folder / MANIFEST).is_file():
        folder = folder / TEACHER
        if not current_folder(folder).is_dir():
            raise ValueError(f"{path} has no finished teacher yet. Let the command that trains it finish.")
    if (current_folder(folder) / ZOO_CARD).is_file():
        teacher = _from_folder(folder)
    else:
        network, card = read_student(folder)
        teacher = Frozen(network, preprocessing=card.preprocessing)
        teacher.class_names = card.class_names if card.answers == "classes" else None
    if classes == 0 and isinstance(teacher, Frozen) and teacher.class_names:
        teacher = teacher.without_classifier()
    return with_classes_of(teacher, path, classes, class_names, select)


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
    crop: Share = 0.0,
    select: str = "",
    class_names: tuple[str, ...] = (),
) -> Teacher:
    """A network of torchvision or timm, with images of the size and normalisation that the zoo trains it with.

    Networks for segmentation (of torchvision) answer for every pixel; they see the whole image in the proportion that
    it has, its shorter side in the size that the zoo trains with.

    With a weights file it is built for the data's classes, or with `select` for those of the file, and loads that file;
    without, it has the zoo's own pretrained weights (downloaded by the zoo if they are not in its cache).

    Args:
        zoo: `torchvision` or `timm`.
        name: the network's name there; of timm also a folder with `config.json` and `model.safetensors`, as timm's
            `save_for_hf` writes it.
        weights: a file, see `load_weights`, or empty.
        classes: number of classes of the data.
        preprocessing: the data's.
        stages: submodules whose outputs are the features; by default those that `Frozen` finds.
        size: height and width of its images, of a network for segmentation the shorter side; 0 for the zoo's.
        normalise: by the mean and standard deviation of the zoo, or of the data.
        interpolation: how images are resized; empty for the zoo's way.
        crop: share of the images' sides that it sees, around their centre; 0 for the zoo's share with the zoo's weights
            or a folder's, and all with those of a file.
        select: the network's class of each of the data's, see `columns_of`; empty to go by the names.
        class_names: the data's.

    Raises:
        ValueError: an unknown network, weights that cannot be loaded or do not fit, other classes.
    """
    check_literals(zoo_teacher, locals())
    if size < 0:
        raise ValueError(f"`size` must be at least 0, got {size}.")
    module, own = _network_for(zoo, name, weights, classes, size, other_head=bool(select))
    has_classes = getattr(module, "num_classes", None) != 0  # timm's word for a network without a classifier
    if classes and not has_classes:
        raise ValueError(
            f"{zoo}:{name} has no classes. Distil its features by --unlabelled, or fine-tune it: kdnas fit --network "
            f"{zoo}:NAME --data DATA --out FOLDER."
        )
    if normalise == "data":
        own = dataclasses.replace(own, mean=preprocessing.mean, std=preprocessing.std)
    if interpolation:
        own = dataclasses.replace(own, interpolation=interpolation)
    names = None if weights else zoo_names(zoo, name, module)
    count = None if names is None else len(names)
    dense = is_segmenter(zoo, name)
    if dense:
        own = whole(own, preprocessing, crop, f"{zoo}:{name}")
    crop = crop or (1.0 if weights or dense else zoo_crop(zoo, name, module))
    known = count or classes or None if has_classes else 0
    teacher = Frozen(module, preprocessing=own, stages=stages or None, classes=known, crop=crop, dense=dense)
    if has_classes and not classes:
        teacher = teacher.without_classifier()
    return with_classes_of(teacher, f"{zoo}:{name}", classes, class_names, select, names)


def _network_for(
    zoo: str, name: str, weights: str, classes: int, size: int, *, other_head: bool
) -> tuple[nn.Module, Preprocessing]:
    """The network of a zoo with the zoo's weights or those of a file.

    Its head is for the data's classes, with `other_head` for those of the file, and for features of either kind.
    """
    if not weights:
        return zoo_network(zoo, name, None, size)
    path = Path(weights)
    if zoo == "timm" and not classes:
        module, own = zoo_network(zoo, name, 0, size)
        with contextlib.suppress(ValueError):  # what is wrong with the file the other head says
            load_weights(module, path)
            return module, own
    module, own = zoo_network(zoo, name, classes or _ANY, size)
    if (other_head or not classes) and (count := head_size(module, path)):
        module, own = zoo_network(zoo, name, count, size)
    load_weights(module, path)
    return module, own


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


def zoo_names(zoo: str, name: str, module: nn.Module) -> tuple[str, ...] | None:
    """The names of a pretrained network's classes; None where the zoo has none."""
    if zoo == "torchvision":
        models: Any = importlib.import_module("torchvision.models")
        return tuple(models.get_model_weights(name).DEFAULT.meta["categories"])
    config: Any = getattr(module, "pretrained_cfg", {})
    if config.get("label_names"):
        return tuple(config["label_names"])
    data: Any = importlib.import_module("timm.data")
    subset = data.infer_imagenet_subset(module)
    if subset is None:
        return None
    info = data.ImageNetInfo(subset)
    # Class folders may be named by the numbers of WordNet.
    return tuple(f"{info.index_to_label_name(i)}, {info.index_to_description(i)}" for i in range(info.num_classes()))


def is_segmenter(zoo: str, name: str) -> bool:
    """Whether a network of a zoo answers for every pixel."""
    from torchvision import models

    return zoo == "torchvision" and name in models.list_models(module=models.segmentation)


def whole(own: Preprocessing, data: Preprocessing, crop: float, name: str) -> Preprocessing:
    """The preprocessing of a network for segmentation: the data's proportion, with its own shorter side.

    Args:
        own: of the network, whose shorter side counts.
        data: of the data.
        crop: what a person asks for; only the whole image (0 or 1) will do.
        name: the network's, for messages.

    Raises:
        ValueError: another crop.
    """
    if crop not in (0, 1):
        raise ValueError(f"{name} answers for every pixel, and must see all of them, got crop={crop:g}. Drop it.")
    scale = min(own.height, own.width) / min(data.height, data.width)
    return dataclasses.replace(own, height=round(data.height * scale), width=round(data.width * scale))


def zoo_crop(zoo: str, name: str, module: nn.Module) -> float:
    """The share of the images' sides that a zoo's network sees where its accuracy is measured."""
    if zoo == "timm":
        config: Any = module.pretrained_cfg
        return min(1.0, float(config.get("crop_pct") or 1.0))
    models: Any = importlib.import_module("torchvision.models")
    transforms = models.get_model_weights(name).DEFAULT.transforms()
    return min(1.0, transforms.crop_size[0] / transforms.resize_size[0])


def _torchvision_network(
    name: str, classes: int | None, size: int, pretrained: bool
) -> tuple[nn.Module, Preprocessing]:
    from torchvision import models

    if name not in models.list_models():
        raise ValueError(f"torchvision has no {shown(name)}.{nearest(name, models.list_models())}")
    weights: Any = models.get_model_weights(name).DEFAULT  # type: ignore[attr-defined]
    transforms, dense = weights.transforms(), is_segmenter("torchvision", name)
    side = (transforms.resize_size if dense else transforms.crop_size)[0]
    if classes is None:
        module = _download(lambda: models.get_model(name, weights=weights), f"torchvision:{name}")
        if dense:
            module.aux_classifier = None  # for the training with labels only
    else:
        # A backbone is downloaded otherwise.
        options = {"weights_backbone": None} if dense else {}
        sized = ({"image_size": size}, {"input_size": (size, size)}) if size not in (0, side) else ()
        module = built(partial(models.get_model, name, weights=None, num_classes=classes, **options), *sized)
        if pretrained:
            content = _download(lambda: weights.get_state_dict(progress=False), f"torchvision:{name}")
            put_weights(module, content, f"the pretrained weights of torchvision:{name}", new_head=True)
    kind = interpolation_of(transforms.interpolation.value)
    mean, std = tuple(transforms.mean), tuple(transforms.std)
    return module, Preprocessing(height=side, width=side, mean=mean, std=std, interpolation=kind)


def _timm_network(name: str, classes: int | None, size: int, pretrained: bool) -> tuple[nn.Module, Preprocessing]:
    timm = library("timm", "timm", "timm")
    if Path(name).is_dir():
        return timm_folder(Path(name), classes, size)
    if not timm.is_model(name):
        raise ValueError(f"timm has no {shown(name)}.{nearest(name.partition('.')[0], timm.list_models())}")
    options: dict[str, Any] = {"pretrained": pretrained or classes is None}
    options |= {} if classes is None else {"num_classes": classes}
    make = partial(timm.create_model, name, **options)
    module = _download(lambda: built(make, *(({"img_size": size},) if size else ())), f"timm:{name}")
    return module, timm_preprocessing(module)


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


def _from_folder(folder: Path) -> Teacher:
    current = current_folder(folder)
    card = read_json(current / ZOO_CARD, _ZooCard, _AGAIN)
    try:
        preprocessing = structure(card["preprocessing"], Preprocessing)
    except ValueError as error:
        raise Damaged(folder / ZOO_CARD, f"its 'preprocessing' is wrong: {error}", _AGAIN) from error
    names = tuple(card["class_names"])
    module, _ = zoo_network(card["zoo"], card["name"], len(names), card["size"])
    load_weights(module, current / WEIGHTS)
    dense = is_segmenter(card["zoo"], card["name"])
    teacher = Frozen(module, preprocessing=preprocessing, classes=len(names), dense=dense)
    teacher.class_names = names
    return teacher


def own_teacher(
    function: str,
    classes: int,
    preprocessing: Preprocessing,
    class_names: tuple[str, ...] = (),
    select: str = "",
    dense: bool = False,
) -> Teacher:
    """The teacher that a user's function without arguments returns; see `as_frozen`."""
    return as_frozen(Spec(function).build(), function, classes, preprocessing, class_names, select, dense=dense)


def as_frozen(
    module: object,
    name: str,
    classes: int,
    preprocessing: Preprocessing,
    class_names: tuple[str, ...] = (),
    select: str = "",
    *,
    dense: bool = False,
) -> Teacher:
    """A Teacher, or a module or another callable that takes the data's images, as a frozen teacher.

    A module that fails on the data's size and says which size it was made for (a hub's `config.image_size`,
    torchvision's `image_size`, timm's `patch_embed.img_size`) gets that size. With `dense` its logits are maps.

    Raises:
        ValueError: it is no torch module and cannot be called, or has other classes.
    """
    if not isinstance(module, Teacher):
        if not callable(module) or isinstance(module, type):
            raise ValueError(
                f"{name} must return a torch module, or a function of images, it returned a {type(module).__name__}."
            )
        module = module if isinstance(module, nn.Module) else Function(module)
        size, stages = declared_size(module), () if isinstance(module, Function) else None
        options = {"classes": classes, "dense": dense or None}
        try:
            module = Frozen(module, preprocessing=preprocessing, stages=stages, **options)
            module.assumes_size = True
        except ImagesRefused:
            if size is None or size == (preprocessing.height, preprocessing.width):
                raise
            own = dataclasses.replace(preprocessing, height=size[0], width=size[1])
            module = Frozen(module, preprocessing=own, **options)
            module.assumes_size = True
    names = declared_names(module.module) if isinstance(module, Frozen) else None
    return with_classes_of(module.freeze(), name, classes, class_names, select, names)


@final
class Function(nn.Module):
    """A function of images as a module; it shows no feature maps, unless it returns Outputs.

    Args:
        function: from images `[batch, channels, height, width]` to logits or Outputs.
    """

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Any:
        """What the function returns."""
        return self.function(images)


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
            f"pretrained weights of {name} are not in the local cache and cannot be downloaded ({reason(error)}). "
            f"Name a weights file: {name}@WEIGHTS."
        ) from error


def with_classes_of(
    teacher: Teacher,
    name: str,
    classes: int | None,
    class_names: tuple[str, ...] = (),
    select: str = "",
    names: tuple[str, ...] | None = None,
) -> Teacher:
    """The teacher, giving logits of the data's classes in their order.

    Args:
        teacher: a Frozen, or another whose outputs are taken as they are.
        name: for messages.
        classes: number of the data's classes; None to take whatever there are, 0 for features.
        class_names: the data's.
        select: see `columns_of`.
        names: what the network calls its classes, where the teacher itself does not know; None if unknown.

    Raises:
        ValueError: other classes, see `columns_of`, or logits of another shape.
    """
    if classes == 0:
        return _with_features(teacher, name, select)
    preprocessing = getattr(teacher, "preprocessing", None)
    if preprocessing is None or classes is None:
        if select:
            raise ValueError(f"`select` must be of a teacher of one network, {name} is a {type(teacher).__name__}.")
        return teacher
    probe = _probe(teacher, preprocessing)
    logits = teacher(probe).logits
    check_logits(logits, len(probe), name, dense=isinstance(teacher, Frozen) and teacher.dense)
    known = teacher.class_names or names
    known = known if known is None or len(known) == logits.shape[1] else None
    columns = columns_of(name, logits.shape[1], known, class_names, classes, select)
    if not columns:
        if known and same_names(known, class_names):
            teacher.class_names = class_names
        return teacher
    if not isinstance(teacher, Frozen):
        raise ValueError(
            f"the teacher {name} must have the data's classes in their order: of a {type(teacher).__name__} they "
            "cannot be chosen. Return its logits in that order."
        )
    teacher.columns, teacher.class_names = columns, class_names or None
    which = "its classes in the data's order"
    if len(columns) < logits.shape[1]:
        which = f"{len(columns)} of its {logits.shape[1]} classes"
    chosen = f"{which}, {'as chosen' if select else 'by their names'}"
    teacher.note = "; ".join(filter(None, (teacher.note, chosen)))
    return teacher


def _with_features(teacher: Teacher, name: str, select: str) -> Teacher:
    """The teacher, if it gives one vector of features for each image.

    Raises:
        ValueError: it gives something else, or classes are chosen.
    """
    if select:
        raise ValueError(f"`select` names classes, and {name} teaches features. Drop it, or --unlabelled.")
    if isinstance(teacher, Frozen):
        probe = _probe(teacher, teacher.preprocessing)
        features = teacher(probe).logits
        if features.dim() != 2 or len(features) != len(probe) or features.shape[1] < 2:
            raise ValueError(
                f"the teacher {name} must give features [batch, dims], at least 2, got {tuple(features.shape)} for "
                f"{len(probe)} images. Return one vector for each image, tokens or a map."
            )
        teacher.class_names = None
    return teacher


def _probe(teacher: Teacher, preprocessing: Preprocessing) -> Tensor:
    """Two black images of the teacher's size, where it is."""
    device = next((p.device for p in teacher.parameters()), torch.device("cpu"))
    return torch.zeros(2, len(preprocessing.mean), preprocessing.height, preprocessing.width, device=device)
