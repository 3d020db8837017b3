"""Looks after a supernet in training: what was trained how often, and whether it still learns."""

import math
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from kdnas.architecture import Value
from kdnas.runs.checkpoint import load_state, save_state
from kdnas.supernet import Supernet
from kdnas.training.loop import Training

# Chance alone leaves an option below a tenth of 20 expected uses once in ten million windows.
EXPECTED_USES = 20
STARVED_SHARE = 0.1
NORMS = 20
NORM_CLIFF = 100.0
ACCURACY_CLIFF = 0.5


@final
class Guard:
    """Warns of starved options and of a collapse, and takes the weights back once where that is asked for.

    An option is starved when, over the steps in which it may be drawn, it was trained less than a tenth as often as an
    equal share among the choice's options, of which at least 20 uses were due. A collapse is: the largest
    subnet's accuracy falls below half of the best so far, which was at least twice that of guessing; the gradient's
    norm leaves the range of a hundredth to a hundred times its median over the last 20 records; or a loss or
    that norm is not finite.

    A rollback restores weights, learnable parts and optimiser of the last healthy record, and goes on with the next
    step: the batches that led to the collapse are not seen again.

    Args:
        training: of a supernet.
        place: the file that keeps the last healthy state; written only where `rollback` is asked for.
        rollback: whether to take a collapse back, once.
    """

    def __init__(self, training: Training, place: Path, *, rollback: bool) -> None:
        assert isinstance(training.model, Supernet)
        self.training, self.supernet, self.place = training, training.model, place
        self.can_roll_back = rollback
        self.best = 0.0
        self.norms: list[float] = []
        self.warned: set[tuple[str, Value]] = set()
        self._since: dict[str, tuple[tuple[Value, ...], dict[Value, int]]] = {}

    def options(self) -> dict[str, dict[str, int]]:
        """How often each option of each choice was trained so far."""
        uses = self.supernet.uses
        return {c.name: {str(o): uses[c.name, o] for o in c.options} for c in self.supernet.space.choices}

    def starved(self) -> list[str]:
        """A sentence for every option that is starved and was not reported before."""
        if not self.supernet.uses:
            return []  # a distiller that trains blocks or layers apart
        uses, found = self.supernet.uses, []
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
                    found.append(
                        f"{choice.name} = {option} is starved: trained {number} times, an equal share is {due:.0f}"
                    )
        return found

    def collapse(self, norm: float, accuracy: float | None = None) -> str | None:
        """What collapsed, by the gradient's norm and, where it was measured, the largest subnet's accuracy."""
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

    def examine(self, seen: Mapping[str, float] | None = None, *, error: FloatingPointError | None = None) -> list[str]:
        """Look at the last step; returns warnings, said on stderr too, and rolls back where that is due.

        Args:
            seen: the accuracies, where they were measured.
            error: what the step raised.

        Raises:
            FloatingPointError: `error`, where there is no healthy state to go back to.
        """
        norm = float(self.training.gradient_norm)
        largest = None if seen is None else seen.get("largest")
        warnings = [] if seen is None else self.starved()
        found = str(error) if error is not None else self.collapse(norm, largest)
        if found is None:
            self.norms = [*self.norms, norm][-NORMS:]
            if largest is not None:
                self.best = max(self.best, largest)
                if self.can_roll_back:
                    save_state(self.place, self.training.state())
        else:
            warnings.append(f"collapse at step {self.training.index}: {found}")
            if self.can_roll_back and self.place.exists():
                warnings.append(self._roll_back())
            elif error is not None:
                raise error
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr, flush=True)
        return warnings

    def state(self) -> dict[str, Any]:
        """What a resumed training goes on with."""
        return {
            "best": self.best,
            "norms": self.norms,
            "can_roll_back": self.can_roll_back,
            "warned": sorted(self.warned, key=repr),
            "since": {name: [allowed, list(counts.items())] for name, (allowed, counts) in self._since.items()},
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.best, self.norms = state["best"], list(state["norms"])
        self.can_roll_back = state["can_roll_back"]
        self.warned = {(name, option) for name, option in state["warned"]}
        self._since = {name: (tuple(allowed), dict(counts)) for name, (allowed, counts) in state["since"].items()}

    def _roll_back(self) -> str:
        good = load_state(self.place)
        place, good["index"] = good["index"], self.training.index
        self.training.load(good)
        self.can_roll_back = False
        self.norms = []
        return f"rolled back to the weights after step {place}; the training goes on from there, and not a second time"
