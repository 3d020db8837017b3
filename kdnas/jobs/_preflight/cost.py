"""Roughly what a training costs, from one batch."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from kdnas.data.base import Data
from kdnas.jobs._preflight.findings import Finding, notes
from kdnas.network import Network, default_device, modes
from kdnas.randomness import initialised
from kdnas.settings import Recipe
from kdnas.space import SearchSpace
from kdnas.teachers.base import Teacher

_TIMED = 8  # images of the smallest batch by which a step's time is estimated
_ENOUGH = 0.1  # seconds of a batch that say what a longer one takes
_SUBNETS = 4
_RATES = {"sgd": (1e-5, 5.0), "adamw": (1e-7, 0.1)}


def cost_findings(
    space: SearchSpace | None, network: Network | None, recipe: Recipe, teacher_seconds: float, folder: Path
) -> list[Finding]:
    """Steps, a rough time, and what is written, beside what the disk has left."""
    line = f"{recipe.steps:,} steps of {recipe.batch_size} images"
    trained = network or (None if space is None else largest_network(space))
    if trained is None:
        return [Finding("training", line)]
    subnets = 1 if space is None else _SUBNETS  # of a supernet about four subnets run in each step
    size = 12 * sum(p.numel() for p in trained.parameters())  # weights, momentum and a copy
    line += f", roughly {duration(_training_seconds(trained, recipe, teacher_seconds, subnets))}"
    line += f"; {max(1, size // 10**6):,} MB on disk"
    free = shutil.disk_usage(existing(folder)).free
    few = f"only {free // 10**6:,} MB are free there, and about {3 * size // 10**6:,} MB are needed. Free some, or use "
    return [Finding("training", line), *notes("disk", f"{few}another --out" if free < 3 * size else "")]


def existing(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    return next(place for place in (folder, *folder.absolute().parents) if place.is_dir())


def recipe_findings(recipe: Recipe, data: Data) -> list[Finding]:
    """Notes on a batch larger than the data, and a learning rate far outside of the usual."""
    low, high = _RATES[recipe.optimizer]
    rate, size, count = recipe.learning_rate, recipe.batch_size, len(data.train)
    return notes(
        "training",
        f"`batch_size` is {size}, but there are {count} training images, so that every batch is all of them. Lower it"
        if size > count
        else "",
        f"`learning_rate` {rate:g} is far from what {recipe.optimizer} trains with, {low:g} to {high:g}. Try "
        f"{0.1 if recipe.optimizer == 'sgd' else 0.001:g}"
        if not low <= rate <= high
        else "",
    )


def finals_finding(network: Network, trainings: float, recipe: Recipe, teacher_seconds: float) -> Finding:
    """What all trainings of students cost, controls and trials among them, with the time of a large one."""
    seconds = trainings * _training_seconds(network, recipe, teacher_seconds)
    return Finding(
        "finalists",
        f"with their controls {trainings:.1f} trainings of {recipe.steps:,} steps, roughly {duration(seconds)} at most",
    )


def largest_network(space: SearchSpace) -> Network:
    """The space's largest network with fresh weights."""
    return initialised(lambda: Network(space.blueprint(space.largest)), 0)


def training_seconds(network: Network, recipe: Recipe, teacher: Teacher, data: Data) -> float:
    """Rough seconds of a training under a teacher, from one batch of each."""
    device = default_device()
    pixels = data.search.take(torch.arange(min(recipe.batch_size, len(data.search)))).to(device)
    teacher = teacher.to(device)
    return _training_seconds(network.to(device), recipe, image_seconds(teacher, pixels))


def _training_seconds(network: Network, recipe: Recipe, teacher_seconds: float, subnets: int = 1) -> float:
    # A backward pass takes about twice as long as a forward pass.
    device = next(network.parameters()).device
    images = torch.zeros(1, *network.blueprint.image, device=device).expand(recipe.batch_size, -1, -1, -1)
    with modes(network), torch.no_grad():
        student = 3 * image_seconds(network, images) * subnets
    return recipe.steps * recipe.batch_size * (teacher_seconds + student)


def image_seconds(call: Callable[[Tensor], object], images: Tensor) -> float:
    """Seconds that a forward pass takes for an image of a batch.

    A few images say it of a network that takes long for them; of one that does not, most of it would be the call itself
    and not the image, so that four times as many are timed, and so on up to all of them.
    """
    call(images[:1])
    count = min(_TIMED, len(images))
    while True:
        began = time.perf_counter()
        call(images[:count])
        seconds = time.perf_counter() - began
        if count == len(images) or seconds > _ENOUGH:
            return seconds / count
        count = min(len(images), 4 * count)


def duration(seconds: float) -> str:
    """Seconds in the unit that fits."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
