"""What a teacher is and gives on search images, and what speaks against it."""

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kdnas.costs.count import cost
from kdnas.data.base import Data
from kdnas.jobs._preflight.findings import Finding, faults, notes
from kdnas.jobs._run import other_names
from kdnas.network import default_device
from kdnas.preprocessing import Preprocessing
from kdnas.randomness import torch_rng
from kdnas.settings import FitTeacher
from kdnas.specs import Spec
from kdnas.statistics import guessing
from kdnas.tasks.classification import balanced_accuracy
from kdnas.tasks.features import Similarity
from kdnas.teachers.base import Frozen, Teacher, teacher_of
from kdnas.teachers.fitted import fitted_teacher
from kdnas.teachers.zoo import declared_size

_NUM_IMAGES = 300  # of the search part, for the teacher's accuracy
_FEW = 100  # of them, for each other normalisation
_NORMALISATIONS = (
    ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # of ImageNet
    ((0.5,), (0.5,)),
    ((0.0,), (1.0,)),
    ((0.0,), (1 / 255,)),
)
_ENOUGH = 5
CHECK = "Check its weights, the order of its classes, and its size and normalisation."
_BY_CHANNELS = "Reverse them where the images are read, or in front of the teacher: module(images.flip(1))."
_BY_NORMALISATION = "Return Frozen(module, preprocessing=...) with the normalisation that it was trained with."
_SAME = 1e-5  # of logits
_EQUAL = 0.99  # similarity of a teacher's features with themselves; devices and batches differ by less
_LEAST_RANGE, _MOST_RANGE = 0.01, 1e4  # of the logits of an image


def fitted_finding(teacher: FitTeacher, data: Data) -> Finding:
    """What a teacher that is trained here will be."""
    params, macs = cost(fitted_teacher(data.image, data.classes, teacher.blocks, teacher.width, dense=data.task.dense))
    count = f"{teacher.members} of them, " if teacher.members > 1 else ""
    return Finding(
        "teacher",
        f"trained here on images of {data.image[1]} x {data.image[2]}: {count}{params:,} params, {macs:,} MACs, "
        f"{teacher.recipe.steps:,} steps; --teacher fit,width=N",
    )


class _Sample(NamedTuple):
    pixels: Tensor
    logits: Tensor
    labels: Tensor
    seconds: float


def teacher_findings(source: Spec, data: Data, advice: str = CHECK) -> tuple[list[Finding], float]:
    """What the teacher is and gives on at most 300 search images, what speaks against it, and the seconds per image."""
    with torch.random.fork_rng(devices=[]):  # a teacher may draw its weights, and draws the same in the training
        return _findings(source, data, advice)


def _findings(source: Spec, data: Data, advice: str) -> tuple[list[Finding], float]:
    teacher = teacher_of(source, data).to(default_device())
    difference = other_names(teacher, data)
    refusals = [f"{difference} Use a teacher of these very classes, in their order."] if difference else []
    known = any(isinstance(m, Teacher) and m.class_names for m in teacher.modules())
    names = "class names differ" if difference else "class names match" if known else "class names unknown"
    size = ""
    if isinstance(teacher, Frozen):
        own, says = teacher.preprocessing, declared_size(teacher.module)
        cut = f", the inner {teacher.crop:.3g} of each side" if teacher.crop < 1 else ""
        size = f"images of {own.height} x {own.width} ({own.interpolation}{cut}), mean {_short(own.mean)}, std "
        size += f"{_short(own.std)}; " + (f"{teacher.note}; " if teacher.note else "")
        if teacher.assumes_size and says is not None and says != (own.height, own.width):
            refusals.append(
                f"The teacher gets images of {own.height} x {own.width}, but says that it was made for {says[0]} x "
                f"{says[1]}. Return Frozen(module, preprocessing=...) with the size that it was trained with."
            )
    sample = _sample(teacher, data)
    own_faults = list(_own_faults(teacher, sample, known, data)) if isinstance(teacher, Frozen) else []
    refusals += own_faults or _output_faults(teacher, sample, data, advice)
    grades, classes = data.task.grades(sample.logits, sample.labels), data.task.image_classes(sample.labels)
    value = float(data.task.quality(grades.float().mean(0)))
    if isinstance(data.task, Similarity) and value < _EQUAL:
        refusals.append(
            f"The teacher gives other features each time it is made: their similarity is {value:.1%}. Load its weights "
            "from a file, or draw them with a seed."
        )
    of = "of" if classes is not None else f"{data.task.measure} on"
    line = f"{size}{names}; {value:.1%} {of} {len(grades)} search images"
    if classes is not None and data.is_imbalanced:
        line += f", balanced {balanced_accuracy(grades, classes):.1%}"
    refusals += _swapped(teacher.preprocessing, data) if isinstance(teacher, Frozen) else ()
    looks = (_log_probabilities(sample), _spread(sample), _never_named(sample, data))
    remarks = notes("teacher", *looks) if data.task.answers == "classes" else []
    return [Finding("teacher", line), *remarks, *faults("teacher", refusals)], sample.seconds


def _own_faults(teacher: Frozen, sample: _Sample, is_known: bool, data: Data) -> Iterator[str]:
    """What speaks against a single network: chance, another normalisation."""
    few = sample.pixels[: max(1, len(sample.pixels[:50]) // 2)]
    again = teacher(few.to(default_device())).logits.cpu()
    if not torch.allclose(again, sample.logits[: len(few)], rtol=1e-2, atol=1e-3, equal_nan=True):
        yield (
            "The teacher gives other logits for an image in another batch: it is random, or uses statistics of the "
            "batch. Switch that off in evaluation mode."
        )
    if not is_known and data.task.image_classes(sample.labels) is not None:
        yield from _other_normalisation(teacher, sample)


def _other_normalisation(teacher: Frozen, sample: _Sample) -> Iterator[str]:
    """A sentence where the teacher is right far more often on images that are normalised in another usual way."""
    own, labels, device = teacher.preprocessing, sample.labels[:_FEW], default_device()
    pixels = sample.pixels[:_FEW].to(device)
    hits = sample.logits[:_FEW].argmax(1) == labels
    best, words = hits, ""
    if pixels.shape[1] == len(own.mean) == 3:
        right = teacher(pixels.flip(1)).logits.argmax(1).cpu() == labels
        if right.sum() > best.sum():
            best, words = right, "the channels in reverse order (BGR instead of RGB)"
    for mean, std in _NORMALISATIONS:
        if len(mean) not in (1, len(own.mean)):
            continue
        values = tuple((numbers * len(own.mean))[: len(own.mean)] for numbers in (mean, std))
        teacher.preprocessing = dataclasses.replace(own, mean=values[0], std=values[1])
        try:
            right = teacher(pixels).logits.argmax(1).cpu() == labels
        finally:
            teacher.preprocessing = own
        if right.sum() > best.sum():
            best, words = right, f"mean {_short(values[0])} and std {_short(values[1])}"
    gain, differing = int(best.sum() - hits.sum()), int((best != hits).sum())
    # An eighth of the images, and three standard errors of a difference that is 0.
    is_far = gain >= len(labels) / 8 and gain >= 3 * math.sqrt(differing)
    if is_far and int(best.sum()) > len(labels) * guessing(sample.logits.shape[1], len(labels)):
        yield (
            f"The teacher is right for {int(hits.sum())} of {len(labels)} search images, but for {int(best.sum())} "
            f"with {words}. {_BY_CHANNELS if 'BGR' in words else _BY_NORMALISATION}"
        )


def _short(values: Sequence[float]) -> str:
    return "/".join(f"{value:.3g}" for value in values)


def _sample(teacher: Teacher, data: Data) -> _Sample:
    most = data.task.images_at_once
    pixels, labels = data.search.sample(min(_NUM_IMAGES, 4 * most), torch_rng("preflight"))
    device, logits = default_device(), []
    began = time.perf_counter()
    for chunk, targets in zip(*(each.split(min(50, most)) for each in (pixels, labels)), strict=True):
        try:
            logits.append(teacher(chunk.to(device), targets.to(device)).logits.cpu())
        except (RuntimeError, AssertionError, TypeError, IndexError) as error:
            shape = " x ".join(map(str, pixels.shape[1:]))
            raise ValueError(
                f"the teacher fails on the data's images of {shape} ({str(error).partition(chr(10))[0]}). Use a "
                "teacher for images of these channels, or Frozen with its own preprocessing."
            ) from error
    return _Sample(pixels, torch.cat(logits), labels, (time.perf_counter() - began) / len(labels))


def _output_faults(teacher: Teacher, sample: _Sample, data: Data, advice: str) -> list[str]:
    """What speaks against a teacher's logits: NaN, equal ones, probabilities, an accuracy near chance."""
    logits = sample.logits
    broken = int((~torch.isfinite(logits)).flatten(1).any(1).sum())
    if broken:
        weights = next((n for n, p in teacher.state_dict().items() if not torch.isfinite(p).all()), "")
        where = f"; {weights} among its weights is not finite" if weights else ""
        return [
            f"The teacher gives NaN or infinity for {broken} of {len(logits)} search images{where}. Check its weights."
        ]
    if len(logits) > 1 and float((logits.max(0).values - logits.min(0).values).max()) < _SAME:
        return [
            f"The teacher gives the same logits for all {len(logits)} search images, so it teaches nothing. Load its "
            "weights, and check its normalisation and what its last layers do."
        ]
    refusals, totals = [], logits.sum(1)
    is_share = logits.shape[1] > 1 and torch.allclose(totals, totals[:1], rtol=1e-3)
    is_positive = data.task.answers == "classes" and logits.min() >= 0 and float(logits.std()) > 0
    if is_positive and (is_share or logits.max() <= 1):
        sums = f"that sum to {float(totals[0]):.3g}" if is_share else "in [0, 1]"
        refusals.append(
            f"The teacher gives probabilities ({sums}) instead of logits. Return what is before its softmax or sigmoid."
        )
    order = _displaced(sample, data)
    if order:
        return [*refusals, f"The teacher's classes seem to be in another order than the data's: {order}. {advice}"]
    chance = data.task.chance(data.task.grades(logits, sample.labels), sample.labels, data.class_names)
    if chance is not None:
        refusals.append(
            f"The teacher's {data.task.measure} on {len(logits)} search images, {chance.value:.1%}{chance.note}, "
            f"is near chance ({chance.guess:.1%}). {advice}"
        )
    return refusals


def _log_probabilities(sample: _Sample) -> str:
    """A sentence where the logits are logarithms of probabilities."""
    sums = sample.logits.logsumexp(1)
    if len(sums) < 2 or not torch.allclose(sums, torch.zeros(()), atol=1e-3):
        return ""
    return (
        "The teacher gives log-probabilities: losses of probabilities are the same, those that compare logits "
        "themselves are not. Return what is before its log-softmax."
    )


def _spread(sample: _Sample) -> str:
    """A sentence where the logits are so close together, or so far apart, that no temperature helps."""
    ranges = sample.logits.amax(1) - sample.logits.amin(1)
    middle = float(ranges.median())
    if not math.isfinite(middle) or _LEAST_RANGE <= middle <= _MOST_RANGE:
        return ""
    words = "its classes are nearly equally probable" if middle < _LEAST_RANGE else "one class has all probability"
    return (
        f"The teacher's logits of an image are {middle:.2g} apart (median), so that {words} at any usual temperature. "
        "Check what its last layers do, or scale them."
    )


def _never_named(sample: _Sample, data: Data) -> str:
    """A sentence on classes with at least five images that the teacher gives to no image at all."""
    labels = data.task.image_classes(sample.labels)
    if labels is None or sample.logits.shape[1] != data.classes:
        return ""
    counts, calls = (torch.bincount(each, minlength=data.classes) for each in (labels, sample.logits.argmax(1)))
    names = [data.class_names[i] for i in range(data.classes) if counts[i] >= _ENOUGH and not calls[i]]
    if not names or not bool((calls > 0).sum() > 1):
        return ""
    return (
        f"The teacher calls no image {' or '.join(names[:3])}, though there are some. Check whether it was trained on "
        "that class, and under which name."
    )


def _swapped(own: Preprocessing, data: Data) -> Iterator[str]:
    """A sentence where mean and standard deviation are exchanged: those of the data, or of ImageNet."""
    known = ((data.preprocessing.mean, data.preprocessing.std), _NORMALISATIONS[0])
    if any(tuple(mean) != tuple(std) and (own.std, own.mean) == (tuple(mean), tuple(std)) for mean, std in known):
        yield (
            f"The teacher's mean is {_short(own.mean)} and its std {_short(own.std)}: they seem to be exchanged. "
            f"{_BY_NORMALISATION}"
        )


def _displaced(sample: _Sample, data: Data) -> str:
    """Classes of at least five images each that the teacher calls by each other's names, in words; else empty."""
    named: dict[int, int] = {}
    predictions, classes = sample.logits.argmax(1), data.task.image_classes(sample.labels)
    if classes is None:
        return ""
    for label, count in enumerate(torch.bincount(classes, minlength=data.classes).tolist()):
        if count >= _ENOUGH:
            calls = torch.bincount(predictions[classes == label], minlength=data.classes)
            if int(calls.argmax()) != label and 2 * int(calls.max()) > count:
                named[label] = int(calls.argmax())
    in_cycle = [label for label in named if label in _followed(named, label)]
    return ", ".join(
        f"it calls most images of {data.class_names[label]} {data.class_names[named[label]]}" for label in in_cycle[:3]
    )


def _followed(steps: Mapping[int, int], start: int) -> Iterator[int]:
    """Where one gets from a start, in as many steps as there are."""
    place: int | None = start
    for _ in steps:
        place = steps.get(place) if place is not None else None
        if place is not None:
            yield place
