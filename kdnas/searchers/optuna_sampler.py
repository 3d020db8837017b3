"""Optuna's samplers as searchers, by ask and tell."""

import contextlib
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, final

import optuna
from optuna.samplers import BaseSampler
from optuna.trial import Trial

from kdnas.architecture import Architecture, Choice, Value
from kdnas.runs.entry import Entry
from kdnas.searchers._optuna import quiet
from kdnas.searchers.base import Searcher
from kdnas.space import SearchSpace
from kdnas.specs import nearest, resolve
from kdnas.values import shown


@final
class OptunaSampler(Searcher):
    """A sampler of Optuna proposes architectures: one categorical parameter per choice.

    Choices that do not exist in an architecture are not suggested, so that parameters are conditional. A proposal over
    the budget is told as a violated constraint with the worst score so far, a repeated one with its score, and the
    sampler proposes again. After `attempts` such proposals in a row a random admitted architecture is enqueued instead,
    so that tight budgets and repetitive samplers end in random search, not in an endless loop.

    Args:
        space: the search space.
        admits: whether an architecture is within the budget.
        rng: source of the sampler's seed and of random architectures.
        sampler: name of a class of `optuna.samplers`, such as `tpe`, `nsgaii`, `random`, `gp` or `TPESampler`, or
            `package.module:Class`.
        batch: architectures proposed at once; larger batches share more prefixes, smaller ones learn from each score.
        attempts: successive proposals that are over the budget or repeated.

    Raises:
        ValueError: an unknown sampler, one that needs further arguments, or one whose package is not installed.

    Reference: Akiba et al., Optuna, KDD 2019; the default, TPE, is Bergstra et al., Algorithms for Hyper-Parameter
        Optimization, NeurIPS 2011, in the multivariate form of Falkner et al., BOHB, ICML 2018.
    Differs: from a study run by Optuna: repeated proposals are not scored again, proposals over the budget are violated
        constraints, and a whole batch is proposed before its scores are told.
    """

    def __init__(
        self,
        *,
        space: SearchSpace,
        admits: Callable[[Architecture], bool],
        rng: random.Random,
        sampler: str = "tpe",
        batch: int = 8,
        attempts: int = 20,
    ) -> None:
        super().__init__(space=space, admits=admits, rng=rng)
        if min(batch, attempts) < 1:
            raise ValueError(f"`batch` and `attempts` must be at least 1, got {batch=}, {attempts=}.")
        self.batch, self.attempts = batch, attempts
        with _quiet():
            self.study = optuna.create_study(direction="maximize", sampler=_sampler_of(sampler, rng.getrandbits(31)))
        self._scores: dict[Architecture, float] = {}
        self._pending: dict[Architecture, Trial] = {}
        self._refused: list[Trial] = []
        self._repeated: list[tuple[Trial, Architecture]] = []

    def ask(self, limit: int) -> Sequence[Architecture]:
        """The sampler's next admitted and new proposals."""
        self._pending = {}
        with _quiet():
            while len(self._pending) < min(limit, self.batch):
                if not (self._propose() or self._propose_random()):
                    self.stopped = "no admitted architecture was found that was not scored before"
                    break
        return list(self._pending)

    def tell(self, scored: Sequence[Entry]) -> None:
        """Tells the sampler the scores, and those of repeated and refused proposals."""
        with _quiet():
            for entry in scored:
                self._scores[entry.architecture] = entry.score
                self._finish(self._pending[entry.architecture], entry.score, -1.0)
            worst = min(self._scores.values(), default=0.0)
            for trial in self._refused:
                self._finish(trial, worst, 1.0)
            for trial, architecture in self._repeated:
                self._finish(trial, self._scores[architecture], -1.0)
        self._refused, self._repeated = [], []

    def begin(self, scored: Sequence[Entry]) -> None:
        """Tells the sampler the entries as if it had proposed them."""
        with _quiet():
            for entry in scored:
                self._pending = {entry.architecture: self._enqueued(entry.architecture)}
                self.tell([entry])

    def _finish(self, trial: Trial, score: float, violation: float) -> None:
        trial.set_constraint("budget", violation)
        self.study.tell(trial, score)

    def _propose(self) -> bool:
        """Whether the sampler made a new admitted proposal within `attempts`."""
        for _ in range(self.attempts):
            trial = self.study.ask()
            candidate = self.space.decide(lambda choice, trial=trial: _suggested(trial, choice))
            if not self.admits(candidate):
                self._refused.append(trial)
            elif candidate in self._scores or candidate in self._pending:
                self._repeated.append((trial, candidate))
            else:
                self._pending[candidate] = trial
                return True
        return False

    def _propose_random(self) -> bool:
        """Whether a new random architecture was enqueued as a proposal."""
        for _ in range(200):
            candidate = self.sample()
            if candidate is not None and candidate not in self._scores and candidate not in self._pending:
                self._pending[candidate] = self._enqueued(candidate)
                return True
        return False

    def _enqueued(self, architecture: Architecture) -> Trial:
        self.study.enqueue_trial(dict(architecture))
        trial = self.study.ask()
        for choice in self.space.choices:
            if choice.exists(architecture):
                _suggested(trial, choice)
        return trial


def _suggested(trial: Trial, choice: Choice) -> Value:
    option = trial.suggest_categorical(choice.name, choice.options)
    assert option is not None
    return option


def _sampler_of(name: str, seed: int) -> BaseSampler:
    if ":" in name:
        maker: Any = resolve(name)
    else:
        known = {n.removesuffix("Sampler").lower(): n for n in optuna.samplers.__all__ if n.endswith("Sampler")}
        known.pop("base")
        short = name.removesuffix("Sampler").lower()
        if short not in known:
            raise ValueError(f"Optuna has no sampler {shown(name)}.{nearest(short, known)}")
        maker = getattr(optuna.samplers, known[short])
    try:
        sampler = maker(seed=seed)
    except TypeError as error:
        raise ValueError(
            f"sampler {name!r} must be constructible from `seed` alone: {error}. Pass a subclass that is, as "
            "package.module:Class."
        ) from error
    except ImportError as error:
        raise ValueError(f"sampler {name!r} needs a package that is not installed: {error}") from error
    if not isinstance(sampler, BaseSampler):
        raise ValueError(f"sampler {name!r} must be an optuna.samplers.BaseSampler, got a {type(sampler).__name__}.")
    return sampler


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences Optuna's log and its warnings that a sampler is experimental or samples independently."""
    with quiet(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        yield
