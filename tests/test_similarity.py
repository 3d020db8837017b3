import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdnas.similarity import dissimilarity, linear_cka, pearson, ranks, rdm_similarity, upper

SEEDS = st.integers(0, 10_000)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(size, seed):
    return torch.linalg.qr(normal(size, size, seed=seed))[0]


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.integers(2, 7))
def test_dissimilarities_are_symmetric_with_zero_diagonal_between_0_and_2(seed, batch):
    matrix = dissimilarity(normal(batch, 3, 4, 2, seed=seed).float())
    assert matrix.shape == (batch, batch)
    assert torch.equal(matrix, matrix.T)
    assert torch.equal(matrix.diagonal(), torch.zeros(batch))
    assert matrix.min() >= 0 and matrix.max() <= 2


def test_dissimilarity_agrees_with_numpy():
    maps = normal(5, 3, 4)
    assert np.allclose(dissimilarity(maps).numpy(), 1 - np.corrcoef(maps.flatten(1).numpy()), atol=1e-13)


def test_opposite_samples_are_2_apart_and_equal_ones_0():
    x = normal(1, 6)
    matrix = dissimilarity(torch.cat([x, -x, 3 * x + 1]))
    assert matrix[0].tolist() == pytest.approx([0, 2, 0], abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(SEEDS)
def test_dissimilarity_is_invariant_to_permuting_units_and_to_scaling_and_shifting_a_sample(seed):
    maps = normal(4, 12, seed=seed)
    units = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    scale, shift = normal(4, 1, seed=seed + 1).exp(), normal(4, 1, seed=seed + 2)
    assert torch.allclose(dissimilarity(maps[:, units] * scale + shift), dissimilarity(maps), atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(SEEDS)
def test_similarity_of_two_rdms_is_invariant_to_the_order_of_samples(seed):
    student, teacher = normal(6, 9, seed=seed), normal(6, 5, seed=seed + 1)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    for compare in ("pearson", "spearman"):
        plain = rdm_similarity(dissimilarity(student), dissimilarity(teacher), compare)
        shuffled = rdm_similarity(dissimilarity(student[order]), dissimilarity(teacher[order]), compare)
        assert float(shuffled) == pytest.approx(float(plain), abs=1e-10)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6, -3.7])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_constant_features_correlate_zero_and_never_make_nan(value, dtype):
    constant = torch.full((4, 3, 7), min(value, 6e4), dtype=dtype)
    maps = normal(4, 21).to(dtype)
    assert torch.equal(dissimilarity(constant), 1 - torch.eye(4, dtype=dissimilarity(constant).dtype))
    mixed = torch.cat([constant.flatten(1)[:1], maps[1:]])
    assert torch.equal(dissimilarity(mixed)[0, 1:], torch.ones(3, dtype=dissimilarity(constant).dtype))
    for compare in ("pearson", "spearman"):
        assert float(rdm_similarity(dissimilarity(constant), dissimilarity(maps), compare)) == 0
    assert float(linear_cka(constant, maps)) == 0


@pytest.mark.parametrize("compare", ["pearson", "spearman"])
def test_a_batch_of_equal_samples_has_no_correlation_and_no_gradient(compare):
    # In float32 the correlations of equal rows differ from 1, and from each other, by rounding.
    row = normal(1, 4000, seed=3).float()
    student = row.repeat(6, 1).requires_grad_()
    found = rdm_similarity(dissimilarity(student), dissimilarity(normal(6, 9).float()), compare)
    assert found.item() == 0
    if compare == "pearson":
        (slope,) = torch.autograd.grad(found, student)
        assert slope.abs().max() == 0


def test_similarity_of_rdms_by_hand():
    student = torch.tensor([[0.0, 1, 2], [1, 0, 3], [2, 3, 0]])
    teacher = torch.tensor([[0.0, 1, 3], [1, 0, 2], [3, 2, 0]])
    # Triangles (1, 2, 3) and (1, 3, 2): deviations (-1, 0, 1) and (-1, 1, 0).
    for compare in ("pearson", "spearman"):
        assert float(rdm_similarity(student, teacher, compare)) == pytest.approx(0.5)
        assert float(rdm_similarity(student, student, compare)) == pytest.approx(1)
    assert upper(student).tolist() == [1, 2, 3]


def test_spearman_sees_ranks_only():
    matrix = dissimilarity(normal(6, 8))
    assert float(rdm_similarity(matrix**3, matrix, "spearman")) == pytest.approx(1)
    assert float(rdm_similarity(matrix**3, matrix, "pearson")) < 0.999


def test_fewer_than_three_samples_have_nothing_to_correlate():
    for batch in (1, 2):
        matrix = dissimilarity(normal(batch, 5))
        assert float(rdm_similarity(matrix, matrix)) == 0


def test_another_comparison_is_refused():
    matrix = dissimilarity(normal(4, 5))
    with pytest.raises(ValueError, match="compare must be pearson or spearman, got 'kendall'"):
        rdm_similarity(matrix, matrix, "kendall")


def test_pearson_agrees_with_scipy_and_is_zero_without_slope_for_a_constant():
    x, y = normal(3, 8), normal(3, 8, seed=1)
    expected = [scipy.stats.pearsonr(a, b).statistic for a, b in zip(x.numpy(), y.numpy(), strict=True)]
    assert pearson(x, y).tolist() == pytest.approx(expected, rel=1e-12)
    assert pearson(x.T, y.T, dim=0).tolist() == pytest.approx(expected, rel=1e-12)
    constant = torch.full((7,), 0.1, requires_grad=True)
    (slope,) = torch.autograd.grad(pearson(constant, x[0, :7].float()), constant)
    assert slope.abs().max() == 0


def test_tied_values_share_their_mean_rank():
    assert ranks(torch.tensor([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1, 3.5, 2]


def test_linear_cka_agrees_with_centred_gram_matrices():
    x, y = normal(7, 3, 2), normal(7, 5, seed=1)
    h = np.eye(7) - 1 / 7
    k, m = (h @ (f.flatten(1).numpy() @ f.flatten(1).numpy().T) @ h for f in (x, y))
    expected = np.sum(k * m) / np.sqrt(np.sum(k * k) * np.sum(m * m))
    assert float(linear_cka(x, y)) == pytest.approx(expected, rel=1e-12)


@settings(max_examples=25, deadline=None)
@given(SEEDS)
def test_linear_cka_is_symmetric_between_0_and_1_and_invariant_to_rotation_scale_and_shift(seed):
    x, y = normal(6, 4, seed=seed), normal(6, 5, seed=seed + 1)
    found = float(linear_cka(x, y))
    assert 0 <= found <= 1
    assert float(linear_cka(y, x)) == pytest.approx(found, rel=1e-10)
    moved = 1e6 * x @ rotation(4, seed) + normal(4, seed=seed + 2)
    assert float(linear_cka(moved, y)) == pytest.approx(found, rel=1e-7)
    assert float(linear_cka(moved, x)) == pytest.approx(1, rel=1e-7)


def test_linear_cka_neither_overflows_nor_underflows_in_float32():
    x, y = normal(6, 4).float(), normal(6, 5, seed=1).float()
    for scale in (1e-20, 1e20):
        assert float(linear_cka(scale * x, y)) == pytest.approx(float(linear_cka(x, y)), rel=1e-5)
