"""Scores of a search that several processes compute, each of them once, in parts along the choice tree."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, final

from kdnas.architecture import Architecture
from kdnas.jobs._run import Run
from kdnas.jobs._workers import Message, Wire, Workers
from kdnas.scorers.base import Evidence, LayerCount, Score, Scorer, score_all, tree_order
from kdnas.space import SearchSpace
from kdnas.specs import Spec

_ROUNDS = 4  # parts per process and call: a process that is late holds up the others by one part


@final
@dataclass(frozen=True)
class SideBySide:
    """Scores by the workers of a command, equal to those of one process with one thread; see `Evaluator`.

    Attributes:
        workers: started; they have the run.
        scorer: that of the search.
        num_images: of the evidence.
        seed: of the evidence.
    """

    workers: Workers
    scorer: Spec
    num_images: int
    seed: int

    @property
    def parallel(self) -> int:
        """The number of workers."""
        return self.workers.count

    def __call__(self, architectures: Sequence[Architecture], layer_count: LayerCount) -> list[Score]:
        """The scores, in the order of the architectures."""
        space = self.workers.run.space
        parts = split(space, architectures, _ROUNDS * self.parallel)
        common = {"kind": "scores", "scorer": self.scorer.to_json(), "num_images": self.num_images, "seed": self.seed}
        requests = [
            {**common, "name": f"{len(part)} candidates", "codes": [space.code(architectures[i]) for i in part]}
            for part in parts
        ]
        by_index: dict[int, Score] = {}
        for part, message in zip(parts, self.workers.answers(requests, lambda _: None), strict=True):
            by_index |= zip(part, scores_of(message["end"], layer_count), strict=True)
        return [by_index[index] for index in range(len(architectures))]


def split(space: SearchSpace, architectures: Sequence[Architecture], parts: int) -> list[list[int]]:
    """Indices in at most so many parts of nearly equal size, each of neighbours in the choice tree."""
    order, parts = tree_order(space, architectures), min(parts, len(architectures))
    bounds = [len(order) * part // parts for part in range(parts + 1)]
    return [order[low:high] for low, high in itertools.pairwise(bounds)]


def scored(run: Run, scorer: Scorer, evidence: Evidence, codes: Sequence[str]) -> Message:
    """Scores of the architectures with these codes, as plain JSON."""
    layer_count = LayerCount()
    architectures = [run.space.parse(code) for code in codes]
    scores = score_all(run.supernet, architectures, scorer, evidence, layer_count)
    return {
        "scores": [[score.value, score.parts, score.share] for score in scores],
        "layers": [layer_count.evaluated, layer_count.one_by_one],
    }


def scores_of(message: Message, layer_count: LayerCount) -> list[Score]:
    """The scores in what `scored` returned; adds its layers."""
    evaluated, one_by_one = message["layers"]
    layer_count.evaluated += evaluated
    layer_count.one_by_one += one_by_one
    return [Score(value, parts, share) for value, parts, share in message["scores"]]


def answer(run: Run, request: Mapping[str, Any], wire: Wire) -> Message:
    """What a worker does with a request of `SideBySide`."""
    del wire
    evidence = _evidence(run, request["num_images"], request["seed"])
    return scored(run, run.scorer(Spec.from_json(request["scorer"])), evidence, request["codes"])


@lru_cache(maxsize=1)
def _evidence(run: Run, num_images: int, seed: int) -> Evidence:
    """The evidence of a worker's search, whose cache serves all its parts."""
    return run.evidence(num_images, seed)
