"""The loop of every search: a searcher proposes, a scorer scores, and entries are yielded."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, final

from kdnas.architecture import Architecture
from kdnas.costs.budget import Cost
from kdnas.costs.count import cost
from kdnas.ranking.early_stopping import EarlyStopping
from kdnas.runs.entry import Entry
from kdnas.scorers.base import Evidence, LayerCount, Score, Scorer, score_all
from kdnas.searchers.base import Searcher, TimeOver
from kdnas.space import SearchSpace
from kdnas.supernet import Supernet


@final
@dataclass(frozen=True)
class SearchLimits:
    """Limits of a search; it ends at the first that is reached.

    Attributes:
        evaluations: distinct canonical architectures.
        seconds: wall time, met within one evaluation; it holds while candidates are proposed too.
    """

    evaluations: int = 200
    seconds: float = float("inf")


class Evaluator(Protocol):
    """Computes scores somewhere else, such as in other processes; equal to those of `kdnas.scorers.base.score_all`."""

    @property
    def parallel(self) -> int:
        """How many architectures are scored at a time."""
        ...

    def __call__(self, architectures: Sequence[Architecture], layer_count: LayerCount) -> list[Score]:
        """Scores of distinct architectures, in their order; adds the layers that were evaluated."""
        ...


class Uninformative(ValueError):
    """The score has too few distinct values to rank candidates."""


def run_search(
    supernet: Supernet,
    scorer: Scorer,
    searcher: Searcher,
    evidence: Evidence,
    limits: SearchLimits,
    *,
    known: dict[Architecture, Score] | None = None,
    labels: tuple[str, str, int] = ("", "", 0),
    layer_count: LayerCount | None = None,
    stopping: EarlyStopping | None = None,
    first: Sequence[Architecture] = (),
    after_tell: Callable[[Sequence[Entry]], None] | None = None,
    evaluate: Evaluator | None = None,
) -> Iterator[Entry | str]:
    """Yields the entry of every new architecture and, last, why the search stopped.

    Args:
        supernet: with the weights.
        scorer: scores each architecture, higher is better.
        searcher: proposes architectures.
        evidence: common to all evaluations.
        limits: when to end.
        known: known scores, such as those of an interrupted search, which are not computed again.
        labels: scorer, searcher and number of the search, for the entries.
        layer_count: counter that layer evaluations are added to.
        stopping: may end evaluations early.
        first: architectures to score first; the searcher begins with their entries.
        after_tell: called with the entries that the searcher has been told, such as to record its trace.
        evaluate: computes new scores; by default this process does. Not with `stopping`.

    Raises:
        Uninformative: the first 20 candidates have fewer than 3 distinct scores.
        ValueError: a score is not finite.
    """
    space, began = supernet.space, time.perf_counter()
    searcher.deadline = began + limits.seconds
    scores: dict[Architecture, Entry] = {}
    known = known or {}
    layer_count = layer_count if layer_count is not None else LayerCount()
    parallel = 1 if evaluate is None else evaluate.parallel
    size = 1
    while True:
        room = limits.evaluations - len(scores)
        if room <= 0:
            yield f"{limits.evaluations} unique architectures were evaluated"
            return
        begins = not scores and bool(first)
        try:
            searcher.check_time()
            batch = [space.canonical(a) for a in (first[:room] if begins else searcher.ask(room))]
        except TimeOver:
            yield f"the time of {limits.seconds:g} s is over after {len(scores)} unique architectures"
            return
        if not batch:
            yield f"{searcher.stopped} after {len(scores)} unique architectures"
            return
        fresh = list(dict.fromkeys(a for a in batch if a not in scores))
        place = 0
        while place < len(fresh):
            if place and time.perf_counter() - began >= limits.seconds:
                yield f"the time of {limits.seconds:g} s is over after {len(scores)} unique architectures"
                return
            # Chunks grow with measured speed, so that the time limit is met within about a second.
            chunk = fresh[place : place + (size * parallel if stopping is None else 1)]
            place += len(chunk)
            started = time.perf_counter()
            if evaluate is None:
                new = _new_scores(supernet, chunk, known, scorer, evidence, layer_count, stopping)
            else:
                missing = [a for a in chunk if a not in known]
                new = dict(zip(missing, evaluate(missing, layer_count), strict=True)) if missing else {}
            _check_finite(new, space, labels[0])
            each = (time.perf_counter() - started) / max(1, len(new)) * parallel
            if new:
                size = max(1, min(512, int(1.0 / max(each, 1e-4)))) if limits.seconds < float("inf") else 512
            for architecture in chunk:
                score, seconds = (
                    (new[architecture], each / parallel) if architecture in new else (known[architecture], 0.0)
                )
                scores[architecture] = entry_of(space, architecture, score, seconds, labels)
                yield scores[architecture]
        if len(scores) >= 20 and len({e.score for e in list(scores.values())[:20]}) < 3:
            raise Uninformative(
                f"score {labels[0]} must have at least 3 distinct values among the first 20 candidates to rank them. "
                "Train the supernet longer, use more search images or use another scorer."
            )
        entries = [scores[a] for a in batch]
        if begins:
            searcher.begin(entries)
        else:
            searcher.tell(entries)
            if after_tell is not None:
                after_tell(entries)


def _new_scores(
    supernet: Supernet,
    chunk: Sequence[Architecture],
    known: Mapping[Architecture, Score],
    scorer: Scorer,
    evidence: Evidence,
    layer_count: LayerCount,
    stopping: EarlyStopping | None,
) -> dict[Architecture, Score]:
    """Scores of the architectures of a chunk that are not known; known ones are replayed to the pruner."""
    new = [a for a in chunk if a not in known]
    if stopping is None:
        return dict(zip(new, score_all(supernet, new, scorer, evidence, layer_count), strict=True)) if new else {}
    for architecture in chunk:  # one by one: a pruner's decision depends on the evaluations before it
        if architecture in known:
            stopping.replay(known[architecture])
    return {a: stopping.judge(scorer.rungs(supernet.extract(a), evidence)) for a in new}


def _check_finite(scores: Mapping[Architecture, Score], space: SearchSpace, scorer: str) -> None:
    for architecture, score in scores.items():
        if not math.isfinite(score.value):
            raise ValueError(
                f"score {scorer} must be finite, got {score.value} for {space.code(architecture)}. Use more search "
                "images or another scorer, or inspect the network with `kdnas why`."
            )


def entry_of(
    space: SearchSpace, architecture: Architecture, score: Score, seconds: float, labels: tuple[str, str, int]
) -> Entry:
    """The entry of an architecture with this score."""
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
