"""Similarity of representations."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kdnas.numerics import centre, safe_normalize, widen


def dissimilarity(feature: Tensor | Sequence[Tensor]) -> Tensor:
    """Representational dissimilarity matrix: `RDM_ij = 1 - Pearson(feature_i, feature_j)`.

    Shapes: `[batch, ...]` to `[batch, batch]`, symmetric, zero diagonal, entries in [0, 2]. A sample of
    constant activations has correlation 0 with every other.

    Args:
        feature: one row per sample; or batches of rows of any sizes, of which two at a time are widened and normalised,
            so that many images need no second copy of their activations.

    Reference: Bashivan, Tensen, DiCarlo, Teacher Guided Architecture Search, ICCV 2019, section 3.
    """
    if isinstance(feature, Tensor):
        rows = _directions(feature)
        return _as_dissimilarity(rows @ rows.T)
    blocks: list[list[Tensor]] = [[] for _ in feature]
    for i, first in enumerate(feature):
        rows = _directions(first)
        for j, second in enumerate(feature[: i + 1]):
            block = rows @ (rows if i == j else _directions(second)).T
            blocks[i].append(block)
            if i != j:
                blocks[j].append(block.T)
    return _as_dissimilarity(torch.cat([torch.cat(row, 1) for row in blocks]))


def _directions(feature: Tensor) -> Tensor:
    return standard(widen(feature).flatten(1))


def _as_dissimilarity(correlations: Tensor) -> Tensor:
    matrix = 1 - correlations.clamp(-1, 1)
    matrix = (matrix + matrix.T) / 2  # a matrix product is symmetric up to rounding only
    return matrix * (1 - torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device))


def upper(matrix: Tensor) -> Tensor:
    """The strict upper triangle, `[batch, batch]` to `[batch * (batch - 1) / 2]`."""
    row, column = torch.triu_indices(len(matrix), len(matrix), 1, device=matrix.device)
    return matrix[row, column]


def pearson(x: Tensor, y: Tensor, dim: int = -1) -> Tensor:
    """Pearson correlation along `dim`; 0, with gradient 0, where either side is constant."""
    return (standard(x, dim) * standard(y, dim)).sum(dim)


def standard(x: Tensor, dim: int = -1) -> Tensor:
    """Each vector along `dim` minus its mean, at norm 1: Pearson correlation is the scalar product of two of them."""
    return safe_normalize(centre(x, dim), dim)


def ranks(x: Tensor) -> Tensor:
    """Ranks of a vector, ties sharing their mean rank; no gradient."""
    from scipy.stats import rankdata  # slow to import

    return torch.as_tensor(rankdata(x.detach().cpu().numpy()), dtype=x.dtype, device=x.device)


def rdm_similarity(student: Tensor, teacher: Tensor, compare: str = "pearson") -> Tensor:
    """Correlation of the strict upper triangles of two dissimilarity matrices `[batch, batch]`.

    0 for fewer than 3 samples, which have at most one entry, and where all entries of a matrix are equal.

    Args:
        student: the student's matrix.
        teacher: the teacher's matrix.
        compare: `pearson` or `spearman` (no gradient).
    """
    a, b = triangle(student, compare), triangle(teacher, compare)
    return a.sum() * 0 if len(a) < 2 else pearson(a, b)


def triangle(matrix: Tensor, compare: str = "pearson") -> Tensor:
    """The strict upper triangle of a dissimilarity matrix or, for `spearman`, its ranks.

    Zero where all entries are equal up to the rounding of a correlation, whose spread would be normalised to r = +-1.

    Args:
        matrix: `[batch, batch]`.
        compare: `pearson` or `spearman` (no gradient).
    """
    if compare not in ("pearson", "spearman"):
        raise ValueError(f"compare must be pearson or spearman, got {compare!r}.")
    entries = upper(matrix)
    if len(entries) == 0:
        return entries
    spread = entries.detach().amax() - entries.detach().amin()
    entries = entries * (spread > 64 * torch.finfo(entries.dtype).eps)
    return ranks(entries) if compare == "spearman" else entries


def linear_cka(student: Tensor, teacher: Tensor) -> Tensor:
    """Linear centred kernel alignment of two features `[batch, ...]`, in [0, 1]; 0 where either is constant.

    Reference: Kornblith et al., Similarity of Neural Network Representations Revisited, ICML 2019, section 3.
    """
    return (unit_gram(student) * unit_gram(teacher)).sum()


def unit_gram(feature: Tensor) -> Tensor:
    """The Gram matrix of a feature centred over the batch, as a vector of norm 1: `[batch, ...]` to `[batch^2]`.

    Zero for a feature that is constant over the samples.
    """
    rows = centre(widen(feature).flatten(1), 0)
    largest = rows.detach().abs().amax()
    rows = rows / torch.where(largest > 0, largest, 1.0)
    return safe_normalize((rows @ rows.T).flatten())


def relative_l1(student: Tensor, teacher: Tensor) -> Tensor:
    r"""DNA's rating of a block: $\|Y - \hat Y\|_1 / (K \sigma(Y))$, teacher $Y$, student $\hat Y$, both of $K$ entries.

    $\sigma$ is the standard deviation of all the teacher's entries, divided by $K$. 0 where the two are equal;
    independent of a common scale. For a constant teacher, $\sigma$ is its absolute value, and 1 for zeros.

    Reference: Li et al., Blockwisely Supervised NAS with Knowledge Distillation, CVPR 2020, equation 7 (the rating).

    Raises:
        ValueError: the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"relative_l1 needs equal shapes, got {tuple(student.shape)} and {tuple(teacher.shape)}. Fit an adapter."
        )
    y = widen(teacher).flatten()
    largest = y.detach().abs().amax()
    scale = torch.where(largest > 0, largest, 1.0)
    # Scaled before squaring: squares of large values overflow, those of small ones underflow.
    deviation = centre(y / scale).square().mean().sqrt()
    unit = scale * torch.where(deviation > 0, deviation, 1.0)
    return ((widen(student).flatten() - y) / unit).abs().mean()
