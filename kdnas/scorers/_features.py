"""What a predictor knows of networks: their choices, their size, and their similarities to the largest subnet."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kdnas.architecture import Architecture
from kdnas.costs.count import cost
from kdnas.scorers.base import Evidence, Score, Scorer, score_by_all
from kdnas.scorers.cka import Cka
from kdnas.scorers.in_place import InPlace
from kdnas.scorers.loss import Loss
from kdnas.scorers.rdm import Rdm
from kdnas.space import SearchSpace
from kdnas.specs import spec
from kdnas.supernet import Supernet


class Features(NamedTuple):
    """Columns of networks, and which of them are alike.

    Attributes:
        values: `[networks, features]`.
        groups: columns of each group.
    """

    values: np.ndarray
    groups: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, *parts: np.ndarray) -> "Features":
        """Groups side by side, each `[networks, features]`."""
        ends = np.cumsum([0, *(part.shape[1] for part in parts)])
        groups = tuple(tuple(range(a, b)) for a, b in itertools.pairwise(ends) if b > a)
        return cls(np.concatenate(parts, 1), groups)


def choices(space: SearchSpace, architectures: Sequence[Architecture]) -> np.ndarray:
    """One-hot choices, `[networks, options of all choices]`; a choice that a network does not have is all zeros."""
    columns = [(choice.name, option) for choice in space.choices for option in choice.options]
    return np.array([[float(a.get(name) == option) for name, option in columns] for a in architectures])


def sizes(space: SearchSpace, architectures: Sequence[Architecture]) -> np.ndarray:
    """Logarithms of MACs and params, and the number of choices above their first option, `[networks, 3]`."""
    costs = [cost(space.blueprint(a)) for a in architectures]
    above = [sum(a.get(c.name, c.options[0]) != c.options[0] for c in space.choices) for a in architectures]
    return np.column_stack([np.log([max(1, c.macs) for c in costs]), np.log([max(1, c.params) for c in costs]), above])


def similarities(supernet: Supernet, architectures: Sequence[Architecture], evidence: Evidence) -> np.ndarray:
    """Each stage's RDM similarity and CKA to the largest subnet, and the negative KL divergence from it."""
    scorers: list[Scorer] = [InPlace(scorer=spec(kind)) for kind in (Rdm, Cka, Loss)]
    rdm, cka, loss = score_by_all(supernet, architectures, scorers, evidence)
    return np.array([[*_stages(r), *_stages(c), kl.value] for r, c, kl in zip(rdm, cka, loss, strict=True)])


def _stages(score: Score) -> list[float]:
    return [value for name, value in score.parts.items() if name.startswith("teacher_stage_")]
