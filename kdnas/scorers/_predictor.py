"""A fitted predictor of accuracy from cheap scores, choices and size."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, final

import numpy as np
from numpy.typing import ArrayLike

from kdnas.scorers._process import Process
from kdnas.specs import check_literals
from kdnas.statistics import kendall

Kind = Literal["linear", "gaussian_process"]
Unit = Literal["any", "accuracy"]

LEVEL = 0.9
_LEAST_ERROR = 0.005  # added to an error rate, so that its logarithm exists


class Beliefs(NamedTuple):
    """What a predictor believes about networks, `[networks]` each, in the targets' unit.

    Attributes:
        mean: the prediction.
        low: lower end of the 90 % interval of one more measurement.
        high: upper end.
    """

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


@final
@dataclass(frozen=True, eq=False)
class Predictor:
    """A fitted predictor with its leave-one-out error.

    Attributes:
        model: the scikit-learn regressor or the Gaussian process, fitted to all rows.
        left_out: prediction for each row by a fit to the other rows, `[networks]`.
        error: root mean square of `left_out` minus the targets, in the targets' unit.
        tau: Kendall's tau-b between `left_out` and the targets.
        score_tau: that between the prior score and the targets; None without one.
        unit: what the targets are.
    """

    model: Any
    left_out: np.ndarray
    error: float
    tau: float
    score_tau: float | None = None
    unit: Unit = "any"

    @property
    def falls_back(self) -> bool:
        """Whether predictions are a line of the prior score, as the other features ranked no better."""
        return isinstance(self.model, Process) and self.model.is_line

    @property
    def noise(self) -> float:
        """Standard deviation of one measurement around the truth as fitted, in the targets' unit at their mean."""
        middle = float(np.mean(_modelled(self.left_out, self.unit)))
        ends = _in_unit(np.array([middle - self._process.noise / 2, middle + self._process.noise / 2]), self.unit)
        return float(ends[1] - ends[0])

    def predict(self, features: ArrayLike, score: ArrayLike | None = None) -> np.ndarray:
        """Predicted targets of networks, `[networks, features]` and prior scores to `[networks]`."""
        x = _finite(np.asarray(features, float), "features")
        if isinstance(self.model, Process):
            return _in_unit(self.model.posterior(x, _column(score, len(x)))[0], self.unit)
        return np.asarray(self.model.predict(x))

    def believe(self, features: ArrayLike, score: ArrayLike | None = None) -> Beliefs:
        """Predictions with intervals for one more measurement of each network; of a Gaussian process."""
        x = _finite(np.asarray(features, float), "features")
        mean, deviation = self._process.posterior(x, _column(score, len(x)))
        reach = self._process.quantile(LEVEL) * np.hypot(deviation, self._process.noise)
        return Beliefs(*(_in_unit(values, self.unit) for values in (mean, mean - reach, mean + reach)))

    def compare(self, features: ArrayLike, score: ArrayLike | None = None) -> Beliefs:
        """Predicted difference of every network to the first one, with 90 % intervals of the true difference."""
        x = _finite(np.asarray(features, float), "features")
        start, change, deviation = self._process.changes(x, _column(score, len(x)))
        first = np.array(start)
        reach = self._process.quantile(LEVEL) * deviation
        ends = (change, change - reach, change + reach)
        return Beliefs(*(_in_unit(first + end, self.unit) - _in_unit(first, self.unit) for end in ends))

    def improvement(self, features: ArrayLike, best: float, score: ArrayLike | None = None) -> np.ndarray:
        r"""Expected improvement $\mathbb{E}[\max(0, y - \text{best})]$ of the true values, in the targets' unit.

        The mean over 64 equally likely values of the posterior.
        """
        from scipy.stats import norm

        x = _finite(np.asarray(features, float), "features")
        mean, deviation = self._process.posterior(x, _column(score, len(x)))
        nodes = norm.ppf((np.arange(64) + 0.5) / 64)
        gains = [np.maximum(_in_unit(mean + deviation * node, self.unit) - best, 0) for node in nodes]
        return np.mean(gains, 0)

    @property
    def _process(self) -> Process:
        if not isinstance(self.model, Process):
            raise ValueError("`kind` must be gaussian_process for intervals, got linear.")
        return self.model


def fit(
    features: ArrayLike,
    targets: ArrayLike,
    kind: Kind = "linear",
    *,
    groups: Sequence[Sequence[int]] | None = None,
    score: ArrayLike | None = None,
    unit: Unit = "any",
    falls_back: bool = True,
) -> Predictor:
    """Fits a predictor of a target, such as accuracy, to features such as block scores, choices and costs.

    `linear` is ordinary least squares (of least norm where features repeat each other). `gaussian_process` is
    `kdnas.scorers._process.Process`, whose prior mean is a line of `score`. If Kendall's tau of its leave-one-out
    predictions exceeds that of the score itself by less than $5 / n^2$, the line alone is used (`falls_back`). Features
    and targets are standardised within every fit.

    Args:
        features: `[networks, features]`.
        targets: `[networks]`.
        kind: `linear` or `gaussian_process`.
        groups: of a Gaussian process: columns that are alike, such as choices, sizes and similarities; every column
            once. One group by default.
        score: of a Gaussian process: `[networks]`, a score that ranks the networks before anything is measured.
        falls_back: of a Gaussian process: whether the line of the score may replace it. The line knows no network's
            own uncertainty, so that it must not where the next measurement is chosen.
        unit: of a Gaussian process: `accuracy` for targets in [0, 1], of which `-log(1 - target)` is modelled.

    Raises:
        ValueError: fewer than 3 networks, unequal counts, NaN, another kind, or groups that are no partition.

    Reference: Moons et al., Distilling Optimal Neural Networks: Rapid Search in Diverse Spaces, ICCV 2021, section 3.3
        (a linear predictor over block qualities); Trofimov et al., Multi-fidelity NAS with Knowledge Distillation,
        2020 (a Gaussian process). Leave-one-out with fixed variances: Rasmussen and Williams, Gaussian Processes for
        Machine Learning, 2006, section 5.4.2.

    Example:
        >>> depth = np.arange(8.0)
        >>> predictor = fit(depth[:, None], 0.5 + 0.05 * depth, "gaussian_process")
        >>> predictor.predict([[3.5]]).round(2)
        array([0.67])
    """
    check_literals(fit, locals())
    x, y = _finite(np.asarray(features, float), "features"), _finite(np.asarray(targets, float), "targets")
    if x.ndim != 2 or y.shape != x.shape[:1]:
        raise ValueError(
            f"`features` must be [networks, features] and `targets` [networks], got {x.shape} and {y.shape}."
        )
    if len(y) < 3:
        raise ValueError(f"`targets` must have at least 3 networks, got {len(y)}.")
    prior = _column(score, len(y))
    if kind == "linear":
        if groups is not None or prior is not None or unit != "any":
            raise ValueError("`groups`, `score` and `unit` are of a gaussian_process, got them with kind linear.")
        (model, left_out), score_tau = _line(x, y), None
    else:
        model, left_out, score_tau = _process(x, y, groups, prior, unit, falls_back=falls_back)
    error = float(np.sqrt(np.mean((left_out - y) ** 2)))
    return Predictor(model, left_out, error, kendall(left_out, y), score_tau, unit)


def _line(x: np.ndarray, y: np.ndarray) -> tuple[Any, np.ndarray]:
    """The least-squares fit and its left-out predictions."""
    from sklearn.compose import TransformedTargetRegressor  # slow to import
    from sklearn.linear_model import LinearRegression
    from sklearn.model_selection import LeaveOneOut, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    line = make_pipeline(StandardScaler(), LinearRegression())
    model = TransformedTargetRegressor(line, transformer=StandardScaler()).fit(x, y)
    return model, np.asarray(cross_val_predict(model, x, y, cv=LeaveOneOut()))  # type: ignore[arg-type]


def _process(
    x: np.ndarray,
    y: np.ndarray,
    groups: Sequence[Sequence[int]] | None,
    score: np.ndarray | None,
    unit: Unit,
    *,
    falls_back: bool,
) -> tuple[Process, np.ndarray, float | None]:
    """The process, or the line of the score where that ranks the rows better; its left-out predictions; the tau."""
    if unit == "accuracy" and not ((y >= 0) & (y <= 1)).all():
        wrong = y[(y < 0) | (y > 1)][0]
        raise ValueError(f"`targets` must be in [0, 1] where `unit` is accuracy, got {wrong:g}. Divide percent by 100.")
    groups = [range(x.shape[1])] if groups is None else groups
    if sorted(column for group in groups for column in group) != list(range(x.shape[1])):
        raise ValueError(f"`groups` must hold each of the {x.shape[1]} columns once, got {[list(g) for g in groups]}.")
    modelled = _modelled(y, unit)
    process = Process.fitted(x, modelled, groups, score)
    if score is None:
        return process, _in_unit(process.left_out, unit), None
    score_tau = kendall(score, y)
    # With few rows the left-out tau is noisy: ten rows must show two pairs more in order.
    if falls_back and kendall(process.left_out, modelled) < score_tau + 5 / len(y) ** 2:
        process = Process.fitted(x, modelled, [], score)
    return process, _in_unit(process.left_out, unit), score_tau


def _modelled(targets: np.ndarray, unit: Unit) -> np.ndarray:
    return -np.log(1 - targets + _LEAST_ERROR) if unit == "accuracy" else targets


def _in_unit(values: np.ndarray, unit: Unit) -> np.ndarray:
    return 1 + _LEAST_ERROR - np.exp(-values) if unit == "accuracy" else values


def _column(score: ArrayLike | None, count: int) -> np.ndarray | None:
    if score is None:
        return None
    column = _finite(np.asarray(score, float), "score")
    if column.shape != (count,):
        raise ValueError(f"`score` must have one number for each of {count} networks, got {column.shape}.")
    return column


def _finite(values: np.ndarray, name: str) -> np.ndarray:
    if not np.isfinite(values).all():
        raise ValueError(
            f"`{name}` must be finite, got {int((~np.isfinite(values)).sum())} values that are not. Remove those rows."
        )
    return values
