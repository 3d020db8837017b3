"""Training phases: the teacher, where one is trained here, and the supernet."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdnas.checkpoint import load_state, remove_drafts, save_state
from kdnas.cost import cost
from kdnas.data import Data, Images
from kdnas.distillers.from_labels import FromLabels
from kdnas.jobs.guard import Guard
from kdnas.jobs.opened import Opened, default_device
from kdnas.jobs.settings import Experiment
from kdnas.network import Network
from kdnas.outputs import Outputs
from kdnas.progress import progress
from kdnas.run import CHECKPOINT, MEMBERS, SNAPSHOTS, TEACHER, Metrics, Run
from kdnas.spec import Spec
from kdnas.student import Card, write_student
from kdnas.supernet import Supernet
from kdnas.teacher_cache import cached
from kdnas.teachers import Teacher, fitted_teacher
from kdnas.training import Distiller, Training, initialised

CHECKPOINT_SECONDS = 10.0
TEACHER_CACHE = "teacher_cache"
Health = Callable[[], dict[str, float]]


def train(experiment: Experiment, folder: Path) -> Opened:
    """Train the teacher and the supernet, where the run trains them; goes on where it was interrupted.

    Raises:
        ValueError: the folder holds something else, the data or the teacher do not fit.
    """
    run = Run.create(folder, experiment.to_json(), experiment.train.recipe.seed)
    opened = Opened(run.folder)
    if experiment.train.teacher is None and run.phase("teacher") is None:
        _train_teacher(opened)
        opened = Opened(run.folder)
    # What a kill left between the last line of a finished teacher and the end of its draft.
    for left in (*run.folder.glob("teacher*.draft.safetensors"), *run.folder.glob(".teacher*.draft")):
        left.unlink(missing_ok=True)
    if opened.run.phase("train") is None and experiment.train.distiller is not None:
        _train_supernet(opened, experiment.train.distiller)
    return opened


def _train_teacher(opened: Opened) -> None:
    settings, run = opened.experiment.train, opened.run
    last = settings.teacher_members
    rows = []
    for member in range(1, last + 1):
        phase = "teacher" if last == 1 else f"teacher {member}"
        rows.append(run.phase(phase) or _train_member(opened, phase, member))
    if last > 1:
        ensemble = Opened(run.folder).teacher.to(default_device())
        row = {name: sum(one[name] for one in rows) for name in ("params", "macs", "seconds")}
        run.finish("teacher", accuracy=teacher_accuracy(ensemble, opened.data.test), **row)
    run.record_result({"name": "teacher", **run.require("teacher", "kdnas train")})


def _train_member(opened: Opened, phase: str, member: int) -> dict[str, Any]:
    settings, data, run = opened.experiment.train, opened.data, opened.run
    recipe = dataclasses.replace(settings.teacher_recipe, seed=settings.teacher_recipe.seed + member - 1)
    image = (data.channels, data.preprocessing.height, data.preprocessing.width)
    blueprint = fitted_teacher(image, data.classes, settings.teacher_blocks)
    network = initialised(lambda: Network(blueprint), recipe.seed)
    training = Training(network, FromLabels(label_smoothing=0.1), data, None, recipe, default_device())
    draft = run.path(f"{phase.replace(' ', '-')}.draft.safetensors")
    card = Card(
        architecture=None,
        space=None,
        blueprint=blueprint,
        cost=cost(blueprint),
        preprocessing=data.preprocessing,
        class_names=data.class_names,
        origin={"role": "teacher", "seed": recipe.seed},
    )
    count = settings.teacher_snapshots
    due = {recipe.steps * k // count: k for k in range(1, count)}

    def keep(step: int) -> None:
        if step in due:
            write_student(run.path(SNAPSHOTS, str(due[step])), network, card, deploy=False)

    seconds = drive(training, phase, draft, run, lambda: {"accuracy": accuracy(network, data.search, data)}, keep)
    found = accuracy(network, data.test, data)
    folder = run.path(TEACHER) if member == settings.teacher_members else run.path(MEMBERS, str(member))
    write_student(folder, network.cpu(), card, deploy=False)
    c = card.cost
    run.finish(phase, seconds=seconds, accuracy=found, params=c.params, macs=c.macs)
    draft.unlink(missing_ok=True)
    return run.require(phase, "kdnas train")


def teacher_accuracy(teacher: Teacher, part: Images) -> float:
    """Share of a part's images that a teacher classifies right."""
    hits = []
    for chunk in torch.arange(len(part)).split(500):
        pixels, labels = part.take(chunk).to(default_device()), part.labels[chunk].to(default_device())
        hits.append(teacher(pixels, labels).logits.argmax(1) == labels)
    return float(torch.cat(hits).float().mean())


def _train_supernet(opened: Opened, taught: Spec) -> None:
    settings, run = opened.experiment.train, opened.run
    supernet = opened.fresh_supernet()
    distiller = taught.build(Distiller)
    teacher, data, device = opened.teacher, opened.data, opened.device
    cache = None
    if settings.teacher_views:
        options = {"seed": settings.recipe.seed, "views": settings.teacher_views, "limit": settings.cache_limit}
        cache = cached(run.path(TEACHER_CACHE), teacher.to(device), data, device=device, **options)
    training = Training(supernet, distiller, data, teacher, settings.recipe, device, cache)
    guard = Guard(training, run.path("healthy.safetensors"), rollback=settings.rollback)
    seconds = drive(training, "train", run.path(CHECKPOINT), run, lambda: health(supernet, opened.data), guard=guard)
    guard.place.unlink(missing_ok=True)
    remove_drafts(guard.place)
    run.finish("train", seconds=seconds, steps=settings.recipe.steps, **health(supernet, opened.data))


def drive(
    training: Training,
    phase: str,
    checkpoint: Path,
    run: Run | None,
    watch: Callable[[], dict[str, float]] | None = None,
    after: Callable[[int], None] | None = None,
    guard: Guard | None = None,
) -> float:
    """Take every step that is left, with progress, metrics and checkpoints; returns the seconds of the whole phase.

    Args:
        training: what is left to do.
        phase: its name, in metrics and on the progress line.
        checkpoint: the file to go on from, and to write.
        run: where metrics go; None for nowhere.
        watch: what to measure now and then.
        after: called with the number of steps taken, after each and before the checkpoint that holds it.
        guard: looks after a supernet.

    Raises:
        FloatingPointError: a loss is not finite, and nobody takes the training back.
    """
    spent = 0.0
    if checkpoint.exists():
        state = load_state(checkpoint)
        training.load(state["training"])
        spent = state["seconds"]
        if guard is not None:
            guard.load(state["guard"])
    metrics: Metrics | None = None if run is None else run.metrics(phase, before=training.index)
    total = training.recipe.steps
    each = max(1, total // 200)
    # A supernet's health is recorded at the end of every epoch, a single network's accuracy about eight times.
    watched = training.epoch_steps if guard is not None else max(training.epoch_steps, total // 8)
    compared = each * max(1, total // 50 // each)
    began = saved = time.perf_counter()
    with progress(phase, total, training.index) as bar:
        while not training.done:
            ends = (training.index + 1) % watched == 0 or training.index + 1 == total
            compares = guard is not None and (ends or (training.index + 1) % compared == 0)
            warnings: list[str] = []
            try:
                losses = training.step(watch=compares)
            except FloatingPointError as error:
                if guard is None:
                    raise
                losses, warnings = {}, guard.examine(error=error)
                training.index += 1  # that step is left out
            index = training.index
            if after is not None:
                after(index)
            bar.update(index, ", ".join(f"{name} {value:.3f}" for name, value in losses.items()))
            if metrics is not None and (index % each == 0 or ends or warnings):
                record: dict[str, Any] = {"step": index - 1, "total": total, "losses": losses}
                record |= {"seconds": round(spent + time.perf_counter() - began, 3)}
                record |= {"lr": training.recipe.rate(*training.distiller.cycle(index - 1, total))}
                seen = None
                if compares and training.conflict is not None:
                    record |= {"conflict": training.conflict}
                if watch is not None and ends:
                    seen = watch()
                    record |= {"accuracy": seen["accuracy"]} if "accuracy" in seen else {"health": seen}
                if guard is not None:
                    record |= {"gradient_norm": float(training.gradient_norm)}
                    record |= {} if seen is None else {"options": guard.options()}
                    warnings += guard.examine(seen)
                    record |= {"warnings": warnings} if warnings else {}
                metrics.write(**record)
            if time.perf_counter() - saved >= CHECKPOINT_SECONDS or training.done:
                elapsed = spent + time.perf_counter() - began
                state = {"training": training.state(), "seconds": elapsed}
                save_state(checkpoint, state if guard is None else state | {"guard": guard.state()})
                saved = time.perf_counter()
    remove_drafts(checkpoint)
    return round(spent + time.perf_counter() - began, 3)


def health(supernet: Supernet, data: Data, most: int = 1000) -> dict[str, float]:
    """Accuracy on search images of the smallest, a middle and the largest subnet, by batch statistics."""
    part, space = data.search, supernet.space
    device = next(supernet.parameters()).device
    chosen = torch.arange(min(most, len(part)))
    images, labels = data.normalise(part.take(chosen).to(device)), part.labels[chosen].to(device)
    middle = space.decide(lambda choice: choice.options[len(choice.options) // 2])
    was_training = supernet.training
    supernet.eval()
    found = {}
    with torch.no_grad():
        for name, one in (("smallest", space.smallest), ("middle", middle), ("largest", space.largest)):
            logits = supernet(images, one, batch_statistics=True).logits
            found[name] = float((logits.argmax(1) == labels).float().mean())
    supernet.train(was_training)
    return found


def accuracy(network: nn.Module, part: Images, data: Data) -> float:
    """Share of a part's images that the network, in evaluation mode, classifies right."""
    return float(correct(network, part, data).float().mean())


def correct(network: nn.Module, part: Images, data: Data) -> Tensor:
    """Which of a part's images are classified right, `[count]`; the network keeps its mode."""
    device = next(network.parameters()).device
    was_training = network.training
    network.eval()
    found = []
    with torch.no_grad():
        for chunk in torch.arange(len(part)).split(500):
            outputs = network(data.normalise(part.take(chunk).to(device)))
            logits = outputs.logits if isinstance(outputs, Outputs) else outputs
            found.append(logits.argmax(1).cpu() == part.labels[chunk])
    network.train(was_training)
    return torch.cat(found)
