"""A data set by its name on the command line."""

import dataclasses
import difflib
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from kdnas.data.augmentation import Augmentation
from kdnas.data.base import Data
from kdnas.data.builtin import digits
from kdnas.data.cifar import cifar10, cifar100
from kdnas.data.folders import folder
from kdnas.data.lanes import culane, tusimple
from kdnas.data.masks import masks
from kdnas.data.roads import roads
from kdnas.data.sources import csv, hf, npz, parquet, wds
from kdnas.plain import typed_path
from kdnas.specs import Spec, check_typed, nearest, resolve, spec, split_options

LOADERS: Mapping[str, tuple[Callable[..., Data], str]] = {
    "digits": (digits, ""),
    "folder": (folder, "PATH"),
    "masks": (masks, "PATH"),
    "culane": (culane, "PATH"),
    "tusimple": (tusimple, "PATH"),
    "roads": (roads, "COUNT"),
    "hf": (hf, "FOLDER_OR_NAME"),
    "parquet": (parquet, "FILES"),
    "wds": (wds, "FILES"),
    "csv": (csv, "FILE"),
    "npz": (npz, "FILE"),
    "cifar10": (cifar10, "PATH"),
    "cifar100": (cifar100, "PATH"),
}
"""By name, the loader and what follows the name after a colon."""
FORMS = tuple(f"{name}:{more}" if more else name for name, (_, more) in LOADERS.items())
_FORMS = f"{', '.join(FORMS)}, package.module:function or strong:TEXT"


def strong(data: Spec) -> Data:
    """The same data under strong augmentation, for the teacher as for the student: `strong:SPEC`.

    Distortion may make a label wrong; the teacher's logits on the distorted image then are the better target. The loss
    `top_k_distillation` uses its most likely classes only.

    Reference: Wei et al., Circumventing Outliers of AutoAugment with Knowledge Distillation, ECCV 2020.
    """
    loaded: Data = data.build(Data)
    stronger: Augmentation = "strong_crop_flip" if loaded.augmentation.endswith("crop_flip") else "strong_shift"
    return dataclasses.replace(loaded, augmentation=stronger)


def load_data(text: str, **options: object) -> Spec:
    """The Spec of a data set by its name on the command line.

    Args:
        text: `digits`, `folder:PATH`, `masks:PATH` (for segmentation), `culane:PATH`, `tusimple:PATH` and `roads:COUNT`
            (for lanes), `hf:FOLDER_OR_NAME` of the library datasets, `parquet:FILES`, `wds:FILES` of webdataset,
            `csv:FILE`, `npz:FILE`, `cifar10:PATH`, `cifar100:PATH`, or `package.module:function`; `strong:TEXT` is
            one of them under strong augmentation. Arguments of the loader follow as in `folder:PATH,size=64`.
        **options: arguments of the loader, such as `size`.

    Raises:
        ValueError: another form, or an unknown argument; the nearest is offered.

    Example:
        >>> load_data("folder:pets,size=32").make
        'kdnas.data.folders:folder'
        >>> data = load_data("digits").build()
        >>> len(data.train), data.classes, data.image
        (880, 10, (1, 8, 8))
    """
    kind, _, rest = text.partition(":")
    if kind == "strong" and rest.startswith("strong:"):
        raise ValueError("strong must be named once: data under strong augmentation cannot be augmented more strongly.")
    if kind == "strong" and rest:
        return spec(strong, data=load_data(rest, **options))
    name, typed = _typed(text)
    kind, colon, path = name.partition(":")
    if kind in LOADERS:
        if kind != "digits" and not path:
            what, form = ("number of images", "COUNT") if kind == "roads" else ("path", "PATH")
            raise ValueError(f"{kind} must have a {what}: {kind}:{form}.")
        if kind == "digits" and colon:
            raise ValueError(f"digits has no path, got {text!r}.")
        place = typed_path(path)
        is_name = kind == "hf" and not place.exists() and not path.startswith((".", "/", "~"))
        paths = {} if kind in ("digits", "roads") else {"path": path if is_name else str(place.resolve())}
        if kind == "roads":
            typed |= split_options(f"_,count={path}")[1]
        source = spec(LOADERS[kind][0], **paths, **typed, **options)
    elif path.isidentifier() and not difflib.get_close_matches(kind, LOADERS, cutoff=0.8):
        try:
            resolve(name)
        except ValueError as error:
            if "." in kind:
                raise
            raise ValueError(f"{error} Data are {_FORMS}.") from error
        source = spec(name, **typed, **options)
    else:
        near = (
            f" Did you mean folder:{text}?" if text and Path(text).is_dir() else nearest(kind, LOADERS) if kind else ""
        )
        raise ValueError(f"data must be {_FORMS}, got {text!r}.{near}")
    check_typed(name, source.make, {**typed, **options})
    return source


def _typed(text: str) -> tuple[str, dict[str, object]]:
    """The text before `,key=value`, and these arguments; a path may have commas."""
    name = re.sub(r"(,\w+=[^,/]*)+$", "", text)
    return name, split_options("_" + text[len(name) :])[1]
