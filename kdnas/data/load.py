"""A data set by its name on the command line."""

import dataclasses
from pathlib import Path

from kdnas.data.augmentation import Augmentation
from kdnas.data.base import Data
from kdnas.data.builtin import digits
from kdnas.data.cifar import cifar10, cifar100
from kdnas.data.folders import folder
from kdnas.specs import Spec, nearest, resolve, spec


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
        text: `digits`, `folder:PATH`, `cifar10:PATH`, `cifar100:PATH`, or `package.module:function`; `strong:TEXT` is
            one of them under strong augmentation.
        **options: arguments of the loader, such as `size`.

    Raises:
        ValueError: another form; the nearest is offered.

    Example:
        >>> load_data("folder:pets", size=32).make
        'kdnas.data.folders:folder'
        >>> data = load_data("digits").build()
        >>> len(data.train), data.classes, data.image
        (880, 10, (1, 8, 8))
    """
    kind, _, path = text.partition(":")
    if kind == "strong" and path:
        return spec(strong, data=load_data(path, **options))
    loaders = {"digits": digits, "folder": folder, "cifar10": cifar10, "cifar100": cifar100}
    if kind in loaders:
        if kind == "digits":
            return spec(digits, **options)
        if not path:
            raise ValueError(f"{kind} must have a path: {kind}:PATH.")
        return spec(loaders[kind], path=str(Path(path).resolve()), **options)
    if path.isidentifier():
        resolve(text)
        return spec(text, **options)
    raise ValueError(
        f"data must be digits, folder:PATH, cifar10:PATH, cifar100:PATH, package.module:function or strong:TEXT, "
        f"got {text!r}." + (nearest(kind, loaders) if kind else "")
    )
