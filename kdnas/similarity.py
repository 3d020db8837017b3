"""How alike two representations are, and how alike two rankings are."""

from collections.abc import Sequence

import numpy as np
import scipy.stats
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from kdnas.numerics import centre, safe_normalize, widen


def dissimilarity(feature: Tensor) -> Tensor:
    """Representational dissimilarity matrix: `RDM_ij = 1 - Pearson(feature_i, feature_j)`.

    Shapes: `[batch, ...]` to `[batch, batch]`, symmetric, zero diagonal, entries in [0, 2]. A sample whose
    activations are constant correlates 0 with every other.

    Reference: Bashivan, Tensen, DiCarlo, Teacher Guided Architecture Search, ICCV 2019, section 3.
    """
    rows = widen(feature).flatten(1)
    rows = safe_normalize(centre(rows))
    matrix = 1 - (rows @ rows.T).clamp(-1, 1)
    matrix = (matrix + matrix.T) / 2  # a matrix product is symmetric only up to rounding
    return matrix * (1 - torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device))


def upper(matrix: Tensor) -> Tensor:
    """The strict upper triangle, `[batch, batch]` to `[batch * (batch - 1) / 2]`."""
    row, column = torch.triu_indices(len(matrix), len(matrix), 1, device=matrix.device)
    return matrix[row, column]


def pearson(x: Tensor, y: Tensor, dim: int = -1) -> Tensor:
    """Pearson correlation along `dim`; 0, with gradient 0, where either side is constant."""
    return (safe_normalize(centre(x, dim), dim) * safe_normalize(centre(y, dim), dim)).sum(dim)


def ranks(x: Tensor) -> Tensor:
    """Ranks of a vector, ties sharing their mean rank; no gradient."""
    return torch.as_tensor(scipy.stats.rankdata(x.detach().cpu().numpy()), dtype=x.dtype, device=x.device)


def rdm_similarity(student: Tensor, teacher: Tensor, compare: str = "pearson") -> Tensor:
    """Correlation of the strict upper triangles of two dissimilarity matrices `[batch, batch]`.

    With fewer than 3 samples there is at most one entry to compare, and the result is 0, as it is where all
    entries of a side are equal.

    Args:
        student: the student's matrix.
        teacher: the teacher's matrix.
        compare: `pearson` or `spearman` (no gradient).
    """
    a, b = upper(student), upper(teacher)
    if len(a) < 2:
        return a.sum() * 0
    # Entries are 1 minus a rounded correlation; a spread of that size is none, and would be blown up to r = +-1.
    a, b = (t * (t.detach().amax() - t.detach().amin() > 64 * torch.finfo(t.dtype).eps) for t in (a, b))
    if compare == "spearman":
        a, b = ranks(a), ranks(b)
    elif compare != "pearson":
        raise ValueError(f"compare must be pearson or spearman, got {compare!r}.")
    return pearson(a, b)


def linear_cka(student: Tensor, teacher: Tensor) -> Tensor:
    """Linear centred kernel alignment of two features `[batch, ...]`, in [0, 1]; 0 where either is constant.

    Reference: Kornblith et al., Similarity of Neural Network Representations Revisited, ICML 2019, section 3.
    """
    grams = []
    for feature in (student, teacher):
        rows = widen(feature).flatten(1)
        rows = centre(rows, 0)
        largest = rows.detach().abs().amax()
        rows = rows / torch.where(largest > 0, largest, 1.0)
        grams.append((rows @ rows.T).flatten())
    return (safe_normalize(grams[0]) * safe_normalize(grams[1])).sum()


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
