"""One loop for every search: a searcher asks, a scorer scores, the ranking remembers."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

from kdnas.architecture import Architecture
from kdnas.costs.budget import Cost
from kdnas.costs.count import cost
from kdnas.ranking.early_stopping import EarlyStopping
from kdnas.runs.entry import Entry
from kdnas.scorers.base import Evidence, LayerCount, Score, Scorer, score_all
from kdnas.searchers.base import Searcher
from kdnas.space import SearchSpace
from kdnas.supernet import Supernet


@final
@dataclass(frozen=True)
class SearchLimits:
    """When a search ends, whatever comes first.

    Attributes:
        evaluations: unique canonical architectures.
        seconds: wall time, obeyed within one evaluation.
    """

    evaluations: int = 200
    seconds: float = float("inf")


class Uninformative(ValueError):
    """The score does not tell candidates apart."""


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
        layer_count: counts layer evaluations.
        stopping: who may end an evaluation early.
        first: scored before the searcher is asked, which then begins with them.
        after_tell: called with the entries that the searcher has been told, such as to record its trace.

    Raises:
        Uninformative: the first 20 candidates have fewer than 3 distinct scores.
        ValueError: a score is not finite.
    """
    space, began = supernet.space, time.perf_counter()
    scores: dict[Architecture, Entry] = {}
    known = known or {}
    size = 1
    while True:
        room = limits.evaluations - len(scores)
        if room <= 0:
            yield f"{limits.evaluations} unique architectures were evaluated"
            return
        if time.perf_counter() - began >= limits.seconds:
            yield f"the time of {limits.seconds:g} s is over after {len(scores)} unique architectures"
            return
        begins = not scores and bool(first)
        batch = [space.canonical(a) for a in (first[:room] if begins else searcher.ask(room))]
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
            chunk = fresh[place : place + (size if stopping is None else 1)]
            place += len(chunk)
            started = time.perf_counter()
            new = _new_scores(supernet, chunk, known, scorer, evidence, layer_count, stopping)
            _check_finite(new, space, labels[0])
            each = (time.perf_counter() - started) / max(1, len(new))
            if new:
                size = max(1, min(512, int(1.0 / max(each, 1e-4)))) if limits.seconds < float("inf") else 512
            for architecture in chunk:
                score, seconds = (new[architecture], each) if architecture in new else (known[architecture], 0.0)
                scores[architecture] = entry_of(space, architecture, score, seconds, labels)
                yield scores[architecture]
        if len(scores) >= 20 and len({e.score for e in list(scores.values())[:20]}) < 3:
            raise Uninformative(
                f"the score {labels[0]} has fewer than 3 distinct values among the first 20 candidates, so it cannot "
                "rank them. Train the supernet longer, use more search images, or choose another scorer."
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
    layer_count: LayerCount | None,
    stopping: EarlyStopping | None,
) -> dict[Architecture, Score]:
    """Scores of those of a chunk that are not known; the known ones are replayed to the pruner."""
    new = [a for a in chunk if a not in known]
    if stopping is None:
        return dict(zip(new, score_all(supernet, new, scorer, evidence, layer_count), strict=True)) if new else {}
    for architecture in chunk:  # one by one, in order: what is stopped depends on what came before
        if architecture in known:
            stopping.replay(known[architecture])
    return {a: stopping.judge(scorer.rungs(supernet.extract(a), evidence)) for a in new}


def _check_finite(scores: Mapping[Architecture, Score], space: SearchSpace, scorer: str) -> None:
    for architecture, score in scores.items():
        if not math.isfinite(score.value):
            raise ValueError(
                f"the score {scorer} of {space.code(architecture)} is {score.value} and cannot be ranked. "
                "Use more search images or another scorer, or see that network with `kdnas why`."
            )


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
