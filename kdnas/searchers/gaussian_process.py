"""A Gaussian process over encodings of architectures: the searcher of multi-fidelity NAS."""

import random
from collections.abc import Callable, Sequence
from typing import final

import numpy as np

from kdnas.architecture import Architecture
from kdnas.runs.entry import Entry
from kdnas.scorers._features import choices
from kdnas.scorers._predictor import Predictor, fit
from kdnas.searchers.base import Searcher
from kdnas.space import SearchSpace

_ENUMERABLE = 20_000
_CLIMB = 30


@final
class GaussianProcess(Searcher):
    """Regression from encodings to scores; proposes the networks of highest predicted score.

    The first `num_initial` networks are random. Then a Gaussian process over one-hot encodings
    (`kdnas.scorers._process.Process`) is fitted to all scores, and the `batch` new networks of highest predicted mean
    are proposed. In a space of at most 20,000 networks all are candidates; in a larger one `pool` random ones are, and
    the best of them is improved by mutations. With a scorer of low fidelity, such as a short training under the
    teacher, this is the first phase of multi-fidelity search. An entry's `share` is one more coordinate of its
    encoding, for evaluations stopped early; predictions are for whole evaluations.

    Args:
        space: the search space.
        admits: whether an architecture is within the budget.
        rng: source of all random numbers.
        num_initial: random networks before the first fit, at least 3.
        batch: networks per fit.
        pool: random candidates in a space too large to enumerate.

    Raises:
        ValueError: an argument is below its minimum.

    Reference: Trofimov et al., Multi-fidelity Neural Architecture Search with Knowledge Distillation, 2020, section 3
        (MFKD1: 30 networks of low fidelity, Gaussian-process regression, the argmax over the whole space).
    Differs: the paper stops at the first argmax; here the model is fitted again after each batch, until the evaluations
        are used up. `num_evaluations = num_initial + 1` with `batch=1` is the paper's.
    """

    def __init__(
        self,
        *,
        space: SearchSpace,
        admits: Callable[[Architecture], bool],
        rng: random.Random,
        num_initial: int = 30,
        batch: int = 8,
        pool: int = 2000,
    ) -> None:
        super().__init__(space=space, admits=admits, rng=rng)
        for name, number, least in (("num_initial", num_initial, 3), ("batch", batch, 1), ("pool", pool, 1)):
            if number < least:
                raise ValueError(f"`{name}` must be at least {least}, got {number}.")
        self.num_initial, self.batch, self.pool = num_initial, batch, pool
        self._scores: dict[Architecture, float] = {}
        self._shares: list[float] = []
        self._everything: list[Architecture] | None = None

    def ask(self, limit: int) -> Sequence[Architecture]:
        """Random networks at first, then the new ones of highest predicted score."""
        missing = self.num_initial - len(self._scores)
        if missing > 0:
            sample: dict[Architecture, None] = {}
            for _ in range(50 * missing):
                candidate = self.sample()
                if candidate is not None and candidate not in self._scores:
                    sample[candidate] = None
                if len(sample) == min(missing, limit):
                    break
            if sample:
                return list(sample)
        candidates = self._candidates()
        if not candidates:
            self.stopped = "every admitted architecture was evaluated"
            return []
        if len(self._scores) < 3:
            return candidates[: min(limit, self.batch)]
        model = self.model()
        best = self._predicted(model, candidates)[: min(limit, self.batch)]
        if self._everything is None:
            best = [self._climbed(model, best[0]), *best[1:]]
        return list(dict.fromkeys(best))

    def tell(self, scored: Sequence[Entry]) -> None:
        """Remember the scores."""
        self._scores |= {entry.architecture: entry.score for entry in scored}
        self._shares += [entry.share for entry in scored]

    def begin(self, scored: Sequence[Entry]) -> None:
        """The entries count among the first `num_initial`."""
        self.tell(scored)

    def model(self) -> Predictor:
        """The Gaussian process, fitted to all scores so far."""
        rows = self.encoded(list(self._scores), self._shares)
        options = rows.shape[1] - 1
        return fit(rows, list(self._scores.values()), "gaussian_process", groups=[range(options), [options]])

    def encoded(self, architectures: Sequence[Architecture], shares: Sequence[float] = ()) -> np.ndarray:
        """One-hot encodings and the evaluation's share, `[networks, options of all choices + 1]`.

        A choice that does not exist in an architecture is all zeros. Shares are 1 by default, for predictions.
        """
        return np.column_stack([choices(self.space, architectures), list(shares) or [1.0] * len(architectures)])

    def _candidates(self) -> list[Architecture]:
        if self.space.count() <= _ENUMERABLE:
            if self._everything is None:
                self._everything = [a for a in dict.fromkeys(self.space.all()) if self.admits(a)]
            return [a for a in self._everything if a not in self._scores]
        pool = [self.sample() for _ in range(self.pool)]
        return list(dict.fromkeys(a for a in pool if a is not None and a not in self._scores))

    def _predicted(self, model: Predictor, candidates: Sequence[Architecture]) -> list[Architecture]:
        """The candidates by predicted mean, best first; ties keep their order."""
        means = model.predict(self.encoded(candidates))
        return [candidates[i] for i in np.argsort(-means, kind="stable")]

    def _climbed(self, model: Predictor, start: Architecture) -> Architecture:
        current, best = start, float(model.predict(self.encoded([start]))[0])
        for _ in range(_CLIMB):
            near = dict.fromkeys(self.space.mutate(current, self.rng) for _ in range(32))
            allowed = [a for a in near if a not in self._scores and self.admits(a)]
            if not allowed:
                break
            means = model.predict(self.encoded(allowed))
            if means.max() <= best:
                break
            current, best = allowed[int(means.argmax())], float(means.max())
        return current
