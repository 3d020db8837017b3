"""Early stopping of evaluations: Optuna's pruners on the intermediate scores of a scorer.

Optuna is imported by what uses it: every job imports this module, and few have a pruner.
"""

import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, final

from kdnas.scorers.base import Score, Scorer
from kdnas.specs import Spec, nearest, parse_spec, resolve
from kdnas.values import shown

if TYPE_CHECKING:
    import optuna


@final
class EarlyStopping:
    """Lets a pruner end an evaluation after any of its intermediate scores.

    A pruner compares a candidate with earlier ones, so its decisions depend on their order. When an interrupted search
    is resumed, `replay` is called with the recorded scores in their order.

    Args:
        pruner_spec: the pruner. Its arguments `min_resource`, `max_resource` and `reduction_factor` are by default the
            scorer's.
        scorer: with several `resources`.

    Raises:
        ValueError: the scorer has no intermediate scores, or the pruner cannot be built.

    Reference: Akiba et al., Optuna, KDD 2019; its SuccessiveHalvingPruner is Li et al., A System for Massively Parallel
        Hyperparameter Tuning, MLSys 2020, algorithm 2, asynchronous: a candidate continues when it is among the best
        `1 / reduction_factor` of those that reached the rung, so that the first ones always continue.
    """

    def __init__(self, pruner_spec: Spec, scorer: Scorer) -> None:
        self.resources = scorer.resources
        if len(self.resources) < 2:
            raise ValueError(
                f"a pruner needs a scorer with intermediate scores; {type(scorer).__name__} has none. Use one with "
                "several rungs, such as short_training,steps=90,num_rungs=3."
            )
        self.study = _study(pruner_spec, self.resources)

    def judge(self, scores: Iterator[Score]) -> Score:
        """The last score before the pruner stops, its share, and intermediate scores as parts such as `at 30`."""
        return self._judged(scores, None)

    def replay(self, score: Score) -> None:
        """Tell the pruner a score that `judge` returned earlier."""
        scores = [score.parts[f"at {r}"] for r in self.resources if f"at {r}" in score.parts]
        self._judged((Score(value, {}) for value in scores), score.share)

    def _judged(self, scores: Iterable[Score], share: float | None) -> Score:
        from optuna.trial import TrialState

        trial = self.study.ask()
        intermediate: dict[str, float] = {}
        last: tuple[Score, int] | None = None
        stopped = False
        for resource, score in zip(self.resources, scores, strict=False):
            intermediate[f"at {resource}"] = score.value
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
        return Score(last[0].value, last[0].parts | intermediate, reached)


def survivors(pruner_spec: Spec, resources: Sequence[int], curves: Sequence[Sequence[float]]) -> list[int]:
    """Indices of the longest curves that a pruner lets go on after their last value; the best one always does.

    Each is judged beside all other curves, as if it came last, so that the order of the curves does not matter:
    successive halving with a reduction factor of 2 keeps the best half (rounded down, at least one, and ties).

    Args:
        pruner_spec: as `EarlyStopping`'s.
        resources: ascending, those of the values.
        curves: scores, higher is better, at the first resources; shorter for candidates that were stopped before.

    Example:
        >>> halving = parse_pruner("successive_halving")
        >>> survivors(halving, (50, 100, 200), [(0.6,), (0.9,), (0.7,), (0.8,)])
        [1, 3]
    """
    longest = max(map(len, curves))
    alive = [index for index, curve in enumerate(curves) if len(curve) == longest]

    def goes_on(index: int) -> bool:
        study = _study(pruner_spec, resources)
        for other in (*(curve for place, curve in enumerate(curves) if place != index), curves[index]):
            trial, prune = study.ask(), False
            for resource, value in zip(resources, other, strict=False):
                trial.report(value, resource)
                prune = trial.should_prune()
            study.tell(trial, other[-1])
        return not prune

    return [index for index in alive if goes_on(index)] or [max(alive, key=lambda index: curves[index][-1])]


def _study(pruner_spec: Spec, resources: Sequence[int]) -> "optuna.Study":
    """A study in memory whose pruner has the resources' range by default."""
    import optuna

    from kdnas.searchers._optuna import quiet

    low, high = resources[0], resources[1]
    known = {"min_resource": low, "max_resource": resources[-1], "reduction_factor": max(2, round(high / low))}
    parameters = inspect.signature(resolve(pruner_spec.make)).parameters
    arguments = dict(pruner_spec.arguments)
    pruner = pruner_spec.replace(**{k: v for k, v in known.items() if k in parameters and k not in arguments}).build(
        optuna.pruners.BasePruner
    )
    with quiet():
        # Hyperband derives a candidate's bracket from the study's name.
        return optuna.create_study(study_name="kdnas", direction="maximize", pruner=pruner)


def parse_pruner(text: str) -> Spec:
    """The Spec of a pruner from its text form NAME or NAME,key=value.

    NAME is a class of `optuna.pruners` in snake case, such as `successive_halving`, `hyperband` or `median`, or
    `package.module:Class`.

    Raises:
        ValueError: an unknown name; the message has the nearest one.
    """
    import optuna

    name, *options = text.split(",")
    if ":" not in name:
        classes = [n for n in optuna.pruners.__all__ if n.endswith("Pruner") and n != "BasePruner"]
        known = {re.sub(r"(?<!^)(?=[A-Z])", "_", n.removesuffix("Pruner")).lower(): n for n in classes}
        if name not in known:
            raise ValueError(f"Optuna has no pruner {shown(name)}.{nearest(name, known)}")
        name = f"optuna.pruners:{known[name]}"
    return parse_spec("optuna.pruners", ",".join([name, *options]))
