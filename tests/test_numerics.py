import math

import numpy as np
import pytest
import torch

from kdnas.numerics import (
    as_map,
    centre,
    flat,
    pairwise_distances,
    rescale,
    safe_norm,
    safe_normalize,
    safe_sqrt,
    same_positions,
    squared_distances,
    widen,
)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gradient(function, x):
    x = x.detach().clone().requires_grad_()
    (found,) = torch.autograd.grad(function(x).sum(), x)
    return found


def test_half_precision_is_widened_and_nothing_else():
    for given, expected in (
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        assert widen(torch.ones(2, dtype=given)).dtype is expected


def test_normalised_rows_have_length_one_and_dead_rows_stay_zero_without_gradient():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [-1e-30, 0.0], [1e30, 1e30]])
    assert torch.allclose(safe_normalize(x), torch.tensor([[0.6, 0.8], [0, 0], [-1, 0], [0.5**0.5, 0.5**0.5]]))
    slope = gradient(lambda v: safe_normalize(v)[:, 0], x)
    assert torch.isfinite(slope).all()
    assert slope[1].abs().max() == 0


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_normalisation_and_norm_agree_with_numpy_along_any_dimension(dim):
    x = normal(3, 4, 5)
    length = np.linalg.norm(x.numpy(), axis=dim, keepdims=True)
    assert np.allclose(safe_normalize(x, dim).numpy(), x.numpy() / length, rtol=1e-14)
    assert np.allclose(safe_norm(x, dim).numpy(), length.squeeze(dim), rtol=1e-14)


def test_norm_over_two_dimensions_keeps_the_shape_of_the_rest():
    x = normal(3, 4, 5)
    assert torch.allclose(safe_norm(x, (1, 2)), x.flatten(1).norm(dim=1), rtol=1e-14)


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e6, 1e30])
def test_norms_neither_overflow_nor_underflow_in_float32(scale):
    x = torch.tensor([3.0, 4.0]) * scale
    assert float(safe_norm(x)) == pytest.approx(5 * scale, rel=1e-6)
    assert torch.allclose(gradient(safe_norm, x), torch.tensor([0.6, 0.8]))


def test_norm_and_square_root_have_slope_zero_at_zero():
    assert gradient(safe_norm, torch.zeros(3)).abs().max() == 0
    assert torch.equal(gradient(safe_sqrt, torch.tensor([0.0, 4.0])), torch.tensor([0.0, 0.25]))


def test_gradients_agree_with_finite_differences():
    x = normal(3, 4).requires_grad_()
    for function in (safe_normalize, safe_norm, lambda v: safe_sqrt(v.exp()), centre):
        assert torch.autograd.gradcheck(function, x)
        assert torch.autograd.gradgradcheck(function, x)
    assert torch.autograd.gradcheck(lambda v: pairwise_distances(v)[~torch.eye(3, dtype=torch.bool)], x)
    assert torch.autograd.gradcheck(squared_distances, x)
    assert torch.autograd.gradcheck(squared_distances, (x, normal(2, 4, seed=1).requires_grad_()))


def test_rescaling_leaves_zeros_and_brings_the_largest_entry_to_one():
    x = torch.tensor([[0.0, 0.0], [2.0, -8.0]])
    assert torch.equal(rescale(x), torch.tensor([[0, 0], [0.25, -1]]))
    assert torch.equal(rescale(x, (0, 1)), x / 8)


def test_a_constant_vector_minus_its_mean_is_exactly_zero():
    # The mean of 11 times 0.1 is not 0.1 in float32: subtracting it leaves what normalising turns into a unit vector.
    for value in (0.1, -7.3, 1e6, 1e-30):
        assert centre(torch.full((5, 11), value)).abs().max() == 0
    x = normal(4, 5)
    assert np.allclose(centre(x, 0).numpy(), x.numpy() - x.numpy().mean(0), atol=1e-15)


def test_distances_agree_with_loops():
    x, y = normal(5, 3).numpy(), normal(4, 3, seed=1).numpy()
    expected = np.array([[math.dist(a, b) for b in y] for a in x])
    found = pairwise_distances(torch.from_numpy(x), torch.from_numpy(y))
    assert np.allclose(found.numpy(), expected, rtol=1e-13)
    squared = squared_distances(torch.from_numpy(x), torch.from_numpy(y))
    assert np.allclose(squared.numpy(), expected**2, rtol=1e-12)


def test_distances_of_a_stack_are_those_of_each():
    x, y = normal(2, 5, 3), normal(2, 4, 3, seed=1)
    found = squared_distances(x, y)
    assert found.shape == (2, 5, 4)
    for index in range(2):
        assert torch.allclose(found[index], squared_distances(x[index], y[index]), rtol=1e-12)


@pytest.mark.parametrize("function", [pairwise_distances, squared_distances])
def test_equal_rows_have_distance_and_gradient_zero(function):
    x = normal(1, 7370, seed=195).float().repeat(22, 1)
    assert function(x).abs().max() == 0
    assert gradient(function, x).abs().max() == 0


def test_distances_of_nearly_equal_rows_far_from_the_origin_keep_their_digits():
    x = torch.tensor([[1000.0, 0], [1000.0, 1e-3]])
    assert float(pairwise_distances(x)[0, 1]) == pytest.approx(1e-3, rel=1e-6)
    # By matrix products, without centring, 2e6 - 2e6.
    assert float(squared_distances(x)[0, 1]) == pytest.approx(1e-6, rel=1e-5)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_distances_neither_overflow_nor_underflow_in_float32(scale):
    x = torch.tensor([[0.0, 0], [3, 4]]) * scale
    assert float(pairwise_distances(x)[0, 1]) == pytest.approx(5 * scale, rel=1e-6)


def test_maps_meet_at_the_smaller_height_and_the_smaller_width():
    student, teacher = normal(2, 3, 8, 4), normal(2, 5, 4, 6, seed=1)
    s, t = same_positions(student, teacher)
    assert s.shape == (2, 3, 4, 4) and t.shape == (2, 5, 4, 4)
    assert torch.allclose(s[:, :, 0], (student[:, :, 0] + student[:, :, 1]) / 2)
    assert torch.equal(same_positions(student, teacher, "max")[0][:, :, 0], student[:, :, :2].amax(2))
    assert same_positions(student, student)[0] is student


@pytest.mark.parametrize(
    ("tokens", "kept", "grid"), [(16, 16, (4, 4)), (17, 16, (4, 4)), (12, 12, (3, 4)), (1, 1, (1, 1)), (7, 7, (1, 7))]
)
def test_tokens_are_laid_out_on_the_most_nearly_square_grid_without_a_class_token(tokens, kept, grid):
    x = normal(2, tokens, 3)
    found = as_map(x)
    assert found.shape == (2, 3, *grid)
    assert torch.equal(found.flatten(2).transpose(1, 2), x[:, tokens - kept :])


@pytest.mark.parametrize("class_token", [0, 1])
def test_tokens_of_images_that_are_not_square_follow_the_given_aspect(class_token):
    image = normal(2, 3, 8, 4)
    tokens = torch.cat([torch.zeros(2, class_token, 3), image.flatten(2).transpose(1, 2)], 1)
    assert torch.equal(as_map(tokens, aspect=2.0), image)


def test_maps_stay_and_vectors_become_maps_of_one_position():
    x = normal(2, 3, 4, 5)
    assert as_map(x) is x
    assert as_map(x[:, :, 0, 0]).shape == (2, 3, 1, 1)
    assert flat(x).shape == (2, 60)
    with pytest.raises(ValueError, match=r"2, 3 or 4 dimensions, got shape \(2, 3, 4, 5, 1\)"):
        as_map(x[..., None])
