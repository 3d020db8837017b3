"""One loop for every search: a searcher asks, a scorer scores, the ranking remembers."""

import abc
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from kdnas.architecture import Architecture
from kdnas.cost import Cost, cost
from kdnas.meter import Meter
from kdnas.scoring import Evidence, Saved, Score, Scorer, score_all
from kdnas.space import SearchSpace
from kdnas.stopping import Stopping
from kdnas.supernet import Supernet

RANDOM, CONTRAST = "random control", "contrast"
"""An entry's `searcher` where it is a control's: random search, and the same search under another score."""


@final
@dataclass(frozen=True)
class Entry:
    """One scored architecture.

    Attributes:
        share: how much of the whole evaluation its score took; below 1 it was stopped early.
        spent: of memory in bytes and latency in seconds, where the search bounds them.
    """

    architecture: Architecture
    code: str
    score: float
    parts: dict[str, float]
    params: int
    macs: int
    layers: int
    seconds: float
    scorer: str = ""
    searcher: str = ""
    search: int = 0
    share: float = 1.0
    spent: dict[str, float] = field(default_factory=dict)

    @property
    def is_control(self) -> bool:
        """Whether a control asked for it, not the search itself."""
        return self.searcher in (RANDOM, CONTRAST)

    def to_json(self) -> dict[str, Any]:
        """One line of `ranking.jsonl`."""
        return {**self.__dict__, "architecture": dict(self.architecture)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Entry":
        """The entry of a line of `ranking.jsonl`."""
        held: dict[str, Any] = {**value, "architecture": Architecture(value["architecture"])}
        return cls(**held)


class Searcher(abc.ABC):
    """Proposes architectures and learns from their scores.

    Built at run time with `space`, `admits` (a test for the budget) and `rng`; everything random is drawn from `rng`,
    so that told the same scores it asks the same questions: that is how a search is resumed.

    Class attributes:
        stopped: why the last `ask` returned nothing.
    """

    def __init__(self, *, space: SearchSpace, admits: Callable[[Architecture], bool], rng: random.Random) -> None:
        self.space, self.admits, self.rng = space, admits, rng

    @abc.abstractmethod
    def ask(self, limit: int) -> Sequence[Architecture]:
        """At most `limit` admitted architectures to score next; none when it is done, and `stopped` says why."""

    @abc.abstractmethod
    def tell(self, scored: Sequence[Entry]) -> None:
        """The scores of what was asked, in that order; of those stopped early, the scores of then."""

    def begin(self, scored: Sequence[Entry]) -> None:
        """Scores of networks that it did not ask for, before it is asked first. Ignored unless overridden."""

    def trace(self) -> dict[str, float]:
        """Numbers worth a curve, after what was told last: such as the entropy of a policy. None unless overridden."""
        return {}

    stopped: str = "it is done"
    _tight: bool = False

    @final
    def sample(self, attempts: int = 200) -> Architecture | None:
        """A random admitted architecture, or None.

        When `attempts` uniform draws found none, the budget is tight: from then on a random walk of mutations from the
        smallest network, within the budget, takes their place.
        """
        for _ in range(0 if self._tight else attempts):
            candidate = self.space.sample(self.rng)
            if self.admits(candidate):
                return candidate
        self._tight = True
        walked = self.space.smallest
        if not self.admits(walked):
            return None
        for _ in range(self.rng.randrange(12)):
            mutant = self.space.mutate(walked, self.rng)
            walked = mutant if self.admits(mutant) else walked
        return walked


class Infeasible(ValueError):
    """No network of the space is within the budget, or none was found; the message names the nearest."""


def check_feasible(meter: Meter, rng: random.Random, attempts: int = 1000) -> None:
    """Raise `Infeasible` when neither the smallest network nor any of many draws is within the budget."""
    space = meter.space
    nearest, excess = space.smallest, meter.excess(space.smallest)
    if excess <= 0:
        return
    current = nearest
    for _ in range(attempts):
        candidate = space.mutate(current, rng) if rng.random() < 0.8 else space.sample(rng)
        found = meter.excess(candidate)
        if found <= 0:
            return
        if found < excess:
            nearest = current = candidate
            excess = found
    raise Infeasible(
        f"infeasible: no network found with {meter.budget}; the nearest is {space.code(nearest)} with "
        f"{meter.says(nearest)}. Raise the budget, or use a space with smaller networks."
    )


@final
@dataclass(frozen=True)
class Limits:
    """When a search ends, whatever comes first.

    Attributes:
        evaluations: unique canonical architectures.
        seconds: wall time, obeyed within one evaluation.
    """

    evaluations: int = 200
    seconds: float = float("inf")


class Uninformative(ValueError):
    """The score does not tell candidates apart."""


def search(
    supernet: Supernet,
    scorer: Scorer,
    searcher: Searcher,
    evidence: Evidence,
    limits: Limits,
    *,
    known: dict[Architecture, Score] | None = None,
    labels: tuple[str, str, int] = ("", "", 0),
    saved: Saved | None = None,
    stopping: Stopping | None = None,
    first: Sequence[Architecture] = (),
) -> Iterator[Entry | str]:
    """Yields every newly scored architecture, and at last why the search stopped.

    Args:
        supernet: where the weights are.
        scorer: higher is better.
        searcher: who asks.
        evidence: what students are judged on.
        limits: when to end.
        known: scores that need no computing again: an interrupted search's, replayed to the searcher.
        labels: names of scorer and searcher and the search's number, for the ranking.
        saved: counts layer evaluations.
        stopping: who may end an evaluation early.
        first: scored before the searcher is asked, which then begins with them.

    Raises:
        Uninformative: the first 20 candidates have fewer than 3 distinct scores.
        ValueError: a score is not finite.
    """
    space, began = supernet.space, time.perf_counter()
    scores: dict[Architecture, Entry] = {}
    replayed = known or {}
    chunk = 1
    while True:
        room = limits.evaluations - len(scores)
        if room <= 0:
            yield f"{limits.evaluations} unique architectures were evaluated"
            return
        if time.perf_counter() - began >= limits.seconds:
            yield f"the time of {limits.seconds:g} s is over after {len(scores)} unique architectures"
            return
        begins = not scores and bool(first)
        asked = [space.canonical(a) for a in (first[:room] if begins else searcher.ask(room))]
        if not asked:
            yield f"{searcher.stopped} after {len(scores)} unique architectures"
            return
        fresh = list(dict.fromkeys(a for a in asked if a not in scores))
        place = 0
        while place < len(fresh):
            if place and time.perf_counter() - began >= limits.seconds:
                yield f"the time of {limits.seconds:g} s is over after {len(scores)} unique architectures"
                return
            # Chunks grow with measured speed, so that the time limit is met within about a second.
            some = fresh[place : place + (chunk if stopping is None else 1)]
            place += len(some)
            started = time.perf_counter()
            new = [a for a in some if a not in replayed]
            if stopping is None:
                found = score_all(supernet, new, scorer, evidence, saved) if new else []
            else:  # one by one, in order: what is stopped depends on what came before
                for architecture in some:
                    if architecture in replayed:
                        stopping.replay(replayed[architecture])
                found = [stopping.judge(scorer.rungs(supernet.extract(a), evidence)) for a in new]
            values = dict(zip(new, found, strict=True))
            for architecture, value in values.items():
                if not math.isfinite(value.value):
                    raise ValueError(
                        f"the score {labels[0]} of {space.code(architecture)} is {value.value} and cannot be ranked. "
                        "Use more search images or another scorer, or see that network with `kdnas why`."
                    )
            each = (time.perf_counter() - started) / max(1, len(new))
            if new:
                chunk = max(1, min(512, int(1.0 / max(each, 1e-4)))) if limits.seconds < float("inf") else 512
            for architecture in some:
                value = values.get(architecture) or replayed[architecture]
                entry = entry_of(space, architecture, value, each if architecture in values else 0.0, labels)
                scores[architecture] = entry
                yield entry
        if len(scores) >= 20 and len({e.score for e in list(scores.values())[:20]}) < 3:
            raise Uninformative(
                f"the score {labels[0]} has fewer than 3 distinct values among the first 20 candidates, so it "
                f"cannot rank "
                "them. Train the supernet longer, use more search images, or choose another scorer."
            )
        (searcher.begin if begins else searcher.tell)([scores[a] for a in asked])


def entry_of(
    space: SearchSpace, architecture: Architecture, score: Score, seconds: float, labels: tuple[str, str, int]
) -> Entry:
    """The ranking's entry of a score."""
    blueprint = space.blueprint(architecture)
    c: Cost = cost(blueprint)
    return Entry(
        architecture,
        space.code(architecture),
        score.value,
        score.parts,
        c.params,
        c.macs,
        sum(map(len, blueprint.stages)),
        round(seconds, 6),
        *labels,
        share=score.share,
    )


def ranked(entries: Sequence[Entry]) -> list[Entry]:
    """Best first; ties go to the network that uses more of the budget (more MACs), then by code.

    Those whose evaluation was stopped early come after those that went further: their scores are not comparable.
    """
    return sorted(entries, key=lambda e: (-e.share, -e.score, -e.macs, e.code))
