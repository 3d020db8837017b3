"""DNA's search: every path of every block is rated once, and the best network within a budget is found exactly."""

import time
from typing import Any

import torch
from torch import Tensor

from kdnas.architecture import Architecture
from kdnas.distillers.block_wise import BlockWise, stages_of
from kdnas.jobs._run import Run
from kdnas.network import as_input, modes
from kdnas.ranking.exact import BlockTable, best, blocks_of
from kdnas.ranking.loop import entry_of
from kdnas.runs.entry import Entry
from kdnas.scorers.base import Evidence, Score
from kdnas.settings import Search
from kdnas.supernet import Supernet


def rate_blocks(supernet: Supernet, distiller: BlockWise, evidence: Evidence) -> list[BlockTable]:
    """A table per block for `kdnas.ranking.exact`: every path, its rating and its exact cost.

    The score of a path is minus its relative L1; layers common to all networks (the head, and the stem where it has no
    choices) are a first table with one row. Batch norm uses the evidence's statistics, so that ratings are independent
    of each other. Layers at the start of a block that successive paths share are run once.

    Raises:
        ValueError: a choice belongs to no block or to several, or costs do not add up over blocks.
    """
    space = supernet.space
    groups: dict[str, list[str]] = {}
    for choice, stages in sorted(stages_of(space).items()):
        if len(stages) != 1:
            raise ValueError(
                f"every choice must belong to one block, but {choice} changes layers of blocks {sorted(stages)}. Give "
                "widths that two blocks share, and those of the head, one option."
            )
        groups.setdefault(f"stage{min(stages)}", []).append(choice)
    with modes(supernet), torch.no_grad():
        return blocks_of(space, _Rater(supernet, distiller, evidence, groups), groups)


class _Rater:
    """Rates one path of one block; keeps the activations of the previous path."""

    def __init__(
        self, supernet: Supernet, distiller: BlockWise, evidence: Evidence, groups: dict[str, list[str]]
    ) -> None:
        self.supernet, self.distiller, self.evidence, self.groups = supernet, distiller, evidence, groups
        self.walk: list[tuple[Any, Tensor]] = []

    def __call__(self, name: str, part: Architecture) -> float:
        block, space = int(name.removeprefix("stage")), self.supernet.space
        others = {c: v for c, v in space.smallest.items() if c not in self.groups[name]}
        blueprint = space.blueprint(Architecture({**others, **part}))
        steps: list[Any] = [(block, blueprint.image)]
        if block == 0:
            steps.append(("stem", blueprint.stem))
        steps += [(f"stages.{block}.{place}", layer) for place, layer in enumerate(blueprint.stages[block])]
        shared = 0
        while shared < min(len(self.walk), len(steps)) and self.walk[shared][0] == steps[shared]:
            shared += 1
        del self.walk[shared:]
        for step in steps[shared:]:
            if self.walk:
                x = self.supernet.run(step[0], step[1], self.walk[-1][1], batch_statistics=True)
            elif block == 0:
                x = as_input(self.evidence.images, blueprint)
            else:
                x = self.distiller.entry(block, self.evidence.teacher, blueprint)
            self.walk.append((step, x))
        return -self.distiller.rating(block, self.walk[-1][1], self.evidence.teacher)


def best_networks(run: Run, settings: Search, evidence: Evidence, search: int) -> tuple[list[Entry], str]:
    """The best networks of a run trained block-wise, found exactly, and a sentence on the number of ratings.

    Uses the settings' budget and `num_evaluations`, the number of ranked networks.

    Raises:
        Infeasible: no network is within the budget; the nearest is named.
        ValueError: the run was not trained block-wise, or costs of its space are not additive over blocks.
    """
    space, distiller = run.space, run.distiller
    if not isinstance(distiller, BlockWise):
        raise ValueError(
            f"exact search needs a supernet trained by BlockWise, {run.storage.folder} was trained by "
            f"{type(distiller).__name__}. Train with --distiller block_wise."
        )
    began = time.perf_counter()
    blocks = rate_blocks(run.supernet, distiller, evidence)
    combinations = best(blocks, settings.budget.bounds(), settings.num_evaluations)
    each = (time.perf_counter() - began) / max(1, len(combinations))
    entries = []
    for combination in combinations:
        parts = {b.name: -b.scores[b.options.index(o)] for b, o in zip(blocks, combination.options, strict=True)}
        score = Score(combination.score, {name: value for name, value in parts.items() if name != "fixed"})
        entries.append(
            entry_of(space, space.canonical(combination.architecture), score, each, ("blocks", "exact", search))
        )
    saved = f"{sum(len(b.options) for b in blocks):,} block paths instead of {space.count():,} networks"
    return entries, saved
