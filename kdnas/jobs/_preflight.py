"""What a training is about to do, in one block before its first step; a teacher that cannot teach stops it."""

import dataclasses
import logging
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kdnas.costs.count import cost
from kdnas.data.base import Data
from kdnas.evaluation import balanced_accuracy
from kdnas.jobs._run import insist_or_raise, other_names
from kdnas.network import Network, default_device, modes
from kdnas.randomness import initialised, torch_rng
from kdnas.settings import FitTeacher, Recipe
from kdnas.space import SearchSpace
from kdnas.specs import Spec
from kdnas.teachers.base import Frozen, Teacher
from kdnas.teachers.fitted import fitted_teacher
from kdnas.teachers.zoo import declared_names, declared_size

_log = logging.getLogger(__name__)
_NUM_IMAGES = 300  # of the search part, for the teacher's accuracy
_TIMED = 8  # images in the batch by which a step's time is estimated
_SUBNETS = 4
_FEW = 100  # of them, for each other normalisation
_NORMALISATIONS = (
    ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # of ImageNet
    ((0.5,), (0.5,)),
    ((0.0,), (1.0,)),
    ((0.0,), (1 / 255,)),
)
_ENOUGH = 5
_CHECK = "Check its weights, the order of its classes, and its size and normalisation."
_DARK = 0.25  # a value of 12 bits in 16, or of 8, is below it
_FAR = 2.0  # a resize by more than this factor is not the command's decision


def preflight(
    data: Data,
    *,
    folder: Path,
    teacher: Spec | FitTeacher | None = None,
    space: SearchSpace | None = None,
    network: Network | None = None,
    side: int = 0,
    recipe: Recipe | None = None,
    budget: object = None,
    finals: tuple[float, Recipe] | None = None,
    size_chosen: bool = False,
) -> None:
    """Log what is about to be trained, on what, by whom and for how long; refuse a teacher that cannot teach.

    The teacher sees at most 300 search images, drawn by a generator of this function: no number of a run changes.

    Args:
        data: the data.
        folder: where the results go.
        teacher: its spec, a `FitTeacher`, or None without one.
        space: the search space, fitted to the data.
        network: what is trained, where it is a single network.
        side: of the student's images, where neither space nor network says it.
        recipe: of the training.
        budget: of the search, which some network meets.
        finals: number of whole trainings that the finalists and their controls cost, and their recipe.
        size_chosen: whether a person decided the size of the student's images.

    Raises:
        ValueError: unless inside of `insisting(True)`: the teacher fails, gives NaN or probabilities, has other class
            names or an accuracy near chance, is fed another size than it says, or the student's images would be resized
            by more than a factor of 2.
    """
    refusals: list[str] = []
    lines = _data_lines(data)
    sides = space.resolutions if space else (network.blueprint.image[1],) if network else (side,) if side else ()
    if sides:
        lines.append(("student", _student_line(data, sides, refusals, decided=size_chosen or space is None)))
    each = 0.0
    if isinstance(teacher, FitTeacher):
        lines.append(("teacher", _fitted_line(teacher, data)))
    elif teacher is not None:
        with torch.random.fork_rng(devices=[]):  # a teacher may draw its weights, and draws the same in the training
            line, each, faults = _teacher_line(teacher, data)
        lines.append(("teacher", line))
        refusals += faults
    if budget is not None and str(budget):
        lines.append(("budget", f"{budget}; there are networks within it"))
    lines.append(("device", _device_line()))
    if recipe is not None:
        lines.append(("training", _cost_line(space, network, recipe, each, folder)))
    if finals is not None and space is not None:
        lines.append(("finalists", _finals_line(space, *finals, each)))
    width = max(len(name) for name, _ in lines)
    _log.info("before the training\n" + "\n".join(f"  {name:<{width}}  {line}" for name, line in lines))
    insist_or_raise(refusals)


def judge_fitted(source: Spec, data: Data) -> None:
    """Log what a teacher that was trained here gives on at most 300 search images.

    Raises:
        ValueError: outside of `insisting(True)`: its accuracy is near chance.
    """
    with torch.random.fork_rng(devices=[]):
        line, _, faults = _teacher_line(source, data, "Train it for more steps, or with another learning rate.")
    _log.info(f"the teacher that was trained: {line}")
    insist_or_raise(faults)


def _data_lines(data: Data) -> list[tuple[str, str]]:
    parts = {"train": data.train, "search": data.search, "test": data.test}
    counts = ", ".join(f"{name} {len(part):,}" for name, part in parts.items())
    names = ", ".join(data.class_names[:5]) + (", ..." if data.classes > 5 else "")
    channels, height, width = data.image
    lines = [("data", f"{counts} images of {channels} x {height} x {width}; {data.classes} classes ({names})")]
    if data.source:
        lines.append(("folders", data.source))
    train = torch.bincount(data.train.labels, minlength=data.classes)
    few, many = int(train.argmin()), int(train.argmax())
    line = f"{int(train[few]):,} to {int(train[many]):,} training images each"
    if data.is_imbalanced:
        line += f": {data.class_names[few]} has the fewest, {data.class_names[many]} the most; see balanced accuracies"
    lines.append(("classes", line))
    brightest = float(data.train.sample(_TIMED, torch_rng("brightest"))[0].max())
    if brightest < _DARK:
        lines.append(
            (
                "note",
                f"the brightest pixel of {_TIMED} images has {brightest:.1%} of what their type holds: check its bits",
            )
        )
    if len(data.train) < len(data.test):
        lines.append(("note", "there are fewer training than test images. Check that the parts are not exchanged"))
    absent = [name for i, name in enumerate(data.class_names) if not bool((data.test.labels == i).any())]
    if absent:
        lines.append(("note", f"the test part has no image of {', '.join(absent[:5])}"))
    return lines


def _student_line(data: Data, sides: Sequence[int], refusals: list[str], *, decided: bool) -> str:
    """The size of the student's images, and how far it is from the data's."""
    own = data.image[1]
    near = min(sides, key=lambda side: max(side / own, own / side))
    shown = f"{near} x {near}" if len(sides) == 1 else f"{sides[0]} x {sides[0]} to {sides[-1]} x {sides[-1]}"
    if own in sides and data.image[2] == own:
        return f"images of {shown}, as the data's"
    if not decided and max(near / own, own / near) > _FAR:
        refusals.append(
            f"The student would compute on images of {shown}, the data's are {own} x {data.image[2]}. Decide by --size "
            f"{own} or --size {near} (in an experiment: `resolutions` of the space)."
        )
    return f"images of {shown}, resized from {own} x {data.image[2]}"


def _fitted_line(teacher: FitTeacher, data: Data) -> str:
    params, macs = cost(fitted_teacher(data.image, data.classes, teacher.blocks, teacher.width))
    count = f"{teacher.members} of them, " if teacher.members > 1 else ""
    return (
        f"trained here on images of {data.image[1]} x {data.image[2]}: {count}{params:,} params, {macs:,} MACs, "
        f"{teacher.recipe.steps:,} steps; --teacher fit,width=N"
    )


class _Sample(NamedTuple):
    pixels: Tensor
    logits: Tensor
    labels: Tensor
    seconds: float


def _teacher_line(source: Spec, data: Data, advice: str = _CHECK) -> tuple[str, float, list[str]]:
    """What the teacher is and gives on search images, the seconds per image, and what speaks against it."""
    teacher = source.build(Teacher, classes=data.classes, preprocessing=data.preprocessing).to(default_device())
    difference = other_names(teacher, data)
    faults = [f"{difference} Use a teacher of these very classes, in their order."] if difference else []
    known = any(isinstance(m, Teacher) and m.class_names for m in teacher.modules())
    names = "class names differ" if difference else "class names match" if known else "class names unknown"
    size = ""
    if isinstance(teacher, Frozen):
        own, says = teacher.preprocessing, declared_size(teacher.module)
        size = f"images of {own.height} x {own.width}, mean {_short(own.mean)}, std {_short(own.std)}; "
        if teacher.assumes_size and says is not None and says != (own.height, own.width):
            faults.append(
                f"The teacher gets images of {own.height} x {own.width}, but says that it was made for {says[0]} x "
                f"{says[1]}. Return Frozen(module, preprocessing=...) with the size that it was trained with."
            )
    sample = _sample(teacher, data)
    own_faults = list(_own_faults(teacher, data, sample, known)) if isinstance(teacher, Frozen) else []
    faults += own_faults or _output_faults(sample, data, advice)
    hits = sample.logits.argmax(1) == sample.labels
    accuracy = float(hits.float().mean())
    line = f"{size}{names}; {accuracy:.1%} of {len(hits)} search images"
    if data.is_imbalanced:
        line += f", balanced {balanced_accuracy(hits, sample.labels):.1%}"
    return line, sample.seconds, faults


def _own_faults(teacher: Frozen, data: Data, sample: _Sample, is_known: bool) -> Iterator[str]:
    """What speaks against a single network: other class names inside, chance, another normalisation."""
    names, ours = declared_names(teacher.module), [_folded(name) for name in data.class_names]
    theirs = [_folded(name) for name in names or ()]
    if theirs != ours and sorted(theirs) == sorted(ours) and names and not is_known:
        place = next(i for i, pair in enumerate(zip(theirs, ours, strict=True)) if len({*pair}) > 1)
        yield (
            f"The teacher has the data's classes in another order: class {place} is {names[place]!r} to it, and "
            f"{data.class_names[place]!r} in the data. Put its logits into the data's order."
        )
    few = sample.pixels[: max(1, len(sample.pixels[:50]) // 2)]
    again = teacher(few.to(default_device())).logits.cpu()
    if not torch.allclose(again, sample.logits[: len(few)], rtol=1e-2, atol=1e-3, equal_nan=True):
        yield (
            "The teacher gives other logits for an image in another batch: it is random, or uses statistics of the "
            "batch. Switch that off in evaluation mode."
        )
    if not is_known:
        yield from _other_normalisation(teacher, sample)


def _folded(name: str) -> str:
    return "".join(filter(str.isalnum, name.casefold()))


def _other_normalisation(teacher: Frozen, sample: _Sample) -> Iterator[str]:
    """A sentence where the teacher is right far more often on images that are normalised in another usual way."""
    own, labels, device = teacher.preprocessing, sample.labels[:_FEW], default_device()
    hits = sample.logits[:_FEW].argmax(1) == labels
    best, words = hits, ""
    for mean, std in _NORMALISATIONS:
        if len(mean) not in (1, len(own.mean)):
            continue
        values = tuple((numbers * len(own.mean))[: len(own.mean)] for numbers in (mean, std))
        teacher.preprocessing = dataclasses.replace(own, mean=values[0], std=values[1])
        try:
            right = teacher(sample.pixels[:_FEW].to(device)).logits.argmax(1).cpu() == labels
        finally:
            teacher.preprocessing = own
        if right.sum() > best.sum():
            best, words = right, f"mean {_short(values[0])} and std {_short(values[1])}"
    gain, differing = int(best.sum() - hits.sum()), int((best != hits).sum())
    # An eighth of the images, and three standard errors of a difference that is 0.
    if gain >= len(labels) / 8 and gain >= 3 * math.sqrt(differing):
        yield (
            f"The teacher is right for {int(hits.sum())} of {len(labels)} search images, but for {int(best.sum())} "
            f"with {words}. Return Frozen(module, preprocessing=...) with the normalisation that it was trained with."
        )


def _short(values: Sequence[float]) -> str:
    return "/".join(f"{value:.3g}" for value in values)


def _sample(teacher: Teacher, data: Data) -> _Sample:
    pixels, labels = data.search.sample(_NUM_IMAGES, torch_rng("preflight"))
    device, logits = default_device(), []
    began = time.perf_counter()
    for chunk, targets in zip(pixels.split(50), labels.split(50), strict=True):
        try:
            logits.append(teacher(chunk.to(device), targets.to(device)).logits.cpu())
        except (RuntimeError, AssertionError, TypeError, IndexError) as error:
            shape = " x ".join(map(str, pixels.shape[1:]))
            raise ValueError(
                f"the teacher fails on the data's images of {shape} ({str(error).partition(chr(10))[0]}). Use a "
                "teacher for images of these channels, or Frozen with its own preprocessing."
            ) from error
    return _Sample(pixels, torch.cat(logits), labels, (time.perf_counter() - began) / len(labels))


def _output_faults(sample: _Sample, data: Data, advice: str) -> list[str]:
    """What speaks against a teacher's logits: NaN, probabilities, an accuracy near chance."""
    logits = sample.logits
    broken = int((~torch.isfinite(logits)).any(1).sum())
    if broken:
        return [f"The teacher gives NaN or infinity for {broken} of {len(logits)} search images. Check its weights."]
    faults = []
    if logits.min() >= 0 and logits.max() <= 1 and float(logits.std()) > 0:
        sums = "that sum to 1" if torch.allclose(logits.sum(1), torch.ones(len(logits)), atol=1e-3) else "in [0, 1]"
        faults.append(
            f"The teacher gives probabilities ({sums}) instead of logits. Return what is before its softmax or sigmoid."
        )
    order = _displaced(sample, data)
    if order:
        return [*faults, f"The teacher's classes seem to be in another order than the data's: {order}. {advice}"]
    share = balanced_accuracy(logits.argmax(1) == sample.labels, sample.labels)
    chance, count = 1 / data.classes, len(logits)
    # Two standard errors of what guessing gives.
    if share <= chance + 2 * math.sqrt(chance * (1 - chance) / count):
        faults.append(
            f"The teacher's accuracy on {count} search images, {share:.1%} (mean over classes), is near chance "
            f"({chance:.1%}). {advice}"
        )
    return faults


def _displaced(sample: _Sample, data: Data) -> str:
    """Classes of at least five images each that the teacher calls by each other's names, in words; else empty."""
    named: dict[int, int] = {}
    predictions = sample.logits.argmax(1)
    for label, count in enumerate(torch.bincount(sample.labels, minlength=data.classes).tolist()):
        if count >= _ENOUGH:
            calls = torch.bincount(predictions[sample.labels == label], minlength=data.classes)
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


def _device_line() -> str:
    device = default_device()
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads of {os.cpu_count()} cores)"


def _cost_line(
    space: SearchSpace | None, network: Network | None, recipe: Recipe, teacher_seconds: float, folder: Path
) -> str:
    """Steps, a rough time, and what is written, beside what the disk has left."""
    line = f"{recipe.steps:,} steps of {recipe.batch_size} images"
    trained = network or (None if space is None else initialised(lambda: Network(space.blueprint(space.largest)), 0))
    if trained is None:
        return line
    subnets = 1 if space is None else _SUBNETS  # of a supernet about four subnets run in each step
    size = 12 * sum(p.numel() for p in trained.parameters())  # weights, momentum and a copy
    line += f", roughly {duration(_training_seconds(trained, recipe, teacher_seconds, subnets))}"
    free = shutil.disk_usage(next(place for place in (folder, *folder.absolute().parents) if place.is_dir())).free
    line += f"; {max(1, size // 10**6):,} MB on disk"
    return line + (f", but only {free // 10**6:,} MB are free" if free < 3 * size else "")


def _finals_line(space: SearchSpace, trainings: float, recipe: Recipe, teacher_seconds: float) -> str:
    """What the finalists and their controls cost, with the largest network's time."""
    network = initialised(lambda: Network(space.blueprint(space.largest)), 0)
    seconds = trainings * _training_seconds(network, recipe, teacher_seconds)
    return (
        f"with their controls {trainings:.1f} trainings of {recipe.steps:,} steps, roughly {duration(seconds)} at most"
    )


def training_seconds(network: Network, recipe: Recipe, teacher: Teacher, data: Data) -> float:
    """Rough seconds of a training under a teacher, from one batch of each."""
    pixels = data.search.take(torch.arange(min(_TIMED, len(data.search)))).to(default_device())
    teacher = teacher.to(default_device())
    teacher(pixels[:1])
    began = time.perf_counter()
    teacher(pixels)
    each = (time.perf_counter() - began) / len(pixels)
    return _training_seconds(network.to(default_device()), recipe, each)


def _training_seconds(network: Network, recipe: Recipe, teacher_seconds: float, subnets: int = 1) -> float:
    # A backward pass takes about twice as long as a forward pass.
    student = 3 * _forward_seconds(network) * subnets
    return recipe.steps * recipe.batch_size * (teacher_seconds + student)


def _forward_seconds(network: Network) -> float:
    device = next(network.parameters()).device
    images = torch.zeros(_TIMED, *network.blueprint.image, device=device)
    with modes(network), torch.no_grad():
        network(images[:1])
        began = time.perf_counter()
        network(images)
    return (time.perf_counter() - began) / _TIMED


def duration(seconds: float) -> str:
    """Seconds in the unit that fits."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
