"""What the images and labels are, and what is wrong with them."""

import hashlib
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kdnas.data.base import Data, Images
from kdnas.jobs._preflight.findings import Finding, faults, notes
from kdnas.network import Network
from kdnas.randomness import initialised, torch_rng
from kdnas.space import SearchSpace
from kdnas.statistics import guessing
from kdnas.tasks.classification import balanced_accuracy

_FEW = 8  # images whose brightest pixel is looked at
_DARK = 0.25  # a value of 12 bits in 16, or of 8, is below it
_FAR = 2.0  # a resize by more than this factor is not the command's decision
_UNEVEN = 10  # times as many images of one class as of another
_THUMB = 8  # side of the thumbnails that are compared
_ALIKE = 0.9995  # correlation of two thumbnails
_BLANK = 1 / 255
_APART = 0.1  # of means of channels, whose range is 1
_SECONDS = 15.0  # of reading, for each part
_NEIGHBOURS = 2000  # training images, for the nearest one


def data_findings(data: Data) -> list[Finding]:
    """What a look at the labels and at a few images says."""
    parts = {"train": data.train, "search": data.search, "test": data.test}
    counts = ", ".join(f"{name} {len(part):,}" for name, part in parts.items())
    maps = data.classes - data.task.image_outputs
    names = ", ".join(data.class_names[:maps][:5]) + (", ..." if maps > 5 else "")
    channels, height, width = data.image
    outputs = f"{maps} classes ({names})"
    if data.task.image_outputs:
        outputs += f" and {data.task.image_outputs} answers for the whole image"
    if not data.task.has_classes:
        outputs = f"no labels are learnt, but {data.classes} features of the teacher; measured by {data.task.measure}"
    text = f"{counts} images of {channels} x {height} x {width}; {outputs}"
    findings = [Finding("data", text)]
    if data.source:
        findings.append(Finding("folders", data.source))
    train = data.counts(data.train)
    if train is not None:
        few, many = int(train.argmin()), int(train.argmax())
        line = f"{int(train[few]):,} to {int(train[many]):,} training images each"
        if data.is_imbalanced:
            line += f": {data.class_names[few]} has the fewest, {data.class_names[many]} the most; see balanced "
            line += "accuracies"
        findings.append(Finding("classes", line))
    brightest = float(data.train.sample(_FEW, torch_rng("brightest"))[0].max())
    absent = {name: _absent(part, data) for name, part in parts.items() if name != "train"}
    return findings + notes(
        "data",
        f"the brightest pixel of {_FEW} images has {brightest:.1%} of what their type holds: check its bits"
        if brightest < _DARK
        else "",
        "there are fewer training than test images. Check that the parts are not exchanged"
        if len(data.train) < len(data.test)
        else "",
        _alike_names(data.class_names),
        *(f"the {name} part has no image of {', '.join(missing[:5])}" for name, missing in absent.items() if missing),
    )


def _alike_names(names: Sequence[str]) -> str:
    """A sentence on classes whose names differ in case, spaces and signs alone."""
    known: dict[str, str] = {}
    for name in names:
        plain = "".join(c for c in name.casefold() if c.isalnum()) or name
        if plain in known:
            return f"classes {known[plain]!r} and {name!r} differ in case or signs alone. Merge them if they are one."
        known[plain] = name
    return ""


def _absent(part: Images, data: Data) -> list[str]:
    counts = data.counts(part)
    return [] if counts is None else [data.class_names[i] for i in (counts == 0).nonzero().flatten().tolist()]


def size_findings(data: Data, sides: Sequence[int], *, decided: bool) -> list[Finding]:
    """The size of the student's images, and how far it is from the data's; networks for every pixel resize none."""
    if data.task.dense:
        return []
    own = data.image[1]
    near = min(sides, key=lambda side: max(side / own, own / side))
    shown = f"{near} x {near}" if len(sides) == 1 else f"{sides[0]} x {sides[0]} to {sides[-1]} x {sides[-1]}"
    if own in sides and data.image[2] == own:
        return [Finding("student", f"images of {shown}, as the data's")]
    refusals = []
    if not decided and max(near / own, own / near) > _FAR:
        refusals.append(
            f"The student would compute on images of {shown}, the data's are {own} x {data.image[2]}. Decide by --size "
            f"{own} or --size {near} (in an experiment: `resolutions` of the space)."
        )
    line = f"images of {shown}, resized from {own} x {data.image[2]}"
    return [Finding("student", line), *faults("student", refusals)]


def every_image(data: Data) -> list[Finding]:
    """What reading all images says, at most 15 seconds for each part: doubles, blank ones, labels of no meaning."""
    prints: dict[str, _Prints] = {}
    for name in ("train", "search", "test"):
        try:
            prints[name] = _prints(getattr(data, name))
        except (ValueError, RuntimeError, OSError) as error:
            return faults("data", [f"The {name} part cannot be read: {error}"])
    count = sum(len(part.thumbs) for part in prints.values())
    whole = sum(len(part) for part in (data.train, data.search, data.test))
    findings = [Finding("images", f"{count:,} of {whole:,} were read")]
    pairs = (("test", "train"), ("search", "train"), ("test", "search"))
    findings += faults("data", filter(None, (_doubles(prints, *pair, data.task.measures) for pair in pairs)))
    findings += notes("data", *_repeated(data, prints["train"]), _blank(prints), *_similar(prints), _uneven(data))
    channels = data.channels
    findings += notes("data", *_colours(prints, channels), *(_apart(prints, n, channels) for n in ("search", "test")))
    return findings + notes("data", *(_random_labels(data, prints, name) for name in ("search", "test")))


class _Prints(NamedTuple):
    """Of a part's images, in random order: a digest (none of a blank one), a thumbnail, and the range of the values."""

    digests: list[bytes]
    thumbs: Tensor
    ranges: Tensor
    labels: Tensor


def _prints(part: Images) -> _Prints:
    began = time.perf_counter()
    digests: list[bytes] = []
    thumbs, ranges = [], []
    order = torch.randperm(len(part), generator=torch_rng("doctor"))
    for indices in order.split(200):
        pixels = part.take(indices)
        levels = (pixels * 255).round().to(torch.uint8).flatten(1)
        ranges.append(pixels.flatten(1).amax(1) - pixels.flatten(1).amin(1))
        thumbs.append(F.adaptive_avg_pool2d(pixels, _THUMB).flatten(1))
        digests += [
            hashlib.blake2b(row.numpy().tobytes(), digest_size=16).digest() if contrast > _BLANK else b""
            for row, contrast in zip(levels, ranges[-1], strict=True)
        ]
        if time.perf_counter() - began > _SECONDS:
            break
    return _Prints(digests, torch.cat(thumbs), torch.cat(ranges), part.labels[order[: len(digests)]])


def _doubles(prints: dict[str, _Prints], name: str, other: str, measures: str) -> str:
    """A sentence on images of a part that are in another part too."""
    known = {*prints[other].digests} - {b""}
    count = sum(digest in known for digest in prints[name].digests)
    if not count:
        return ""
    words = {"train": f"training images too, so that {measures} on them are too high"}.get(
        other, "search images too, by which the student is chosen"
    )
    return f"{count} of {len(prints[name].digests)} {name} images are {words}. Remove them from one of the two parts."


def _repeated(data: Data, train: _Prints) -> Iterator[str]:
    """Sentences on training images that are there more than once, with one label or with several."""
    labels: dict[bytes, set[int]] = {}
    classes = data.task.image_classes(train.labels)
    if classes is None:
        return
    for digest, label in zip(train.digests, classes.tolist(), strict=True):
        labels.setdefault(digest, set()).add(label)
    labels.pop(b"", None)
    several = [found for found in labels.values() if len(found) > 1]
    if several:
        names = " and ".join(data.class_names[label] for label in sorted(several[0])[:2])
        yield (
            f"{len(several)} training images are in several classes, such as {names}. Keep each in one, or merge the "
            "classes."
        )
    count = len(train.digests) - train.digests.count(b"") - len(labels)
    if not several and count > len(train.digests) // 50:
        yield (
            f"{count} of {len(train.digests)} training images are there before. Remove the copies: they count more "
            "than others, and a tenth that is cut off for search may have them too."
        )


def _colours(prints: dict[str, _Prints], channels: int) -> Iterator[str]:
    """Sentences on gray images in three channels, and on a channel that is constant."""
    maps = {name: part.thumbs[part.ranges > _BLANK].unflatten(1, (channels, -1)) for name, part in prints.items()}
    if channels == 1 or not all(map(len, maps.values())):
        return
    gray = [name for name, each in maps.items() if float((each - each[:, :1]).abs().max()) <= _BLANK]
    if len(gray) == len(maps):
        yield (
            f"all images are gray, in {channels} equal channels. Where they should have colours, check how they are "
            "read; where not, ignore this."
        )
    elif gray:
        yield f"all {' and '.join(gray)} images are gray, the others are not. Read all parts alike."
    flat = maps["train"].amax((0, 2)) - maps["train"].amin((0, 2)) <= _BLANK
    if flat.any():
        numbers = " and ".join(str(int(i) + 1) for i in flat.nonzero())
        yield f"channel {numbers} of {channels} is the same in all training images. Check how they are read."


def _apart(prints: dict[str, _Prints], name: str, channels: int) -> str:
    """A sentence where a part's channels are far from the train part's, in their mean over images."""
    ours, theirs = (prints[part].thumbs.unflatten(1, (channels, -1)).mean(2) for part in (name, "train"))
    if min(len(ours), len(theirs)) < _FEW or bool((prints[name].ranges <= _BLANK).all()):
        return ""
    error = (ours.var(0) / len(ours) + theirs.var(0) / len(theirs)).sqrt()
    difference = (ours.mean(0) - theirs.mean(0)).abs()
    if not bool((difference > _APART + 5 * error).any()):
        return ""
    means = ["/".join(f"{value:.2f}" for value in part.mean(0).tolist()) for part in (ours, theirs)]
    return (
        f"the {name} images have the means {means[0]}, the training images {means[1]}: they are of another kind, or "
        "read in another way (scale, inverted, order of channels). Read all parts alike."
    )


def _similar(prints: dict[str, _Prints]) -> Iterator[str]:
    """A sentence where many test images are nearly a training image, as neighbouring frames of a film are."""
    train, test = prints["train"], prints["test"]
    mean = train.thumbs.mean(0)
    ours, theirs = (F.normalize(part.thumbs[part.ranges > _BLANK] - mean) for part in (test, train))
    known = set(train.digests)
    is_double = torch.tensor([digest in known for digest in test.digests])[test.ranges > _BLANK]
    if len(ours) and len(theirs):
        shape = (-1, train.thumbs.shape[1] // _THUMB**2, _THUMB, _THUMB)
        mirrored = F.normalize((test.thumbs[test.ranges > _BLANK].view(shape).flip(3).flatten(1)) - mean)
        alike = [
            torch.cat([(rows @ theirs.T).amax(1) > _ALIKE for rows in each.split(500)]) for each in (ours, mirrored)
        ]
        near = (alike[0] | alike[1]) & ~is_double
        if int(near.sum()) > len(ours) // 50:
            yield (
                f"{int(near.sum())} of {len(ours)} test images are nearly equal to a training image or to its mirror "
                "image. Split by what they come from (film, patient, place), not image by image."
            )


def _blank(prints: dict[str, _Prints]) -> str:
    counts = {name: int((part.ranges <= _BLANK).sum()) for name, part in prints.items()}
    if not any(counts.values()):
        return ""
    black = sum(int((part.thumbs.amax(1) <= _BLANK).sum()) for part in prints.values())
    places = ", ".join(f"{count} of {len(prints[name].ranges)} {name}" for name, count in counts.items() if count)
    return (
        f"{places} images have one colour throughout ({black} are black). Check how they are read, and remove those "
        "that are blank."
    )


def _uneven(data: Data) -> str:
    counts = data.counts(data.train)
    if counts is None:
        return ""
    few, many = int(counts.argmin()), int(counts.argmax())
    if int(counts[many]) < _UNEVEN * int(counts[few]):
        return ""
    return (
        f"class {data.class_names[many]!r} has {int(counts[many]) / int(counts[few]):.0f} times the training images of "
        f"{data.class_names[few]!r}. Read balanced accuracies, and add images of the rare class or remove it."
    )


def _random_labels(data: Data, prints: dict[str, _Prints], name: str) -> str:
    """A sentence where the nearest training image has the label of a part's image no more often than by chance."""
    train, search = prints["train"], prints[name]
    known, classes = (data.task.image_classes(part.labels) for part in (train, search))
    if known is None or classes is None:
        return ""
    neighbours = torch.cdist(search.thumbs, train.thumbs[:_NEIGHBOURS]).argmin(1)
    share = balanced_accuracy(known[neighbours] == classes, classes)
    if share > guessing(data.classes, len(classes)):
        return ""
    return (
        f"the nearest training image has the label of a {name} image for {share:.1%} (chance {1 / data.classes:.1%}): "
        "labels may belong to other images, or be in another order. Look at some with their labels; where they are "
        "right, ignore this."
    )


def stride_findings(space: SearchSpace) -> list[Finding]:
    """A note where the largest network's feature maps are one pixel before its last stages."""
    network = initialised(lambda: Network(space.blueprint(space.largest)), 0).eval()
    image = network.blueprint.image
    size, fix = f"{image[1]} x {image[2]}", "larger images" if space.dense else "a larger --size"
    try:
        with torch.no_grad():
            features = network(torch.zeros(2, *image)).features
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        return faults("student", [f"The student fails on images of {size} ({reason}). Use {fix}."])
    maps = [feature for feature in features if feature.dim() == 4]
    single = next((i for i, map_ in enumerate(maps, 1) if map_.shape[2:].numel() == 1), len(maps))
    if single >= len(maps):
        return []
    return notes(
        "student",
        f"images of {size} are one pixel after stage {single} of {len(maps)}, below the network's stride. Use {fix}, "
        "or a space for small images.",
    )
