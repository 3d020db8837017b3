"""Candidates stopped early: a scorer shows scores on its way, and a pruner of Optuna says who may go on."""

import inspect
import re
from collections.abc import Iterable, Iterator
from typing import final

import optuna
from optuna.pruners import BasePruner
from optuna.trial import TrialState

from kdnas.scorers.base import Score, Scorer
from kdnas.specs import Spec, nearest, parse_spec, resolve


@final
class EarlyStopping:
    """Asks a pruner after every score but the last whether an evaluation goes on.

    A pruner compares a candidate with those before it, so what it says depends on their order. An interrupted search is
    therefore repeated to it: `replay` takes what was scored before, in the order of then.

    Args:
        made: makes the pruner. Where it takes `min_resource`, `max_resource` or `reduction_factor` and is not told,
            they are the scorer's.
        scorer: whose scores are judged.

    Raises:
        ValueError: the scorer shows no score before its last, or the pruner cannot be made.

    Reference: Akiba et al., Optuna, KDD 2019; its SuccessiveHalvingPruner is Li et al., A System for Massively Parallel
        Hyperparameter Tuning, MLSys 2020, algorithm 2, asynchronous: a candidate goes on when it is among the best
        `1 / reduction_factor` of those that came as far, so that the first ones go on unopposed.
    """

    def __init__(self, made: Spec, scorer: Scorer) -> None:
        self.resources = scorer.resources
        if len(self.resources) < 2:
            raise ValueError(
                f"a pruner stops evaluations that show scores on their way, and {type(scorer).__name__} shows its last "
                "alone. Use a scorer of several rungs, such as short_training,steps=90,num_rungs=3."
            )
        low, high = self.resources[0], self.resources[1]
        known = {"min_resource": low, "max_resource": self.resources[-1], "reduction_factor": max(2, round(high / low))}
        taken = inspect.signature(resolve(made.make)).parameters
        told = dict(made.arguments)
        pruner = made.replace(**{k: v for k, v in known.items() if k in taken and k not in told}).build(BasePruner)
        before = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        # Hyperband draws a candidate's bracket from the study's name.
        self.study = optuna.create_study(study_name="kdnas", direction="maximize", pruner=pruner)
        optuna.logging.set_verbosity(before)

    def judge(self, scores: Iterator[Score]) -> Score:
        """The last score that the pruner lets come, with those on the way as parts, such as `at 30`, and its share."""
        return self._judged(scores, None)

    def replay(self, found: Score) -> None:
        """Tell the pruner what `judge` returned before."""
        reached = [found.parts[f"at {r}"] for r in self.resources if f"at {r}" in found.parts]
        self._judged((Score(value, {}) for value in reached), found.share)

    def _judged(self, scores: Iterable[Score], share: float | None) -> Score:
        trial = self.study.ask()
        on_the_way: dict[str, float] = {}
        last: tuple[Score, int] | None = None
        stopped = False
        for resource, score in zip(self.resources, scores, strict=False):
            on_the_way[f"at {resource}"] = score.value
            last = score, resource
            trial.report(score.value, resource)
            stopped = resource < self.resources[-1] and trial.should_prune()
            if stopped and share is None:
                break
        assert last is not None
        reached = last[1] / self.resources[-1] if share is None else share
        if reached == 1:
            self.study.tell(trial, last[0].value)
        else:
            self.study.tell(trial, state=TrialState.PRUNED)
        return Score(last[0].value, last[0].parts | on_the_way, reached)


def pruner_named(text: str) -> Spec:
    """The Spec of a pruner of Optuna from what a person types: NAME or NAME,key=value.

    NAME is that of a class of `optuna.pruners` in words, such as `successive_halving`, `hyperband` or `median`, or
    `package.module:Class` of your own.

    Raises:
        ValueError: an unknown name; the nearest is offered.
    """
    name, *options = text.split(",")
    if ":" not in name:
        classes = [n for n in optuna.pruners.__all__ if n.endswith("Pruner") and n != "BasePruner"]
        known = {re.sub(r"(?<!^)(?=[A-Z])", "_", n.removesuffix("Pruner")).lower(): n for n in classes}
        if name not in known:
            raise ValueError(f"Optuna has no pruner {name!r}.{nearest(name, known)}")
        name = f"optuna.pruners:{known[name]}"
    return parse_spec("optuna.pruners", ",".join([name, *options]))
