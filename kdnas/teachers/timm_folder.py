"""Networks in folders as timm writes them: `config.json` and `model.safetensors`."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from kdnas.preprocessing import Interpolation, Preprocessing
from kdnas.runs.files import read_json
from kdnas.specs import nearest
from kdnas.teachers.weights import load_weights
from kdnas.values import shown

CONFIG, TENSORS = "config.json", "model.safetensors"
_FIX = "Write it with timm.models.save_for_hf(network, FOLDER, safe_serialization=True)."
_LOADING = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "features_only"}
"""Arguments of timm's that load other files, or make another kind of network."""


def timm_folder(folder: Path, classes: int | None, size: int = 0) -> tuple[nn.Module, Preprocessing]:
    """The network of a folder that timm's `save_for_hf` wrote, and how it takes images.

    Args:
        folder: with `config.json` and `model.safetensors`; files of pickles are not read.
        classes: the number of the folder's own classes, or None.
        size: height and width of its images; 0 for the configuration's.

    Raises:
        ValueError: a file is missing or damaged, timm has no such network, the weights do not fit, or other classes are
            asked for.
    """
    import timm

    for file in (CONFIG, TENSORS):
        if not (folder / file).is_file():
            raise ValueError(f"{folder} has no {file}. {_FIX}")
    config: Any = read_json(folder / CONFIG, dict[str, Any], _FIX, is_signed=False)
    name, feeding = config.get("architecture"), config.get("pretrained_cfg") or config
    if not isinstance(name, str) or not timm.is_model(name):
        raise ValueError(
            f"timm has no {shown(name)}, which {folder / CONFIG} names.{nearest(str(name), timm.list_models())}"
        )
    count = config.get("num_classes", feeding.get("num_classes"))
    if classes not in (None, count):
        fix = "Fine-tune another one." if count else "Distil its features by --unlabelled."
        raise ValueError(f"{folder} is a network of {count} classes, got {classes}. {fix}")
    options = {key: value for key, value in (config.get("model_args") or {}).items() if key not in _LOADING}
    make = partial(timm.create_model, name, **{**options, "num_classes": count, "pretrained": False})
    module: Any = built(make, *({"img_size": size},) if size else ())
    module.pretrained_cfg = {**module.pretrained_cfg, **feeding, "label_names": config.get("label_names")}
    load_weights(module, folder / TENSORS)
    return module, timm_preprocessing(module)


def timm_preprocessing(module: nn.Module) -> Preprocessing:
    """How a network of timm takes images, by its `pretrained_cfg`; its crop is left to the caller."""
    config: Any = module.pretrained_cfg
    _, height, width = config["input_size"]
    kind = interpolation_of(config["interpolation"])
    mean, std = tuple(config["mean"]), tuple(config["std"])
    return Preprocessing(height=height, width=width, mean=mean, std=std, interpolation=kind)


def built(make: Callable[..., nn.Module], *sized: dict[str, Any]) -> nn.Module:
    """The module, made with the first of these arguments that it takes: only some networks are made for one size."""
    for options in sized:
        try:
            return make(**options)
        except TypeError:
            continue
    return make()


def interpolation_of(name: str) -> Interpolation:
    """The nearest of the ways that there are here."""
    return "bilinear" if name in ("bilinear", "box", "hamming") else "nearest" if "nearest" in name else "bicubic"
