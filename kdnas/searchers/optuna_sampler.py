"""Any sampler of Optuna, by ask and tell."""

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
from kdnas.searchers.base import Searcher
from kdnas.space import SearchSpace
from kdnas.specs import nearest, resolve


@final
class OptunaSampler(Searcher):
    """Lets a sampler of Optuna propose architectures: one categorical parameter per choice.

    A choice that does not exist in an architecture is not suggested to it, so that the sampler sees conditional
    parameters. What the sampler proposes and the budget refuses is told back as a violated constraint with the worst
    score so far, what was scored before with its score, and both are drawn again. After `attempts` such draws in a row
    the sampler is handed a random admitted architecture instead, so that tight budgets and stubborn samplers end in
    random search, not in a loop.

    Args:
        space: the search space.
        admits: the budget's test.
        rng: seeds the sampler and draws the random ones.
        sampler: the name of a class of `optuna.samplers`, such as `tpe`, `nsgaii`, `random`, `gp` or `TPESampler`, or
            `package.module:Class` of your own.
        batch: architectures asked at once; more share more prefixes, fewer learn from every score.
        attempts: refused or repeated draws in a row.

    Raises:
        ValueError: an unknown sampler, one that needs further arguments, or whose package is not installed.

    Reference: Akiba et al., Optuna, KDD 2019; the default, TPE, is Bergstra et al., Algorithms for Hyper-Parameter
        Optimization, NeurIPS 2011, in the multivariate form of Falkner et al., BOHB, ICML 2018.
    Differs: from a study that Optuna runs itself: a proposal scored before is not scored again, one that the budget
        refuses counts as a violated constraint, and a whole batch is asked before any of it is told.
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
            raise ValueError(f"batch and attempts must be at least 1, got {batch=}, {attempts=}.")
        self.batch, self.attempts = batch, attempts
        with _quiet():
            self.study = optuna.create_study(direction="maximize", sampler=_made(sampler, rng.getrandbits(31)))
        self._scores: dict[Architecture, float] = {}
        self._asked: dict[Architecture, Trial] = {}
        self._refused: list[Trial] = []
        self._again: list[tuple[Trial, Architecture]] = []

    def ask(self, limit: int) -> Sequence[Architecture]:
        """The sampler's next proposals that are admitted and new."""
        self._asked = {}
        with _quiet():
            while len(self._asked) < min(limit, self.batch):
                if not (self._one() or self._drawn()):
                    self.stopped = "no admitted architecture was found that was not scored before"
                    break
        return list(self._asked)

    def tell(self, scored: Sequence[Entry]) -> None:
        """Scores, and what became of the other draws, go to the sampler."""
        with _quiet():
            for entry in scored:
                self._scores[entry.architecture] = entry.score
                self._finish(self._asked[entry.architecture], entry.score, -1.0)
            worst = min(self._scores.values(), default=0.0)
            for trial in self._refused:
                self._finish(trial, worst, 1.0)
            for trial, architecture in self._again:
                self._finish(trial, self._scores[architecture], -1.0)
        self._refused, self._again = [], []

    def begin(self, scored: Sequence[Entry]) -> None:
        """The sampler learns from them as from its own."""
        with _quiet():
            for entry in scored:
                self._asked = {entry.architecture: self._enqueued(entry.architecture)}
                self.tell([entry])

    def _finish(self, trial: Trial, score: float, violation: float) -> None:
        trial.set_constraint("budget", violation)
        self.study.tell(trial, score)

    def _one(self) -> bool:
        """One proposal of the sampler; whether it is new and admitted within `attempts` draws."""
        for _ in range(self.attempts):
            trial = self.study.ask()
            candidate = self.space.decide(lambda choice, trial=trial: _suggested(trial, choice))
            if not self.admits(candidate):
                self._refused.append(trial)
            elif candidate in self._scores or candidate in self._asked:
                self._again.append((trial, candidate))
            else:
                self._asked[candidate] = trial
                return True
        return False

    def _drawn(self) -> bool:
        """A random one, which the sampler learns from as from its own."""
        for _ in range(200):
            candidate = self.sample()
            if candidate is not None and candidate not in self._scores and candidate not in self._asked:
                self._asked[candidate] = self._enqueued(candidate)
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
    found = trial.suggest_categorical(choice.name, choice.options)
    assert found is not None
    return found


def _made(name: str, seed: int) -> BaseSampler:
    if ":" in name:
        made: Any = resolve(name)
    else:
        known = {n.removesuffix("Sampler").lower(): n for n in optuna.samplers.__all__ if n.endswith("Sampler")}
        known.pop("base")
        short = name.removesuffix("Sampler").lower()
        if short not in known:
            raise ValueError(f"{name!r} is no sampler of Optuna.{nearest(short, known)}")
        made = getattr(optuna.samplers, known[short])
    try:
        sampler = made(seed=seed)
    except TypeError as error:
        raise ValueError(
            f"the sampler {name!r} cannot be made from a seed alone: {error}. Write a class that can, and give it as "
            "package.module:Class."
        ) from error
    except ImportError as error:
        raise ValueError(f"the sampler {name!r} needs a package that is not installed: {error}") from error
    if not isinstance(sampler, BaseSampler):
        raise ValueError(f"{name!r} must make an optuna.samplers.BaseSampler, it makes a {type(sampler).__name__}.")
    return sampler


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Neither Optuna's log lines nor its warnings that a sampler is experimental or samples independently."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)
