"""Rank correlations, intervals, and the sentences that claims are made of."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.stats
from numpy.typing import ArrayLike, NDArray


def kendall(x: ArrayLike, y: ArrayLike) -> float:
    """Kendall's tau-b; 0 where it is undefined (fewer than 2 values, or a constant side)."""
    return _defined(scipy.stats.kendalltau, x, y)


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Spearman's rho; 0 where it is undefined."""
    return _defined(scipy.stats.spearmanr, x, y)


def _defined(statistic: object, x: ArrayLike, y: ArrayLike) -> float:
    a, b = np.asarray(x, float), np.asarray(y, float)
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(statistic(a, b).statistic)  # type: ignore[operator]


def bootstrap_interval(
    x: Sequence[float], y: Sequence[float], statistic: object, seed: int = 0, resamples: int = 1000
) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of a rank statistic over paired values."""
    a, b = np.asarray(x, float), np.asarray(y, float)
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(resamples):
        chosen = rng.integers(len(a), size=len(a))
        values.append(statistic(a[chosen], b[chosen]))  # type: ignore[operator]
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


Array = NDArray[np.float64]


def precision_at_top(scores: Array, truths: Array, share: float) -> float:
    """Of the `k = ceil(share * n)` best by score, the part that is among the `k` best by truth.

    A network counts as among the best when its truth reaches that of the k-th. Where equal scores straddle the k-th
    place, the value expected from breaking the tie at random is taken.
    """
    num = max(1, math.ceil(share * len(scores) - 1e-9))
    true_best = truths >= np.partition(truths, -num)[-num]
    edge = np.partition(scores, -num)[-num]
    above, tied = scores > edge, scores == edge
    return float((true_best[above].sum() + (num - above.sum()) * true_best[tied].mean()) / num)


def regret(scores: Array, truths: Array, costs: Array, bound: float) -> float:
    """How much better than the network with the highest score within the bound the truly best one there is.

    In the truth's own unit, 0 at best; the mean over networks that tie for the highest score. NaN when nothing is
    within the bound.
    """
    within = costs <= bound
    if not within.any():
        return math.nan
    scores, truths = scores[within], truths[within]
    return float(truths.max() - truths[scores == scores.max()].mean())


def resampled_kendall(x: Array, y: Array, counts: NDArray[np.int64]) -> Array:
    """Kendall's tau-b of many resamples at once, 0 where it is undefined.

    Args:
        x: `[rows]`.
        y: `[rows]`.
        counts: `[resamples, rows]`, how often each row was drawn. Copies of one row tie in both.
    """
    agree, in_x, in_y = (np.zeros(len(counts)) for _ in range(3))
    weights = counts.astype(np.float32)
    for start in range(0, len(x), 512):  # bounds memory to 512 rows of the matrix of pairs
        part = slice(start, start + 512)
        a = np.sign(x[part, None] - x[None]).astype(np.float32)
        b = np.sign(y[part, None] - y[None]).astype(np.float32)
        for total, signs in ((agree, a * b), (in_x, a * a), (in_y, b * b)):
            total += ((weights @ signs.T) * weights[:, part]).sum(1, dtype=float)
    size = np.sqrt(in_x * in_y)
    return np.divide(agree, size, out=np.zeros_like(agree), where=size > 0)


def resampled_spearman(x: Array, y: Array, counts: NDArray[np.int64]) -> Array:
    """Spearman's rho of many resamples at once; arguments as in `resampled_kendall`."""
    number = counts.sum(1, keepdims=True)
    a, b = (_mean_ranks(v, counts) - (number + 1) / 2 for v in (x, y))
    covariance, size = (counts * a * b).sum(1), np.sqrt((counts * a * a).sum(1) * (counts * b * b).sum(1))
    return np.divide(covariance, size, out=np.zeros_like(covariance), where=size > 0)


def _mean_ranks(values: Array, counts: NDArray[np.int64]) -> Array:
    """The rank of every row in every resample, ties sharing their mean, `[resamples, rows]`."""
    order = np.argsort(values, kind="stable")
    _, first, place = np.unique(values[order], return_index=True, return_inverse=True)
    tied = np.add.reduceat(counts[:, order], first, axis=1).astype(float)
    found = np.empty(counts.shape)
    found[:, order] = (np.cumsum(tied, 1) - (tied - 1) / 2)[:, place]
    return found


def _with_interval(value: float, drawn: Array) -> list[float | None]:
    defined = drawn[np.isfinite(drawn)]
    if not math.isfinite(value) or not len(defined):
        return [value if math.isfinite(value) else None, None, None]
    low, high = np.percentile(defined, [2.5, 97.5])
    return [float(value), float(low), float(high)]


def compare_accuracy(what: str, hits: np.ndarray, other: np.ndarray, words: str, otherwise: str = "") -> dict[str, Any]:
    """What may be said of two networks on the test images: difference, interval and sentence of a control.

    Args:
        what: the first network.
        hits: which images it classifies right.
        other: the same of the second network, or a mean over several.
        words: the second network.
        otherwise: what follows where the second is surely better.
    """
    gain, low, high = gain_interval(hits, other)
    sentence = f"The {what}'s test accuracy less that of {words}: {100 * gain:+.2f} points "
    sentence += f"[{100 * low:+.2f}, {100 * high:+.2f}]."
    if low <= 0 <= high:
        sentence += f" On {len(other)} test images and one seed the two are not distinguishable."
    elif high < 0 and otherwise:
        sentence += f" Here {otherwise}."
    return {"value": gain, "interval": [low, high], "sentence": sentence}


def gain_interval(hits: np.ndarray, other: np.ndarray, resamples: int = 2000) -> tuple[float, float, float]:
    """Mean difference of two paired hit vectors, with its 95 % bootstrap interval over images."""
    difference = hits - other
    rng = np.random.default_rng(0)
    # One at a time: of 50,000 images all would take a gigabyte and more.
    means = [difference[rng.integers(len(difference), size=len(difference))].mean() for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(difference.mean()), float(low), float(high)
