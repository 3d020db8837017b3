"""Monitors supernet training: warns about starved options and collapse, and rolls back once on request."""

import logging
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from kdnas.architecture import Value
from kdnas.runs.checkpoint import load_state, save_state
from kdnas.supernet import Supernet
from kdnas.training.loop import Training

_log = logging.getLogger(__name__)

# Chance alone leaves an option below a tenth of 20 expected uses once in ten million windows.
EXPECTED_USES = 20
STARVED_SHARE = 0.1
NORMS = 20
NORM_CLIFF = 100.0
ACCURACY_CLIFF = 0.5


@final
class Guard:
    """Warns about starved options and about a collapse, which it rolls back once if asked to.

    An option is starved when, over the steps in which it may be sampled, it was trained less than a tenth as often as
    an equal share among the choice's options, and that share is at least 20 uses. A collapse is: the largest
    subnet's accuracy falls below half of the best so far, which was at least twice that of guessing; the gradient's
    norm leaves the range of a hundredth to a hundred times its median over the last 20 records; or a loss or
    that norm is not finite.

    A rollback restores weights, learnable parts and optimizer of the last healthy record and continues with the next
    step: the batches that led to the collapse are not repeated.

    Args:
        training: the training of a supernet.
        checkpoint: the file of the last healthy state; written only with `rollback`.
        rollback: whether to roll a collapse back, once.
    """

    def __init__(self, training: Training, checkpoint: Path, *, rollback: bool) -> None:
        assert isinstance(training.model, Supernet)
        self.training, self.supernet, self.checkpoint = training, training.model, checkpoint
        self.can_roll_back = rollback
        self.best = 0.0
        self.norms: list[float] = []
        self.warned: set[tuple[str, Value]] = set()
        self._since: dict[str, tuple[tuple[Value, ...], dict[Value, int]]] = {}

    def options(self) -> dict[str, dict[str, int]]:
        """How often each option of each choice has been trained."""
        uses = self.supernet.uses
        return {c.name: {str(o): uses[c.name, o] for o in c.options} for c in self.supernet.space.choices}

    def starved(self) -> list[str]:
        """A sentence for every starved option that has not been reported."""
        uses = self.supernet.uses
        if not uses:
            return []  # a distiller that trains blocks or layers apart
        warnings = []
        index = max(0, self.training.index - 1)
        for choice in self.supernet.space.choices:
            allowed = self.training.schedule.options(choice, index)
            counts = {option: uses[choice.name, option] for option in allowed}
            since, before = self._since.setdefault(choice.name, (allowed, counts))
            if since != allowed:
                self._since[choice.name] = allowed, counts
                continue
            new = {option: counts[option] - before[option] for option in allowed}
            due = sum(new.values()) / len(allowed)
            for option, number in new.items():
                if due >= EXPECTED_USES and number < STARVED_SHARE * due and (choice.name, option) not in self.warned:
                    self.warned.add((choice.name, option))
                    warnings.append(
                        f"{choice.name} = {option} is starved: trained {number} times, an equal share is {due:.0f}"
                    )
        return warnings

    def collapse(self, norm: float, accuracy: float | None = None) -> str | None:
        """The sign of a collapse, by the gradient's norm and, if measured, the largest subnet's accuracy; or None."""
        if not math.isfinite(norm):
            return f"the gradient's norm is {norm}"
        if len(self.norms) >= NORMS // 2:
            usual = statistics.median(self.norms)
            if usual > 0 and not 1 / NORM_CLIFF <= norm / usual <= NORM_CLIFF:
                return f"the gradient's norm is {norm:.3g}, its median was {usual:.3g}"
        guessing = 1 / self.supernet.space.classes
        if accuracy is not None and self.best >= 2 * guessing and accuracy < ACCURACY_CLIFF * self.best:
            return f"the largest subnet's accuracy fell from {self.best:.3f} to {accuracy:.3f}"
        return None

    def examine(
        self, accuracies: Mapping[str, float] | None = None, *, error: FloatingPointError | None = None
    ) -> list[str]:
        """Examine the last step, and roll back after a collapse; returns the warnings, which are logged too.

        Args:
            accuracies: of the smallest, a middle and the largest subnet, where they were measured.
            error: the error that the step raised.

        Raises:
            FloatingPointError: `error`, where there is no healthy state to return to.
        """
        norm = float(self.training.gradient_norm)
        largest = None if accuracies is None else accuracies.get("largest")
        warnings = [] if accuracies is None else self.starved()
        sign = str(error) if error is not None else self.collapse(norm, largest)
        if sign is None:
            self.norms = [*self.norms, norm][-NORMS:]
            if largest is not None:
                self.best = max(self.best, largest)
                if self.can_roll_back:
                    save_state(self.checkpoint, self.training.state())
        else:
            warnings.append(f"collapse at step {self.training.index}: {sign}")
            if self.can_roll_back and self.checkpoint.exists():
                warnings.append(self._roll_back())
            elif error is not None:
                raise error
        for warning in warnings:
            _log.warning(warning)
        return warnings

    def state(self) -> dict[str, Any]:
        """The state that a resumed training continues with."""
        return {
            "best": self.best,
            "norms": self.norms,
            "can_roll_back": self.can_roll_back,
            "warned": sorted(self.warned, key=repr),
            "since": {name: [allowed, list(counts.items())] for name, (allowed, counts) in self._since.items()},
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` returned."""
        self.best, self.norms = state["best"], list(state["norms"])
        self.can_roll_back = state["can_roll_back"]
        self.warned = {(name, option) for name, option in state["warned"]}
        self._since = {name: (tuple(allowed), dict(counts)) for name, (allowed, counts) in state["since"].items()}

    def _roll_back(self) -> str:
        state = load_state(self.checkpoint)
        step, state["index"] = state["index"], self.training.index
        self.training.load(state)
        self.can_roll_back = False
        self.norms = []
        return f"rolled back to the weights after step {step}; a second collapse will not be rolled back"
