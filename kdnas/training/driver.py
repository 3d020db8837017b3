"""Training with checkpoints, metrics and progress."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdnas.runs.checkpoint import load_state, save_state
from kdnas.runs.files import remove_drafts
from kdnas.runs.folder import Metrics, RunFolder
from kdnas.runs.progress import progress
from kdnas.training.guard import Guard
from kdnas.training.loop import Training

CHECKPOINT_SECONDS = 10.0
Health = Callable[[], dict[str, float]]


def train_with_checkpoints(
    training: Training,
    phase: str,
    checkpoint: Path,
    storage: RunFolder | None,
    watch: Callable[[], dict[str, float]] | None = None,
    after: Callable[[int], None] | None = None,
    guard: Guard | None = None,
) -> float:
    """Take every step that is left, with progress, metrics and checkpoints; returns the seconds of the whole phase.

    Args:
        training: what is left to do.
        phase: its name, in metrics and on the progress line.
        checkpoint: the file to go on from, and to write.
        storage: where metrics go; None for nowhere.
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
    metrics: Metrics | None = None if storage is None else storage.metrics(phase, before=training.index)
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
                record |= {"lr": training.recipe.rate(*training.schedule.curve(index - 1))}
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
