"""Images with a mask each: one class per pixel."""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kdnas.data.assembly import check_roles, role_of, split_images
from kdnas.data.base import Data, TensorImages
from kdnas.data.files import SUFFIXES, each_of, opened, pixels_of
from kdnas.plain import reason
from kdnas.tasks.segmentation import MOST, VOID, Segmentation
from kdnas.values import Level, Seed, Side

CLASSES = "classes.txt"
_IMAGES = ("images", "image", "img", "imgs", "jpegimages", "leftimg8bit")
_MASKS = ("masks", "mask", "labels", "annotations", "segmentationclass", "gtfine", "gt")
_VOC = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
    "pottedplant sheep sofa train tvmonitor"
).split()
_CITYSCAPES = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light",
    20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car", 27: "truck",
    28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle",
}  # fmt: skip
"""Names by the numbers of `labelIds`; the others are void."""


class _Classes(NamedTuple):
    """The classes of a data set.

    Attributes:
        names: of the classes.
        numbers: class by the value of a mask's pixel; None for the value itself.
        colours: class by colour; empty where masks hold indices.
        void: further values that are void.
    """

    names: tuple[str, ...]
    numbers: Mapping[int, int] | None
    colours: Mapping[tuple[int, int, int], int]
    void: frozenset[int]


def masks(
    path: str, height: Side = 0, width: Side = 0, void: Level = 255, seed: Seed = 0, weighted: bool = False
) -> Data:
    """Images and masks in folders, of VOC, or of Cityscapes, for segmentation.

    Recognised are

    - `images/` and `masks/` (also `labels`, `annotations`), with one file name each but for the suffix; both may hold
      `train`, `val` and `test` folders, or lie in such folders;
    - VOC: `JPEGImages`, `SegmentationClass`, `ImageSets/Segmentation/train.txt`, `val.txt`, `test.txt`;
    - Cityscapes: `leftImg8bit/train/CITY/*_leftImg8bit.png` and `gtFine/train/CITY/*_gtFine_labelIds.png`.

    The parts are those of `folder`: without some of them a fifth of the images is for test, a tenth of the rest for
    search. A mask is a PNG whose pixels are class numbers (also in a palette), or colours. Classes and colours are the
    lines of `classes.txt`: `NAME` in the order of the numbers, or `NAME R G B`; a line whose name is `void` says which
    number or colour is void. Without that file classes are named by their numbers. A test part of Cityscapes without
    labels, as it is published, is left out.

    Args:
        path: the folder.
        height: of the images; 0 for their own, which then must be one. Images are resized bicubically, masks by the
            nearest pixel.
        width: of the images; 0 for their own.
        void: number of pixels that are left out, beside those that `classes.txt` calls void.
        seed: random seed of the split.
        weighted: weigh each class in the loss by the square root of the ratio of the median class's pixels to its own.

    Raises:
        ValueError: no such layout, two folders or lists of one part, an image without mask or the other way round, two
            images with one mask, a mask of another size than its image or with a number or colour that is no class, or
            void alone, images of several sizes, a class without a training pixel, one class alone, or a file that
            cannot be read.
    """
    root = Path(path)
    if not root.is_dir():
        raise ValueError(f"there is no folder {root}. Use a folder that holds images/ and masks/.")
    pairs, recognised = _pairs(root)
    classes = _classes(root, recognised, void)
    note = ""
    if recognised == "Cityscapes" and pairs.get("test"):
        if not any(_is_labelled(mask, classes) for _, mask in pairs["test"]):
            del pairs["test"]
            note = "the test part, which has no labels, is left out"
    parts, cut = split_images(pairs, seed)
    loaded = {role: _Part.read(files, classes, (height, width)) for role, files in parts.items()}
    shapes = {tuple(part.images.shape[1:3]) for part in loaded.values()}
    if len(shapes) > 1:
        raise ValueError(
            f"images must have one size, got {sorted(shapes)}. Add height=H,width=W, to which they are resized."
        )
    names = classes.names or tuple(str(i) for i in range(1 + max(int(part.masks.max()) for part in loaded.values())))
    for part in loaded.values():
        part.check()
    _check_names(names, loaded["train"].masks)
    weights = _weights(loaded["train"].masks, len(names)) if weighted else ()
    task = Segmentation(class_weights=weights)
    return Data(
        **{
            role: TensorImages(part.images.permute(0, 3, 1, 2).contiguous(), part.masks, task)
            for role, part in loaded.items()
        },
        class_names=names,
        augmentation="crop_flip",
        source="; ".join(filter(None, (recognised, f"{sum(map(len, parts.values()))} images with masks", note, cut))),
        task=task,
    )


class _Part(NamedTuple):
    """A part's images `[count, height, width, 3]`, masks `[count, height, width]`, and the masks' files."""

    images: Tensor
    masks: Tensor
    files: tuple[Path, ...]

    @classmethod
    def read(cls, pairs: Sequence[tuple[Path, Path]], classes: _Classes, size: tuple[int, int]) -> "_Part":
        """Decode images and masks."""
        images, masks_ = [], []
        decoded = each_of(lambda pair: _decoded(pair[0], pair[1], classes, size), pairs)
        for (image, _), (pixels, labels) in zip(pairs, decoded, strict=True):
            if images and pixels.shape != images[0].shape:
                raise ValueError(
                    f"images must have one size, {pairs[0][0]} has {images[0].shape[0]} x {images[0].shape[1]}, "
                    f"{image} {pixels.shape[0]} x {pixels.shape[1]}. Add height=H,width=W, to which they are resized."
                )
            images.append(pixels)
            masks_.append(labels)
        return cls(
            torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(masks_)), tuple(mask for _, mask in pairs)
        )

    def check(self) -> None:
        """Raise a ValueError, with the file, for a mask of void alone."""
        for file, mask in zip(self.files, self.masks, strict=True):
            if bool((mask == VOID).all()):
                raise ValueError(f"{file} is void alone. Remove it and its image.")


def _check_names(names: Sequence[str], masks_: Tensor) -> None:
    """Raise a ValueError for fewer than two classes, or one without a training pixel, that says how to name others."""
    there = {*masks_.unique().tolist()} - {VOID}
    if len(there) < 2:
        only = names[int(min(there))]
        raise ValueError(
            f"masks must show at least 2 classes, the training masks show {only!r} and void alone. Where a void "
            f"number, such as 255, is a class, name the classes in {CLASSES} by their colours: NAME 255 255 255."
        )
    absent = next((name for number, name in enumerate(names) if number not in there), None)
    if absent is not None:
        raise ValueError(
            f"every class must have training pixels, {absent!r} has none. Add images that show it, or name the classes "
            f"that there are in {CLASSES}: a line each in the order of their numbers, and `void` for a number that is "
            "none."
        )


def _decoded(image: Path, mask: Path, classes: _Classes, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """An image as uint8 and its mask as int16."""
    with opened(image) as picture:
        pixels = (pixels_of(picture, "RGB").transpose(1, 2, 0) * 255).round().astype(np.uint8)
    with opened(mask) as picture:
        picture.load()
        labels = picture.copy()
    rows, columns = pixels.shape[:2]
    if labels.size != (columns, rows):
        raise ValueError(
            f"{mask} must have the size of its image {image}, {columns} x {rows}, got {labels.width} x {labels.height}."
        )
    numbers, height, width = _numbers(labels, classes, mask), size[0] or rows, size[1] or columns
    if (height, width) != (rows, columns):
        pixels = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))
        numbers = np.asarray(Image.fromarray(numbers).resize((width, height), Image.Resampling.NEAREST))
    return pixels, numbers.astype(np.int16)


def _is_labelled(mask: Path, classes: _Classes) -> bool:
    """Whether a mask has a pixel that is not void."""
    with opened(mask) as picture:
        picture.load()
        return bool((_numbers(picture, classes, mask) != VOID).any())


def _numbers(picture: Image.Image, classes: _Classes, file: Path) -> np.ndarray:
    """The class of each pixel, or VOID, as int32."""
    if classes.colours:
        return _of_colours(np.asarray(picture.convert("RGB")), classes, file)
    if picture.mode not in ("P", "L", "I;16", "I", "1"):
        raise ValueError(
            f"{file} must hold class numbers in one channel, got the mode {picture.mode}. Give the colours of the "
            f"classes in {CLASSES}: NAME R G B on each line."
        )
    values = np.asarray(picture).astype(np.int32)
    void = np.isin(values, list(classes.void))
    known = values[~void]
    table = classes.numbers or {number: number for number in range(len(classes.names) or MOST)}
    wrong = known[~np.isin(known, list(table))]
    if wrong.size:
        usual = f"0 to {len(classes.names) - 1}" if classes.numbers is None else ", ".join(map(str, sorted(table)))
        fix = f"the classes are {usual}" if classes.names else f"there can be at most {MOST} classes"
        raise ValueError(
            f"{file} has the number {int(wrong[0])}, {fix}. Name its class in {CLASSES}, or make it void by "
            f"void={int(wrong[0])}."
        )
    result = np.full(values.shape, VOID, np.int32)
    places = np.zeros(max(table) + 1, np.int32)
    places[list(table)] = list(table.values())
    result[~void] = places[known]
    return result


def _of_colours(pixels: np.ndarray, classes: _Classes, file: Path) -> np.ndarray:
    codes = pixels.astype(np.int32) @ np.array([65536, 256, 1], np.int32)
    result = np.full(codes.shape, -1, np.int32)
    for colour, number in classes.colours.items():
        result[codes == int(np.array(colour) @ np.array([65536, 256, 1]))] = number
    unknown = np.argwhere(result == -1)
    if len(unknown):
        row, column = unknown[0]
        raise ValueError(
            f"{file} has the colour {tuple(pixels[row, column].tolist())} at row {row}, column {column}, which is no "
            f"class of {CLASSES}. Add it there, as void perhaps."
        )
    return result


def _classes(root: Path, recognised: str, void: int) -> _Classes:
    """What the pixels of masks mean."""
    text = root / CLASSES
    if text.is_file():
        return _listed(text, void)
    if recognised == "Cityscapes":
        numbers = {number: place for place, number in enumerate(_CITYSCAPES)}
        return _Classes(tuple(_CITYSCAPES.values()), numbers, {}, frozenset({*range(34), void} - {*numbers}))
    if recognised == "VOC":
        return _Classes(tuple(_VOC), None, {}, frozenset({void}))
    return _Classes((), None, {}, frozenset({void}))


def _listed(text: Path, void: int) -> _Classes:
    """The classes of `classes.txt`."""
    names, colours, voids = [], {}, {void}
    lines = [line.strip() for line in _text(text).splitlines() if line.strip()]
    for number, line in enumerate(lines):
        match = re.fullmatch(r"(.*?)\s+(\d{1,9})\s+(\d{1,9})\s+(\d{1,9})", line, re.ASCII)
        name = match[1] if match else line
        place = VOID if name == "void" else len(names)
        if match:
            colour = (int(match[2]), int(match[3]), int(match[4]))
            if max(colour) > 255 or colour in colours:
                raise ValueError(f"{text} must have different colours of 0 to 255, got {line!r}.")
            colours[colour] = place
        elif name == "void":
            voids.add(number)
        if name != "void":
            names.append(name)
    if colours and len(colours) != len(lines):
        raise ValueError(f"{text} must have a colour on every line or on none. Write NAME R G B.")
    if len(names) < 2:
        raise ValueError(f"{text} must name at least 2 classes, got {len(names)}.")
    skipped = sorted(voids - {void})
    if skipped and not colours:  # the numbers of classes after a void line
        numbers = {n: i for i, n in enumerate(n for n in range(len(lines)) if n not in skipped)}
        return _Classes(tuple(names), numbers, {}, frozenset(voids))
    return _Classes(tuple(names), None, colours, frozenset(voids))


def _text(file: Path) -> str:
    """The text of a file."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read as UTF-8 text ({reason(error)}). Write it anew.") from error


def _pairs(root: Path) -> tuple[dict[str, list[tuple[Path, Path]]], str]:
    """Images with their masks by part, and the name of the layout."""
    folders = {folder.name.lower(): folder for folder in sorted(root.iterdir()) if folder.is_dir()}
    images = next((folders[name] for name in _IMAGES if name in folders), None)
    targets = next((folders[name] for name in _MASKS if name in folders), None)
    if images is not None and targets is not None:
        lists = root / "ImageSets" / "Segmentation"
        if lists.is_dir():
            return {role: list(_of_list(file, images, targets)) for file, role in _lists(lists).items()}, "VOC"
        layout = "Cityscapes" if targets.name.lower() == "gtfine" else "images and masks"
        inside = _roles(images)
        if not inside:
            return {"train": list(_matched(images, targets))}, layout
        return {role: list(_matched(folder, targets / folder.name)) for folder, role in inside.items()}, layout
    parts = _roles(root)
    if "train" not in parts.values():
        raise ValueError(
            f"{root} must hold images/ and masks/, VOC's JPEGImages and SegmentationClass, or Cityscapes' leftImg8bit "
            f"and gtFine, got {', '.join(folders) or 'no folders'}."
        )
    return {role: [*chain(*_pairs(folder)[0].values())] for folder, role in parts.items()}, "images and masks"


def _roles(root: Path) -> dict[Path, str]:
    """The folders inside that are parts; each part is one."""
    roles = {folder: role for folder in sorted(root.iterdir()) if folder.is_dir() and (role := role_of(folder.name))}
    check_roles(root, roles)
    return roles


def _lists(folder: Path) -> dict[Path, str]:
    """VOC's lists of parts; each part has one."""
    lists = {file: role for file in sorted(folder.glob("*.txt")) if (role := role_of(file.stem))}
    check_roles(folder, lists, "list")
    return lists


def _of_list(file: Path, images: Path, targets: Path) -> Iterator[tuple[Path, Path]]:
    for name in _text(file).split():
        image, mask = images / f"{name}.jpg", targets / f"{name}.png"
        missing = next((path for path in (image, mask) if not path.is_file()), None)
        if missing is not None:
            raise ValueError(f"{file} names {name}, but there is no {missing}.")
        yield image, mask


def _matched(images: Path, targets: Path) -> Iterator[tuple[Path, Path]]:
    """Each image below a folder with the mask of its name, in the same folder within."""
    files = sorted(targets.rglob("*.png")) if targets.is_dir() else []
    masks_ = {_name(mask, targets): mask for mask in files if not _is_other(mask)}
    pictures: dict[str, Path] = {}
    for image in sorted(images.rglob("*")):
        if image.suffix.lower() in SUFFIXES:
            name = _name(image, images)
            if name in pictures:
                raise ValueError(f"{pictures[name]} and {image} have the same mask. Give each a name of its own.")
            if name not in masks_:
                raise ValueError(f"{image} has no mask {targets / name}.png. Add it, or remove the image.")
            pictures[name] = image
            yield image, masks_[name]
    alone = next((mask for name, mask in masks_.items() if name not in pictures), None)
    if alone is not None:
        raise ValueError(f"{alone} has no image {images / _name(alone, targets)}.*. Add it, or remove the mask.")


def _name(path: Path, root: Path) -> str:
    """The path of an image or a mask below its folder, without its suffix and what Cityscapes adds."""
    stem = re.sub(r"_(leftImg8bit|gtFine_labelIds|gtFine_labelTrainIds)$", "", path.stem)
    return path.relative_to(root).with_name(stem).as_posix()


def _is_other(mask: Path) -> bool:
    """Whether it is one of the pictures beside Cityscapes' masks."""
    return mask.stem.endswith(("_gtFine_color", "_gtFine_instanceIds", "_gtFine_labelTrainIds"))


def _weights(labels: Tensor, classes: int) -> tuple[float, ...]:
    """The square root of the median class's pixels over those of each class."""
    counts = torch.bincount(labels[labels != VOID].long(), minlength=classes).double().clamp(min=1)
    weights: Any = (counts.median() / counts).sqrt()
    return tuple(round(weight, 6) for weight in weights.tolist())
