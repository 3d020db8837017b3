"""Image classifiers and segmenters of transformers, from a folder or by their name on the hub."""

import dataclasses
import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, final

import numpy as np
import torch
from torch import Tensor, nn

from kdnas.plain import reason
from kdnas.preprocessing import Preprocessing
from kdnas.runtimes import library
from kdnas.teachers.base import Frozen, Teacher
from kdnas.teachers.zoo import declared_names, with_classes_of
from kdnas.values import Share, Side

_RAMP = 448  # pixels; a fine step for the share that a centre crop leaves
_WAYS = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # numbers of Pillow


def hf_teacher(
    path: str,
    classes: int,
    preprocessing: Preprocessing,
    stages: tuple[str, ...] = (),
    size: Side = 0,
    normalise: Literal["model", "data"] = "model",
    crop: Share = 0.0,
    select: str = "",
    class_names: tuple[str, ...] = (),
) -> Teacher:
    """An image classifier of transformers as a teacher, or one of every pixel, with the preprocessing stored beside it.

    A model for semantic segmentation sees the whole image, in its proportion where its preprocessing keeps that; its
    logits are enlarged to the images' height and width (bilinear).

    Weights are read from safetensors only, and code beside them is never run (`trust_remote_code=False`).

    Args:
        path: a folder as `save_pretrained` writes it, or a name on the hub, which is downloaded where it is not in the
            hub's cache.
        classes: number of the data's classes.
        preprocessing: the data's.
        stages: submodules whose outputs are the features; by default those that `Frozen` finds.
        size: height and width of its images; 0 for its own.
        normalise: by the mean and standard deviation of the model, or of the data.
        crop: share of the images' sides that it sees, around their centre; 0 for the model's share.
        select: the model's class of each of the data's, see `columns_of`; empty to go by the names.
        class_names: the data's.

    Raises:
        ValueError: transformers is not installed, there is no such model, it is none of images, it needs code of its
            own or weights that are missing, or it has other classes.
    """
    name = f"hf:{path}"
    module, config = _network(path, features=classes == 0)
    dense = _is_segmenter(config)
    feeding = _feeding(path, config, size or preprocessing.height, size, preprocessing if dense else None)
    own = feeding.preprocessing
    if dense and crop not in (0, 1):
        raise ValueError(f"{name} answers for every pixel, and must see all of them, got crop={crop:g}. Drop it.")
    if normalise == "data":
        own = dataclasses.replace(own, mean=preprocessing.mean, std=preprocessing.std)
    fed = Exchanged(module) if feeding.exchanged else module
    names = [f"module.{stage}" for stage in stages] if feeding.exchanged else stages
    count = config.num_labels if dense or _is_classifier(config) else 0
    crop = 1.0 if dense else crop or feeding.crop
    teacher = Frozen(fed, preprocessing=own, stages=names or None, classes=count, crop=crop, dense=dense)
    if count and not classes:
        teacher = teacher.without_classifier()
    teacher.note = feeding.note
    return with_classes_of(teacher, name, classes, class_names, select, declared_names(fed))


@final
class Exchanged(nn.Module):
    """A network that takes blue, green and red, fed with red, green and blue.

    Args:
        module: the network.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> Any:
        """What the module returns."""
        return self.module(images.flip(1))


def _is_classifier(config: Any) -> bool:
    return "ForImageClassification" in next(iter(config.architectures or ()), "")


def _is_segmenter(config: Any) -> bool:
    return "ForSemanticSegmentation" in next(iter(config.architectures or ()), "")


def _network(path: str, *, features: bool) -> tuple[nn.Module, Any]:
    """The classifier or segmenter, or where features are asked for a backbone too, and its configuration."""
    with _speaking(path) as transformers:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
    architecture = next(iter(config.architectures or ()), "")
    if config.model_type == "timm_wrapper":
        raise ValueError(f"hf:{path} is a network of timm. Use timm:{path if Path(path).is_dir() else 'NAME'}.")
    if not (features or _is_classifier(config) or _is_segmenter(config)):
        raise ValueError(
            f"hf:{path} must be an image classifier, it is a {architecture or config.model_type}. Distil its features "
            "by --unlabelled, or fine-tune it as a model ...ForImageClassification or ...ForSemanticSegmentation."
        )
    kind, options = "AutoModelForImageClassification", {"trust_remote_code": False}
    if _is_segmenter(config):
        kind = "AutoModelForSemanticSegmentation"
    elif not _is_classifier(config):
        kind = "AutoModel"
    if architecture.endswith("Backbone"):
        kind, options = architecture, {}  # a class of the library: there is no automatic one for folders
    with _speaking(path) as transformers:
        module, loading = getattr(transformers, kind).from_pretrained(
            path, config=config, use_safetensors=True, output_loading_info=True, **options
        )
    absent = sorted({*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])})
    if absent:
        raise ValueError(
            f"hf:{path} has no weights of {len(absent)} tensors of its {architecture}, such as {absent[0]}. Save the "
            "whole model with save_pretrained."
        )
    return module.float().eval(), config


@contextmanager
def _speaking(path: str) -> Iterator[Any]:
    """The library; inside, what it says in its errors becomes a sentence, and it logs no tables and bars."""
    transformers = library("transformers", "transformers", "hf")
    log: Any = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    hub = logging.getLogger("huggingface_hub.utils._http")
    before = hub.level
    try:
        log.set_verbosity_error()
        log.disable_progress_bar()
        hub.setLevel(logging.ERROR)
        yield transformers
    except Exception as error:  # of other people's files, anything
        folder = Path(path).is_dir()
        fix = (
            "It must hold config.json and model.safetensors, as save_pretrained writes them"
            if folder
            else "Give a folder, or where there is internet run: hf download NAME --local-dir FOLDER"
        )
        raise ValueError(f"hf:{path} cannot be loaded ({reason(error, named=True).rstrip('.')}). {fix}.") from error
    finally:
        log.set_verbosity(level)
        hub.setLevel(before)
        if bars:
            log.enable_progress_bar()


class _Feeding(NamedTuple):
    """How a model takes images: preprocessing, crop, whether red and blue are exchanged, and where this is from."""

    preprocessing: Preprocessing
    crop: float
    exchanged: bool
    note: str


def _feeding(path: str, config: Any, usual: int, size: int, shape: Preprocessing | None = None) -> _Feeding:
    """What a model's image processor does, measured on black, coloured and graded images.

    The size is `size`, unless that is 0, and `usual` where the model says none. Images are squares, unless a shape
    gives their proportion; `size` then is the shorter side. The processor's many options come down
    to an affine map per channel, a resize and a centre crop, whatever their names.
    """
    with _speaking(path) as transformers:
        try:
            processor, note = transformers.AutoImageProcessor.from_pretrained(path, trust_remote_code=False), ""
        except OSError:
            processor, note = _usual(config, usual)
    with _speaking(path):
        sides = (1, 1) if shape is None else (shape.height, shape.width)
        rows, columns = (_RAMP * side // min(sides) for side in sides)
        black, ramp = np.zeros((rows, columns, 3), np.uint8), np.zeros((rows, columns, 3), np.uint8)
        ramp[:] = np.linspace(0, 255, columns)[None, :, None]
        colours = [np.where(np.arange(3) == c, 255, 0).astype(np.uint8) + black for c in range(3)]
        zero, *tinted, graded = (_processed(processor, image) for image in (black, *colours, ramp))
        offsets = zero.mean((1, 2))
        gains = torch.stack([image.mean((1, 2)) - offsets for image in tinted])  # [input channel, output channel]
        exchanged = bool(gains[0, 2].abs() > gains[0, 0].abs())
        scale = (gains.flip(0) if exchanged else gains).diagonal()
        height, width = zero.shape[1:]
        share = _steepness((graded - zero)[0].mean(0) / scale[0]) * width
        mean, std = (-offsets / scale).tolist(), (1 / scale).tolist()
    if size:
        height, width = (round(size * side / min(sides)) for side in sides)
    kind: Any = _WAYS.get(int(getattr(processor, "resample", None) or 2), "bilinear")
    own = Preprocessing(
        height=height,
        width=width,
        mean=tuple(round(value, 6) + 0.0 for value in mean),  # no -0
        std=tuple(round(value, 6) for value in std),
        interpolation=kind,
    )
    return _Feeding(own, 1.0 if share > 0.99 else round(share, 3), exchanged, note)


def _steepness(values: Tensor) -> float:
    """The slope of a row of values by least squares, without the tenth at either end."""
    inner = values[len(values) // 10 : len(values) - len(values) // 10].double()
    places = torch.arange(len(inner)) - (len(inner) - 1) / 2
    return float((places * inner).sum() / places.square().sum())


def _processed(processor: Any, image: np.ndarray) -> Tensor:
    return processor(images=image, return_tensors="pt")["pixel_values"][0].float()


def _usual(config: Any, usual: int) -> tuple[Any, str]:
    """What the model's kind takes by default, at its own image size, where no processor was saved with it."""
    module: Any = importlib.import_module("transformers.models.auto.image_processing_auto")
    known = module.IMAGE_PROCESSOR_MAPPING[type(config)]
    kind = known["torchvision"] or known["pil"] if isinstance(known, dict) else known[-1] or known[0]
    side = getattr(config, "image_size", None) or usual
    side = side[0] if isinstance(side, list | tuple) else side
    options = {"size": {"height": side, "width": side}, "do_center_crop": False}
    if "crop_pct" in kind.__init__.__annotations__ or hasattr(kind, "crop_pct"):
        options |= {"size": {"shortest_edge": side}, "crop_pct": 1.0}
    return kind(**options), f"no preprocessor_config.json: as a {kind.__name__} does by default"
