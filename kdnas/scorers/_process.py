"""A Gaussian process over groups of features, with a line of a prior score as its mean."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, final

import numpy as np

_LENGTHS = (0.5, 1.5)  # of the squared exponentials, in root mean squared standardised distances
_CONSTANT = 25.0  # prior variance of the mean: wide
_SLOPE, _SLOPE_VARIANCE = 0.75, 0.0625  # prior of the score's line, in standard deviations per standard deviation
_VARIANCE, _NOISE, _SPREAD = np.log(0.05), np.log(0.03), 2.0  # log-normal priors of the variances
_JITTER = 1e-9


@final
@dataclass(frozen=True, eq=False)
class Process:
    r"""A Gaussian process $y = c + b s + f(x) + \epsilon$ of standardised targets, features and scores.

    $c \sim N(0, 25)$, $b \sim N(0.75, 0.0625)$, and $f$ has the covariance

    $$\sum_g \Big(v_g\, \frac{x_g^\top x'_g}{d_g} + \sum_l v_{gl}\, e^{-D_g / 2 l^2}\Big) + v\, e^{-\sum_g D_g / 2 G}$$

    over $G$ groups of $d_g$ features, with $D_g = \lVert x_g - x'_g \rVert^2 / d_g$ and the lengths
    $l \in \{0.5, 1.5\}$; the last term only where $G > 1$. On one-hot choices $D_g$ counts choices that differ, so that
    the exponentials are categorical kernels. The variances and that of the noise $\epsilon$ have log-normal priors and
    are those of highest posterior density; with them fixed, the posterior is exact. Deviations are multiplied by the
    root of the squared standardised errors of the left-out rows, summed and divided by $n - 3$.

    Attributes:
        rows: standardised features, `[rows, features]`.
        scores: standardised prior scores, `[rows]`; zeros without a score.
        has_score: whether there is a prior score.
        groups: columns of each group; none for the line alone.
        variances: of the kernels, in the order of the formula, then of the noise.
        centre, width: of the features.
        score_centre, score_width: of the scores.
        target_centre, target_width: of the targets.
        inverse: of the rows' covariance, `[rows, rows]`.
        weights: `inverse` times the rows' residuals from the prior mean, `[rows]`.
        slope: the prior mean of b; 0 without a score.
        left_out: prediction of each row by the others, `[rows]`, in the targets' unit.
        factor: that deviations are multiplied by.

    Reference: Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006: equations 2.25, 2.26 and 5.8 to
        5.12.
    """

    rows: np.ndarray
    scores: np.ndarray
    has_score: bool
    groups: tuple[tuple[int, ...], ...]
    variances: np.ndarray
    centre: np.ndarray
    width: np.ndarray
    score_centre: float
    score_width: float
    target_centre: float
    target_width: float
    inverse: np.ndarray
    weights: np.ndarray
    slope: float
    left_out: np.ndarray
    factor: float

    @property
    def is_line(self) -> bool:
        """Whether the score's line is all there is."""
        return self.has_score and not self.groups

    @property
    def noise(self) -> float:
        """Standard deviation of the noise, in the targets' unit."""
        return float(np.sqrt(self.variances[-1]) * self.target_width * self.factor)

    def quantile(self, level: float) -> float:
        """Half the width of a two-sided interval in deviations: Student's t with n - 3 degrees of freedom."""
        from scipy.stats import t

        return float(t.ppf((1 + level) / 2, max(len(self.rows) - 3, 2)))

    @classmethod
    def fitted(
        cls, features: np.ndarray, targets: np.ndarray, groups: Sequence[Sequence[int]], score: np.ndarray | None
    ) -> Self:
        """The process of highest posterior density.

        Args:
            features: `[rows, features]`.
            targets: `[rows]`.
            groups: columns of each group; none for the line alone.
            score: `[rows]`, or None for no line.
        """
        centre, width = _scale(features)
        target_centre, target_width = targets.mean(), float(_scale(targets)[1])
        z = np.zeros(len(targets)) if np.isinf(target_width) else (targets - target_centre) / target_width
        score_centre, score_width = (0.0, np.inf) if score is None else map(float, _scale(score))
        scores = np.zeros(len(z)) if score is None else (score - score_centre) / score_width
        rows, slope = (features - centre) / width, _SLOPE if np.isfinite(score_width) else 0.0
        # Columns that are constant among the rows say nothing.
        kept = tuple(tuple(c for c in group if np.isfinite(width[c])) for group in groups)
        kept = tuple(group for group in kept if group)
        kernels = np.concatenate([_kernels(rows, rows, kept), np.eye(len(z))[None]])
        base = _CONSTANT + _SLOPE_VARIANCE * np.outer(scores, scores) + _JITTER * np.eye(len(z))
        variances = _most_likely(kernels, base, z - slope * scores)
        inverse = np.linalg.inv(base + np.tensordot(variances, kernels, 1))
        weights = inverse @ (z - slope * scores)
        errors, precisions = weights / np.diag(inverse), np.diag(inverse)
        factor = float(np.sqrt(max(np.sum(errors**2 * precisions), 1e-12) / max(len(z) - 3, 1)))
        target_width = 1.0 if np.isinf(target_width) else target_width
        return cls(
            rows=rows,
            scores=scores,
            has_score=score is not None,
            groups=kept,
            variances=variances,
            centre=centre,
            width=width,
            score_centre=score_centre,
            score_width=score_width,
            target_centre=float(target_centre),
            target_width=target_width,
            inverse=inverse,
            weights=weights,
            slope=slope,
            left_out=target_centre + target_width * (z - errors),
            factor=factor,
        )

    def posterior(self, features: np.ndarray, score: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of the truth without noise, `[networks]` each, in the targets' unit."""
        means, deviations = [], []
        for start in range(0, len(features), 2000):  # bounds memory to 2,000 rows of kernels
            part = slice(start, start + 2000)
            x, s = self._standardised(features[part], None if score is None else score[part])
            across = self._covariance(x, s)
            means.append(self.slope * s + across @ self.weights)
            variance = self._variance(x, s) - np.einsum("ij,ij->i", across @ self.inverse, across)
            deviations.append(np.sqrt(np.maximum(variance, 0)))
        mean, deviation = np.concatenate(means), np.concatenate(deviations)
        return self.target_centre + self.target_width * mean, self.target_width * self.factor * deviation

    def changes(self, features: np.ndarray, score: np.ndarray | None) -> tuple[float, np.ndarray, np.ndarray]:
        """Mean of the first network, and mean and standard deviation of every network's difference to it."""
        x, s = self._standardised(features, score)
        across = self._covariance(x, s)
        mean = self.slope * s + across @ self.weights
        within = _CONSTANT + _SLOPE_VARIANCE * s * s[0]
        within = within + np.tensordot(self.variances[:-1], _kernels(x, x[:1], self.groups)[..., 0], 1)
        step = across - across[:1]
        # Var(f_i - f_0) of the prior, less what the rows explain of it.
        variance = self._variance(x, s) + self._variance(x[:1], s[:1]) - 2 * within
        variance = variance - np.einsum("ij,ij->i", step @ self.inverse, step)
        deviation = np.sqrt(np.maximum(variance, 0)) * self.target_width * self.factor
        return self.target_centre + self.target_width * mean[0], self.target_width * (mean - mean[0]), deviation

    def _standardised(self, features: np.ndarray, score: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        if features.ndim != 2 or features.shape[1] != len(self.centre):
            raise ValueError(f"`features` must be [networks, {len(self.centre)}] as in the fit, got {features.shape}.")
        if (score is not None) != self.has_score:
            raise ValueError(f"`score` must be passed as in the fit, got {'none' if score is None else 'one'}.")
        s = np.zeros(len(features)) if score is None else (score - self.score_centre) / self.score_width
        return (features - self.centre) / self.width, s

    def _covariance(self, x: np.ndarray, s: np.ndarray) -> np.ndarray:
        """With the rows, `[networks, rows]`."""
        across = _CONSTANT + _SLOPE_VARIANCE * np.outer(s, self.scores)
        return across + np.tensordot(self.variances[:-1], _kernels(x, self.rows, self.groups), 1)

    def _variance(self, x: np.ndarray, s: np.ndarray) -> np.ndarray:
        """Of the prior, `[networks]`."""
        per_group = 1 + len(_LENGTHS)
        variance = _CONSTANT + _SLOPE_VARIANCE * s**2
        for place, group in enumerate(self.groups):
            own = self.variances[per_group * place : per_group * (place + 1)]
            variance = variance + own[0] * (x[:, group] ** 2).mean(1) + own[1:].sum()
        return variance + self.variances[per_group * len(self.groups) : -1].sum()


def _scale(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation per column; infinite where a column is constant up to rounding."""
    centre, width = values.mean(0), values.std(0)
    return centre, np.where(width <= 1e-12 * np.abs(values).max(0), np.inf, width)


def _kernels(x: np.ndarray, y: np.ndarray, groups: Sequence[Sequence[int]]) -> np.ndarray:
    """The kernels of the formula between standardised networks, `[kernels, networks of x, networks of y]`."""
    kernels, total = [], np.zeros((len(x), len(y)))
    for group in groups:
        a, b = x[:, group], y[:, group]
        inner = a @ b.T / len(group)
        distance = np.maximum((a**2).mean(1)[:, None] + (b**2).mean(1)[None] - 2 * inner, 0)
        kernels += [inner, *(np.exp(-distance / (2 * length**2)) for length in _LENGTHS)]
        total += distance
    if len(groups) > 1:
        kernels.append(np.exp(-total / (2 * len(groups))))
    return np.array(kernels).reshape(-1, len(x), len(y))


def _most_likely(kernels: np.ndarray, base: np.ndarray, residuals: np.ndarray) -> np.ndarray:
    """The variances of highest posterior density, `[kernels]`, the noise's last."""
    from scipy.linalg import cho_factor, cho_solve
    from scipy.optimize import minimize

    centre = np.full(len(kernels), _VARIANCE)
    centre[-1] = _NOISE

    def loss(logarithms: np.ndarray) -> tuple[float, np.ndarray]:
        variances, strange = np.exp(logarithms), (logarithms - centre) / _SPREAD
        factor = cho_factor(base + np.tensordot(variances, kernels, 1), lower=True)
        inverse = cho_solve(factor, np.eye(len(residuals)))
        weights = inverse @ residuals
        value = residuals @ weights / 2 + np.log(np.diag(factor[0])).sum() + strange @ strange / 2
        slopes = np.tensordot(kernels, inverse - np.outer(weights, weights), 2) / 2
        return float(value), variances * slopes + strange / _SPREAD

    best = minimize(loss, centre, jac=True, method="L-BFGS-B", bounds=[(-16, 5)] * len(centre))
    return np.exp(best.x)
