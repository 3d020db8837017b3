"""Images of all sources become one Data: parts, classes, decoding and refusals."""

import itertools
import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, final

import torch

from kdnas.data.base import Data, Images, TensorImages
from kdnas.data.files import FileImages, Source, problems, sides
from kdnas.randomness import torch_rng

Image = TypeVar("Image")
Files = Mapping[str, Sequence[Source]]
"""The pictures of each class."""

PARTS = {
    "train": {"train", "training", "trn"},
    "validation": {"val", "valid", "validation", "dev", "eval", "evaluation"},
    "test": {"test", "testing", "tst", "holdout"},
}
NO_CLASS = ""
"""The class of images without labels; the only one."""
_LABELLED: ContextVar[bool] = ContextVar("labelled", default=True)
_MOST_SIDE = 8192
_MOST_NAMED = 280  # letters of what is wrong with single files, in a message


def assembled(
    layout: "Layout", form: str, *, size: int = 0, seed: int = 0, skip_broken: bool = False, most: int = 2**30
) -> Data:
    """The data of a layout.

    Of train, validation and test, the second is the search part and the third the test part. Without one of the two,
    the other is the test part, and a tenth of each training class (at least one image) is for search. Without both a
    fifth of each class (at least one image) is for test.

    Args:
        layout: pictures by part and class.
        form: the text that names the data, for messages.
        size: side in pixels of the square that images are resized and cropped to; 0 for the median of the training
            images' shorter sides, 224 at most.
        seed: random seed of the split.
        skip_broken: leave out pictures that cannot be decoded, and count them in `Data.source`.
        most: bytes of decoded pictures that are held in memory; where there are more, they are decoded again and again.

    Raises:
        ValueError: another size, other classes in a part, a class with too few images, or pictures that cannot be
            decoded.
    """
    if not 0 <= size <= _MOST_SIDE:
        raise ValueError(f"`size` must be 0 to {_MOST_SIDE}, got {size}.")
    names = layout.names or sorted(layout.parts["train"])
    notes = [layout.recognised]
    if skip_broken:
        broken = problems([file for files in layout.parts.values() for file in all_files(files)])
        layout = layout.without(broken)
        notes.append(f"{len(broken)} files that cannot be decoded are left out")
    _check_classes(layout)
    parts, cut = split(layout.parts, names, seed)
    cut = cut.replace(" of each class", "") if names == [NO_CLASS] else cut
    notes += [cut, layout.left_out]
    try:
        side = size or _median_side([file for file, _ in parts["train"]], seed)
        loaded: dict[str, Any] = {
            name: in_memory(FileImages([f for f, _ in part], torch.tensor([label for _, label in part]), side), most)
            for name, part in parts.items()
        }
    except ValueError:
        everything = [file for part in parts.values() for file, _ in part]
        broken = problems(everything)
        ends = itertools.accumulate(len(sentence) + 1 for sentence in broken)
        room = max(1, sum(end <= _MOST_NAMED for end in ends))
        shown = " ".join(broken[:room]) + (" ..." if room < len(broken) else "")
        raise ValueError(
            f"{len(broken)} of {len(everything)} files cannot be decoded: {shown} Repair or remove them, or leave them "
            f"out by {form},skip_broken=true."
        ) from None
    source = "; ".join(note for note in notes if note)
    return Data(**loaded, class_names=tuple(names), augmentation="crop_flip", source=source)


@final
class Layout(NamedTuple):
    """Pictures by part and class.

    Attributes:
        parts: `train`, and perhaps `validation` and `test`.
        recognised: what was recognised, in words.
        left_out: what was left out, in words; empty for nothing.
        names: the classes in their order; empty for the alphabet's.
    """

    parts: dict[str, Files]
    recognised: str
    left_out: str = ""
    names: tuple[str, ...] = ()

    def without(self, broken: Sequence[str]) -> "Layout":
        """The same without the files that begin these sentences."""
        bad = {sentence.partition(" cannot be read")[0] for sentence in broken}
        parts: dict[str, Files] = {
            part: {name: [file for file in files if str(file) not in bad] for name, files in classes.items()}
            for part, classes in self.parts.items()
        }
        return self._replace(parts=parts)


@contextmanager
def without_labels() -> Iterator[None]:
    """Inside, sources may have images without labels: all are then of one class, `NO_CLASS`."""
    token = _LABELLED.set(False)
    try:
        yield
    finally:
        _LABELLED.reset(token)


def needs_labels() -> bool:
    """Whether images without labels are refused: outside of `without_labels()`."""
    return _LABELLED.get()


def role_of(name: str) -> str | None:
    """The part that a folder's name stands for, by one of its words; None for none, or for several."""
    words = {re.sub(r"(sets?|data|images?|imgs?|\d+)$", "", word) for word in re.split(r"[^a-z0-9]+", name.lower())}
    roles = [part for part, known in PARTS.items() if words & known]
    return roles[0] if len(roles) == 1 else None


def check_roles(root: Path, roles: Mapping[Path, str | None], what: str = "part") -> None:
    """Raise a ValueError where several folders or files stand for one part."""
    for role in PARTS:
        several = [path.name for path in roles if roles[path] == role]
        if len(several) > 1:
            raise ValueError(
                f"{root} must have one {role} {what}, got {' and '.join(several)}. Rename or move the others."
            )


def all_files(files: Files) -> list[Source]:
    """The pictures of all classes."""
    return [file for name in sorted(files) for file in files[name]]


def _check_classes(layout: Layout) -> None:
    """Raise a ValueError for fewer than two classes, a class with too few images, or other classes in a part."""
    train = layout.parts["train"]
    if len(train) < 2 and (needs_labels() or set(train) != {NO_CLASS}):
        fix = "Images without classes need --unlabelled" if needs_labels() else "Or put all images into one folder"
        raise ValueError(
            "there must be at least 2 classes, of a folder class folders (CLASS/image.jpg), got "
            f"{len(train)}: {sorted(train)}. {fix}."
        )
    least = 4 - sum(part in layout.parts for part in ("validation", "test"))
    few = next((name for name in sorted(train) if len(train[name]) < least), None)
    if few is not None:
        what, whose, fix = "every class must have", f"class {few!r} has", "Add images or remove the class."
        if few == NO_CLASS:
            what, whose, fix = "there must be", "got", "Add images."
        raise ValueError(
            f"{what} at least {least} images to train, search and test, {whose} {len(train[few])}. {fix}"
            + (layout.left_out and f" {layout.left_out}.")
        )
    for part, files in layout.parts.items():
        differing = sorted(set(files) ^ set(train))
        if differing:
            raise ValueError(f"train and {part} must have the same classes, {differing[:5]} are in one of them only.")


def split(
    parts: Mapping[str, Files], names: Sequence[str], seed: int
) -> tuple[dict[str, list[tuple[Source, int]]], str]:
    """Pictures and labels of the three parts, as `assembled` says, and how they were cut off, in words."""
    pairs = {part: [(f, i) for i, name in enumerate(names) for f in files[name]] for part, files in parts.items()}
    if {"validation", "test"} <= set(parts):
        return {"train": pairs["train"], "search": pairs["validation"], "test": pairs["test"]}, ""
    outer = pairs.get("test") or pairs.get("validation")
    train, search, test = [], [], list(outer or ())
    for label, name in enumerate(names):
        files = parts["train"][name]
        order = torch.randperm(len(files), generator=torch_rng(seed, "folder", label)).tolist()
        shuffled = [(files[i], label) for i in order]
        if outer is None:
            cut = max(1, len(shuffled) // 5)
            test += shuffled[:cut]
            shuffled = shuffled[cut:]
        cut = max(1, len(shuffled) // 10)
        search += shuffled[:cut]
        train += shuffled[cut:]
    how = _how(" of each class", has_outer=outer is not None, has_test="test" in parts)
    return {"train": train, "search": search, "test": test}, how


def split_images(parts: Mapping[str, Sequence[Image]], seed: int) -> tuple[dict[str, list[Image]], str]:
    """The three parts, as `assembled` says, without regard to classes, and how they were cut off, in words.

    Args:
        parts: images by `train`, and perhaps `validation` and `test`.
        seed: random seed.

    Raises:
        ValueError: too few images.
    """
    if not parts.get("train"):
        raise ValueError(f"there must be images to train with, got parts {', '.join(parts) or 'none'}. Add train.")
    train, outer = list(parts["train"]), parts.get("test") or parts.get("validation")
    if parts.get("test") and parts.get("validation"):
        return {"train": train, "search": list(parts["validation"]), "test": list(parts["test"])}, ""
    order = torch.randperm(len(train), generator=torch_rng(seed, "masks")).tolist()
    shuffled = [train[i] for i in order]
    cut = 0 if outer else max(1, len(shuffled) // 5)
    test, rest = list(outer or shuffled[:cut]), shuffled[cut:]
    few = max(1, len(rest) // 10)
    if len(rest) <= few:
        raise ValueError(f"there must be at least 4 images to train, search and test, got {len(train)}.")
    how = _how("", has_outer=bool(outer), has_test=bool(parts.get("test")))
    return {"train": rest[few:], "search": rest[:few], "test": test}, how


def _how(of: str, *, has_outer: bool, has_test: bool) -> str:
    """How parts were cut off, in words."""
    if not has_outer:
        return f"a fifth{of} is for test, a tenth of the rest for search"
    return "a tenth of train is for search" + ("" if has_test else ", validation is for test")


def _median_side(files: Sequence[Source], seed: int, most: int = 200) -> int:
    """The median of the shorter sides of images drawn from these files, 224 at most."""
    order = torch.randperm(len(files), generator=torch_rng(seed, "size"))[:most].tolist()
    return min(224, round(statistics.median(sides([files[i] for i in order]))))


def in_memory(files: FileImages, limit: int) -> Images:
    """Files decoded once into memory where they fit in so many bytes, as uint8 if they hold no more than that."""
    size = len(files) * math.prod(files.shape)
    if size > limit:
        return files
    chunks, deep = [], False
    for images, _ in files.batches(256):
        levels = (images * 255).round()
        if not deep and bool((images * 255 - levels).abs().max() > 1e-3):
            deep, chunks = True, [chunk.float() / 255 for chunk in chunks]
        chunks.append(images if deep else levels.to(torch.uint8))
        if deep and 4 * size > limit:
            return files
    return TensorImages(torch.cat(chunks), files.labels, files.task)
