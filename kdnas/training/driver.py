"""Training with checkpoints, metrics and progress."""

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self, final

from kdnas.runs.checkpoint import load_state, save_state
from kdnas.runs.files import Damaged, remove_drafts
from kdnas.runs.progress import progress
from kdnas.statistics import share_sentence
from kdnas.training.guard import Guard
from kdnas.training.loop import Training
from kdnas.training.shared import collect

CHECKPOINT_SECONDS = 10.0
_RARE = 50
_log = logging.getLogger(__name__)
Evaluate = Callable[[], dict[str, float]]


class Recorder(Protocol):
    """Where a training's metrics go: a run's folder, or the process that asked for the training."""

    def metrics(self, phase: str, before: int | None = None) -> Any:
        """What writes a phase's lines; those at or after step `before` are taken out first."""
        ...


def train_with_checkpoints(
    training: Training,
    phase: str,
    checkpoint: Path,
    storage: Recorder | None,
    evaluate: Evaluate | None = None,
    after_step: Callable[[int], None] | None = None,
    guard: Guard | None = None,
    until: int | None = None,
) -> float:
    """Take all remaining steps, with progress, metrics and checkpoints; returns the seconds of the whole phase.

    Args:
        training: the training, new or to be resumed.
        phase: its name in metrics and on the progress line.
        checkpoint: the file to resume from, and to write.
        storage: where metrics are written; None for nowhere.
        evaluate: measures accuracies: at the end of every epoch of a guarded supernet, else about eight times.
        after_step: called with the number of steps taken, after each and before the checkpoint that includes it.
        guard: monitors a supernet.
        until: number of steps after which the training pauses; a later call goes on from the checkpoint.

    Raises:
        FloatingPointError: a loss or gradient is not finite, and the training is not rolled back.
    """
    seconds_before = _resume(training, checkpoint, guard)
    began = saved = time.perf_counter()
    metrics = None if storage is None else storage.metrics(phase, before=training.index)
    cadence = Cadence.of(training.recipe.steps, training.epoch_steps, guarded=guard is not None)
    end = training.recipe.steps if until is None else min(until, training.recipe.steps)
    reported: frozenset[str] = frozenset()
    with contextlib.closing(training), progress(phase, end, training.index) as bar:
        while training.index < end:
            number = training.index + 1
            losses, warnings = _step(training, guard, watch=cadence.compares(number), weigh=cadence.weighs(number))
            if after_step is not None:
                after_step(training.index)
            bar.update(training.index, ", ".join(f"{name} {value:.3f}" for name, value in losses.items()))
            if metrics is not None and (cadence.records(training.index) or warnings):
                seconds = round(seconds_before + time.perf_counter() - began, 3)
                metrics.write(**_record(training, cadence, losses, warnings, seconds, evaluate, guard))
                reported = _warn_of_shares(phase, training, reported) if cadence.weighs(training.index) else reported
            if time.perf_counter() - saved >= CHECKPOINT_SECONDS or training.index == end:
                _save(training, checkpoint, guard, seconds_before + time.perf_counter() - began)
                saved = time.perf_counter()
    remove_drafts(checkpoint)
    return round(seconds_before + time.perf_counter() - began, 3)


@final
@dataclass(frozen=True)
class Cadence:
    """Every how many steps something is recorded, evaluated, and the gradients' conflict compared."""

    total: int
    record: int
    evaluation: int
    comparison: int | None
    weighing: int

    @classmethod
    def of(cls, total: int, epoch: int, *, guarded: bool) -> Self:
        """Of a training of so many steps, of which an epoch has so many; `guarded` where a guard watches it."""
        record = max(1, total // 200)
        comparison = record * max(1, total // 50 // record) if guarded else None
        # At most every 50th step: a backward pass for each term is then some hundredths of the whole.
        weighing = record * -(-max(_RARE, total // 20) // record)
        return cls(total, record, epoch if guarded else max(epoch, total // 8), comparison, weighing)

    def evaluates(self, step: int) -> bool:
        """Whether accuracies are measured after so many steps."""
        return step % self.evaluation == 0 or step == self.total

    def records(self, step: int) -> bool:
        """Whether a line is written after so many steps."""
        return step % self.record == 0 or self.evaluates(step)

    def weighs(self, step: int) -> bool:
        """Whether the shares of the loss terms are measured in the step that makes so many."""
        return step % self.weighing == 0

    def compares(self, step: int) -> bool:
        """Whether the step that makes so many is watched."""
        return self.comparison is not None and (self.evaluates(step) or step % self.comparison == 0)


def _resume(training: Training, checkpoint: Path, guard: Guard | None) -> float:
    """Continue from the checkpoint, if there is one; returns the seconds that the steps before it took."""
    if not checkpoint.exists():
        return 0.0
    state = load_state(checkpoint)
    try:
        training.load(state["training"])
        if guard is not None:
            guard.load(state["guard"])
        return float(state["seconds"])
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise Damaged(checkpoint, f"holds no training ({error!r})", "Remove it to start the phase again.") from error


def _save(training: Training, checkpoint: Path, guard: Guard | None, seconds: float) -> None:
    state = {"training": training.state(), "seconds": seconds}
    save_state(checkpoint, state if guard is None else state | {"guard": guard.state()})


def _step(training: Training, guard: Guard | None, *, watch: bool, weigh: bool) -> tuple[dict[str, float], list[str]]:
    """One step's losses; after an error that the guard rolls back, the guard's warnings instead."""
    try:
        return training.step(watch=watch, weigh=weigh), []
    except FloatingPointError as error:
        if guard is None:
            raise
        warnings = guard.examine(error=error)
        training.index += 1  # that step is left out
        return {}, warnings


def _record(
    training: Training,
    cadence: Cadence,
    losses: dict[str, float],
    warnings: list[str],
    seconds: float,
    evaluate: Evaluate | None,
    guard: Guard | None,
) -> dict[str, Any]:
    """A line of the metrics, for the step that was just taken."""
    step = training.index
    record: dict[str, Any] = {"step": step - 1, "total": cadence.total, "losses": losses, "seconds": seconds}
    record["lr"] = training.rate(step - 1)
    if cadence.compares(step) and training.conflict is not None:
        record["conflict"] = training.conflict
    if cadence.weighs(step) and training.shares:
        record["terms"] = {name: share._asdict() for name, share in training.shares.items()}
    accuracies = None
    if evaluate is not None and cadence.evaluates(step):
        collect(training)
        accuracies = evaluate()
    if accuracies is not None:
        record |= {"accuracy": accuracies["accuracy"]} if "accuracy" in accuracies else {"health": accuracies}
    if guard is not None:
        record["gradient_norm"] = float(training.gradient_norm)
        record |= {} if accuracies is None else {"options": guard.options()}
        warnings = warnings + guard.examine(accuracies)
        record |= {"warnings": warnings} if warnings else {}
    return record


def _warn_of_shares(phase: str, training: Training, before: frozenset[str]) -> frozenset[str]:
    """Warn of terms that make nearly all of the gradient, or nearly none, each once; returns those warned of so far."""
    sentences = {
        name: share_sentence(name, share.gradient, len(training.shares)) for name, share in training.shares.items()
    }
    new = {name for name, sentence in sentences.items() if sentence and name not in before}
    for name in sorted(new):
        _log.warning(f"{phase}, step {training.index}: {sentences[name]}")
    return before | new
