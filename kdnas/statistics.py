"""Rank correlations, bootstrap intervals, Pareto fronts, and the sentence of a comparison of accuracies.

SciPy is imported where a correlation is computed, as its import takes longer than writing a report.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

_T = TypeVar("_T")
Array = NDArray[np.float64]
Statistic = Callable[[Array], Array]
"""A measure from mean grades: `[..., *grade]` to `[...]`."""
Rows = NDArray[np.int64]
"""Indices of rows drawn with replacement, `[resamples, rows]`."""

_AT_ONCE = 2**22  # indices drawn at once: bounds memory to a few dozen MB
_PAIRWISE = 48  # up to so many points are compared in pairs
_NORMAL = 1.959964  # standard deviations that hold 95 %


def kendall(x: ArrayLike, y: ArrayLike) -> float:
    """Kendall's tau-b; 0 where it is undefined (fewer than 2 values, or a constant side)."""
    from scipy.stats import kendalltau

    return _defined(kendalltau, x, y)


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Spearman's rho; 0 where it is undefined."""
    from scipy.stats import spearmanr

    return _defined(spearmanr, x, y)


def _defined(correlation: Callable[[Array, Array], Any], x: ArrayLike, y: ArrayLike) -> float:
    a, b = np.asarray(x, float), np.asarray(y, float)
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(correlation(a, b).statistic)


def interval(
    statistic: Callable[..., Array], *columns: ArrayLike, seed: int | Sequence[int] = 0, resamples: int = 1000
) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of a statistic of paired columns.

    Args:
        statistic: `statistic(*columns, rows)` with the rows drawn, `[resamples, rows]`, gives one value per resample:
            `resampled_mean`, `resampled_max`, `resampled_kendall`, `resampled_spearman`, or any other.
        columns: `[rows]` each, or more axes where the statistic takes them; rows stay together.
        seed: of the resamples.
        resamples: how many.

    Returns:
        The 2.5 % and the 97.5 % percentile, linear between order statistics.
    """
    arrays = [np.asarray(column, float) for column in columns]
    count, rng = len(arrays[0]), np.random.default_rng(seed)
    size = max(1, _AT_ONCE // max(1, count))
    parts = [min(size, resamples - start) for start in range(0, resamples, size)]
    return percentiles(np.concatenate([statistic(*arrays, rng.integers(count, size=(n, count))) for n in parts]))


def percentiles(values: ArrayLike) -> tuple[float, float]:
    """The 2.5 % and the 97.5 % percentile of the values of a bootstrap."""
    low, high = np.percentile(np.asarray(values, float), [2.5, 97.5])
    return float(low), float(high)


def difference_interval(
    first: Array, second: Array, resamples: int = 2000, *, quality: Statistic | None = None
) -> tuple[float, float, float]:
    r"""Mean of the first less mean of the second over paired rows, and its 95 % bootstrap interval.

    With several seeds, rows and each side's seeds are resampled independently. A mean over $S$ seeds that are drawn
    with replacement varies too little by $(S - 1) / S$, so its deviation is multiplied by $\sqrt{S / (S - 1)}$.

    Args:
        first: `[rows]`, or `[seeds, rows]`; with `quality`, `[seeds, rows, *grade]`.
        second: the same, with any number of seeds.
        resamples: how many.
        quality: a measure of each seed's mean over rows, whose means over seeds are compared; None for the mean itself.
    """
    columns = [np.atleast_2d(side).swapaxes(0, 1) for side in (first, second)]
    if quality is None and all(side.shape[1] == 1 for side in columns):
        difference = columns[0][:, 0] - columns[1][:, 0]
        return float(difference.mean()), *interval(resampled_mean, difference, resamples=resamples)
    rng = np.random.default_rng(1)

    def resampled(first: Array, second: Array, rows: Rows) -> Array:
        counts = _counts(rows) / rows.shape[1]
        ours, theirs = (_means(counts, side) for side in (first, second))
        if quality is not None:
            ours, theirs = quality(ours), quality(theirs)
        return _over_seeds(ours, rng) - _over_seeds(theirs, rng)

    means = [side.mean() if quality is None else quality(side.mean(0)).mean() for side in columns]
    return float(means[0] - means[1]), *interval(resampled, *columns, resamples=resamples)


def mean_interval(grades: Array, resamples: int = 2000, *, quality: Statistic | None = None) -> tuple[float, float]:
    """The 95 % bootstrap interval of a mean over rows, or of a measure of it.

    Args:
        grades: `[rows, *grade]`.
        resamples: how many.
        quality: the measure of mean grades `[resamples, *grade]`; None for the mean itself.

    Example:
        >>> mean_interval(np.array([0.0, 1.0] * 50))
        (0.4, 0.6)
    """

    def resampled(grades: Array, rows: Rows) -> Array:
        means = _means(_counts(rows) / rows.shape[1], grades)
        return means if quality is None else quality(means)

    return interval(resampled, grades, resamples=resamples)


def _means(shares: Array, grades: Array) -> Array:
    """Means of rows `[rows, *grade]` by their shares in each sample `[samples, rows]`."""
    return (shares @ grades.reshape(len(grades), -1)).reshape(-1, *grades.shape[1:])


def _over_seeds(means: Array, rng: np.random.Generator) -> Array:
    """The mean over seeds drawn with replacement, `[resamples, seeds]` to `[resamples]`; see `difference_interval`."""
    whole, count = means.mean(1), means.shape[1]
    if count == 1:
        return whole
    drawn = np.take_along_axis(means, rng.integers(count, size=means.shape), axis=1).mean(1)
    return whole + (drawn - whole) * math.sqrt(count / (count - 1))


def compare_accuracy(
    what: str,
    hits: Array,
    other: Array,
    words: str,
    otherwise: str = "",
    *,
    measure: str = "accuracy",
    quality: Statistic | None = None,
) -> dict[str, Any]:
    """Difference of the test accuracies, or another measure, of two networks: value, interval, sentence of a control.

    Args:
        what: name of the first network.
        hits: 1 for each image that it classifies correctly, else 0: `[images]`, or `[seeds, images]` of several
            trainings; of another measure the grades, `[seeds, images, *grade]`.
        other: the same for the second network, or a mean over several networks.
        words: name of the second network.
        otherwise: conclusion where the second network is significantly better.
        measure: name of the measure.
        quality: the measure of mean grades, where it is not their mean.
    """
    gain, low, high = difference_interval(hits, other, quality=quality)
    sentence = f"The {what}'s test {measure} less that of {words}: {100 * gain:+.2f} points "
    sentence += f"[{100 * low:+.2f}, {100 * high:+.2f}]."
    if low <= 0 <= high:
        seeds, images = np.atleast_2d(hits).shape[:2]
        trainings = "one seed" if seeds == 1 else f"{seeds} seeds"
        sentence += f" On {images} test images and {trainings} the two are not distinguishable."
    elif high < 0 and otherwise:
        sentence += f" Here {otherwise}."
    return {"value": gain, "interval": [low, high], "sentence": sentence}


def resampled_mean(x: Array, rows: Rows) -> Array:
    """The mean of every resample of a column `[rows]`."""
    return x[rows].mean(1)


def resampled_max(x: Array, rows: Rows) -> Array:
    """The largest value of every resample of a column `[rows]`."""
    return x[rows].max(1)


def resampled_kendall(x: Array, y: Array, rows: Rows) -> Array:
    """Kendall's tau-b of every resample of two columns `[rows]`, 0 where it is undefined; copies of a row tie."""
    counts = _counts(rows)
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


def resampled_spearman(x: Array, y: Array, rows: Rows) -> Array:
    """Spearman's rho of every resample of two columns `[rows]`, 0 where it is undefined."""
    counts = _counts(rows)
    centre = (counts.sum(1, keepdims=True) + 1) / 2
    a, b = (_mean_ranks(v, counts) - centre for v in (x, y))
    covariance, size = (counts * a * b).sum(1), np.sqrt((counts * a * a).sum(1) * (counts * b * b).sum(1))
    return np.divide(covariance, size, out=np.zeros_like(covariance), where=size > 0)


def _counts(rows: Rows) -> NDArray[np.int64]:
    """How often each row is in each resample, `[resamples, rows]`."""
    return np.stack([np.bincount(places, minlength=rows.shape[1]) for places in rows])


def _mean_ranks(values: Array, counts: NDArray[np.int64]) -> Array:
    """The rank of every row in every resample, ties sharing their mean, `[resamples, rows]`."""
    order = np.argsort(values, kind="stable")
    _, first, place = np.unique(values[order], return_index=True, return_inverse=True)
    tied = np.add.reduceat(counts[:, order], first, axis=1).astype(float)
    ranks = np.empty(counts.shape)
    ranks[:, order] = (np.cumsum(tied, 1) - (tied - 1) / 2)[:, place]
    return ranks


def precision_at_top(scores: Array, truths: Array, share: float) -> Array:
    """Share of the `k = ceil(share * n)` best networks by score that are among the `k` best by truth.

    A network is among the best when its truth reaches that of the k-th. Where equal scores straddle the k-th place, the
    expectation over random tie-breaking is returned. `[..., networks]` to `[...]`.
    """
    num = max(1, math.ceil(share * scores.shape[-1] - 1e-9))
    true_best = truths >= np.partition(truths, -num)[..., -num, None]
    edge = np.partition(scores, -num)[..., -num, None]
    above, tied = scores > edge, scores == edge
    tied_share = (true_best & tied).sum(-1) / tied.sum(-1)
    return ((true_best & above).sum(-1) + (num - above.sum(-1)) * tied_share) / num


def regret(scores: Array, truths: Array, costs: Array, bound: float) -> Array:
    """Truth of the best network within the bound minus that of the network with the highest score within it.

    In the truth's unit, 0 is best; the mean over networks that tie for the highest score. NaN where no network is
    within the bound. `[..., networks]` to `[...]`.
    """
    within = costs <= bound
    best = np.where(within, truths, -math.inf).max(-1)
    highest = np.where(within, scores, -math.inf).max(-1, keepdims=True)
    chosen = within & (scores == highest)
    count = chosen.sum(-1)
    mean = np.where(chosen, truths, 0.0).sum(-1) / np.maximum(count, 1)
    return np.where(count > 0, best - mean, math.nan)


def points_lost(scores: Array, truths: Array, costs: Array, bound: float, count: int) -> Array:
    """Truth of the best network within the bound minus that of the best of the `count` best-scored ones within it.

    What is lost where so many are trained and the best one is kept. In the truth's unit, 0 is best. Where equal scores
    straddle the last place, the expectation over random tie-breaking. NaN where no network is within the bound.
    `[..., networks]` to `[...]`.

    Example:
        >>> truths, costs = np.array([90.0, 92.0, 91.0]), np.ones(3)
        >>> [float(points_lost(np.array([3.0, 1.0, 2.0]), truths, costs, 1, count)) for count in (1, 2, 3)]
        [2.0, 1.0, 0.0]
    """
    networks = scores.shape[-1]
    rows = zip(*(np.broadcast_to(a, scores.shape).reshape(-1, networks) for a in (scores, truths, costs)), strict=True)
    lost = [_points_lost(s[c <= bound], t[c <= bound], count) for s, t, c in rows]
    return np.array(lost).reshape(scores.shape[:-1])


def _points_lost(scores: Array, truths: Array, count: int) -> float:
    if len(scores) <= count:
        return 0.0 if len(scores) else math.nan
    cut = np.partition(scores, -count)[-count]
    sure, tied = truths[scores > cut], np.sort(truths[scores == cut])
    drawn = count - len(sure)
    # The best of those drawn is the j-th smallest of all m tied ones in C(j - 1, drawn - 1) of C(m, drawn) cases.
    cases = np.array([math.comb(j - 1, drawn - 1) for j in range(drawn, len(tied) + 1)], float)
    best = np.maximum(tied[drawn - 1 :], sure.max(initial=-math.inf))
    return float(truths.max() - cases @ best / cases.sum())


def apart(candidates: Iterable[_T], count: int, distance: Callable[[_T, _T], float], least: float) -> list[_T]:
    """The first candidates of which each is apart from all before it.

    Args:
        candidates: best first.
        count: how many at most.
        distance: of two candidates.
        least: smallest distance of two that are apart.

    Example:
        >>> apart([9, 8, 7, 5, 1], 3, lambda a, b: abs(a - b), 2)
        [9, 7, 5]
    """
    chosen: list[_T] = []
    for candidate in candidates:
        if len(chosen) >= count:
            break
        if all(distance(candidate, other) >= least for other in chosen):
            chosen.append(candidate)
    return chosen


def pareto_front(objectives: ArrayLike, *, distinct: bool = False) -> NDArray[np.int64]:
    """Ascending indices of the points that no other dominates, by being no larger in all objectives and smaller in one.

    Args:
        objectives: finite, `[points, objectives]`, all minimised.
        distinct: whether of equal points only the first is on the front; by default all of them are.

    Reference: Kung, Luccio, Preparata, On Finding the Maxima of a Set of Vectors, JACM 1975: sorted by one objective
        and halved; the second half's front is filtered by the first's.
    """
    values = np.asarray(objectives, float)
    if not len(values):
        return np.zeros(0, int)
    order = np.lexsort(values.T[::-1])
    points = values[order]
    front = _sweep(points[:, 1:])
    if not distinct:
        number = np.concatenate([[0], np.cumsum((points[1:] != points[:-1]).any(1))])
        front = np.flatnonzero(np.isin(number, number[front]))
    return np.sort(order[front])


def _sweep(points: Array) -> NDArray[np.int64]:
    """Indices of the points that no point before them equals or beats in every coordinate."""
    if points.shape[1] == 1:
        before = np.concatenate([[math.inf], np.minimum.accumulate(points[:, 0])[:-1]])[: len(points)]
        return np.flatnonzero(points[:, 0] < before)
    if len(points) <= _PAIRWISE:
        beaten = (points[None] <= points[:, None]).all(2)
        return np.flatnonzero(~np.tril(beaten, -1).any(1))
    half = len(points) // 2
    first = _sweep(points[:half])
    later = half + np.flatnonzero(~_beaten(points[half:], points[first]))
    return np.concatenate([first, later[_sweep(points[later])]])


def _beaten(points: Array, by: Array) -> NDArray[np.bool_]:
    """Whether any point of `by` is no larger in every coordinate."""
    if points.shape[1] != 2:
        return np.array([bool((by <= point).all(1).any()) for point in points], bool)
    by = by[np.argsort(by[:, 0], kind="stable")]
    least = np.minimum.accumulate(by[:, 1])
    place = np.searchsorted(by[:, 0], points[:, 0], side="right")
    return (place > 0) & (least[np.maximum(place - 1, 0)] <= points[:, 1])


MOST_SHARE, LEAST_SHARE = 0.95, 0.01


def share_sentence(term: str, share: float, count: int = 2) -> str:
    """A sentence on a loss term that makes nearly all of the gradient, or nearly none; empty otherwise.

    Args:
        term: its name.
        share: its part in the sum of the norms of all terms' gradients.
        count: of the terms; one alone has all of it.

    Example:
        >>> share_sentence("hint", 0.004)
        "the loss 'hint' makes 0.4% of the gradient, so that it hardly acts. Raise its weight, or leave it out."
    """
    if count < 2 or LEAST_SHARE <= share <= MOST_SHARE:
        return ""
    words = f"the loss {term!r} makes {share:.1%} of the gradient, so that"
    if share < LEAST_SHARE:
        return f"{words} it hardly acts. Raise its weight, or leave it out."
    return f"{words} the others hardly act. Lower its weight, or raise theirs."


def guessing(classes: int, count: int) -> float:
    """The accuracy that guessing stays below on so many images: its mean and two standard errors.

    Example:
        >>> guessing(2, 100)
        0.6
    """
    return 1 / classes + 2 * math.sqrt((1 - 1 / classes) / classes / count)


def wilson(hits: float, count: float) -> tuple[float, float]:
    """The 95 % interval of a share, by Wilson.

    `(p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)`

    Args:
        hits: of the count.
        count: number of trials.

    Example:
        >>> [round(bound, 4) for bound in wilson(50, 100)]
        [0.4038, 0.5962]

    Reference: Wilson, Probable Inference, the Law of Succession, and Statistical Inference, 1927.
    """
    share, extra = hits / count, _NORMAL**2 / count
    middle = share + extra / 2
    half = _NORMAL * math.sqrt(share * (1 - share) / count + extra / (4 * count))
    return (middle - half) / (1 + extra), (middle + half) / (1 + extra)
