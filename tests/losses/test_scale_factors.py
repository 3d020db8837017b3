import pytest
import torch

from kdnas.losses.check import value
from kdnas.losses.example import gates
from kdnas.losses.regulariser.scale_factors import ScaleFactors
from kdnas.specs import find_spec


def test_two_layers_by_hand():
    # Costs 1 and 3 have mean 2: 0.1 * (1/2 * (1 + 2) + 3/2 * 4).
    layers = [torch.tensor([1.0, -2.0]), torch.tensor([4.0])]
    assert ScaleFactors(strength=0.1).penalty(layers).item() == pytest.approx(0.7)
    assert ScaleFactors(strength=0.1, costs=(1.0, 3.0)).penalty(layers).item() == pytest.approx(0.75)


def test_golden():
    expected = 1e-4 * sum(abs(number) for gate in gates() for number in gate.tolist())
    assert ScaleFactors.golden == pytest.approx(expected, rel=1e-12)
    assert value(ScaleFactors) == ScaleFactors.golden


def test_the_step_is_the_minimiser_of_penalty_and_squared_distance():
    # Soft threshold 0.5 * 0.2 = 0.1, by hand.
    gate = torch.tensor([1.0, -1.0, 0.05, -0.1, 0.0], dtype=torch.float64)
    old = gate.clone()
    ScaleFactors(strength=0.2).proximal([gate], 0.5)
    assert gate.tolist() == pytest.approx([0.9, -0.9, 0, 0, 0])
    # And by search: the minimiser of (g - old)^2 / 2 + 0.1 |g| on a grid.
    grid = torch.linspace(-1.5, 1.5, 30001, dtype=torch.float64)
    for before, after in zip(old, gate, strict=True):
        best = grid[((grid - before) ** 2 / 2 + 0.1 * grid.abs()).argmin()]
        assert after.item() == pytest.approx(best.item(), abs=2e-4)


def test_costs_scale_the_threshold_of_their_layer():
    layers = [torch.ones(2), torch.ones(1)]
    ScaleFactors(strength=0.2, costs=(1.0, 3.0)).proximal(layers, 1.0)
    assert layers[0].tolist() == pytest.approx([0.9, 0.9]) and layers[1].tolist() == pytest.approx([0.7])


def test_the_proximal_step_reaches_zero_where_the_subgradient_does_not():
    # The task pulls two gates towards 1 and towards 0.001, the penalty both towards 0.
    target, strength, rate = torch.tensor([1.0, 0.001]), 0.01, 0.3
    regulariser = ScaleFactors(strength=strength)
    by_step, by_penalty = torch.ones(2), torch.ones(2)
    for _ in range(100):
        by_step -= rate * (by_step - target)
        regulariser.proximal([by_step], rate)
        gate = by_penalty.clone().requires_grad_()
        ((gate - target).square().sum() / 2 + regulariser.penalty([gate])).backward()
        by_penalty -= rate * gate.grad
    assert by_step[1].item() == 0 and by_step[0].item() == pytest.approx(0.99, abs=1e-4)
    assert by_penalty[1].item() != 0


def test_the_penalty_has_the_sign_as_gradient_and_none_at_zero():
    gate = torch.tensor([2.0, -3.0, 0.0], requires_grad=True)
    ScaleFactors(strength=0.1).penalty([gate]).backward()
    assert gate.grad.tolist() == pytest.approx([0.1, -0.1, 0.0])


def test_it_is_found_by_name():
    assert isinstance(find_spec("kdnas.losses", "scale_factors", strength=0.5).build(), ScaleFactors)


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="`strength` must be at least 0"):
        ScaleFactors(strength=-1)
    with pytest.raises(ValueError, match="`costs` must be above 0"):
        ScaleFactors(costs=(0.0, 1.0))
    with pytest.raises(ValueError, match="2 layers, got 1"):
        ScaleFactors(costs=(1.0,)).penalty([torch.ones(2), torch.ones(2)])
    with pytest.raises(ValueError, match="`gates` must not be empty"):
        ScaleFactors().penalty([])
    with pytest.raises(ValueError, match="`step_size` must be a learning rate"):
        ScaleFactors().proximal([torch.ones(1)], -0.1)
