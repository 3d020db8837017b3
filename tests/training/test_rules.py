"""Single steps of the optimiser against values by hand: clipping, decay, momentum, precision."""

import math
from collections.abc import Iterator

import pytest
import torch

from kdnas.distillers.base import Distiller
from kdnas.distillers.from_labels import FromLabels
from kdnas.network import Network
from kdnas.randomness import initialised
from kdnas.settings import Recipe
from kdnas.tables import load_space
from kdnas.training.loop import Training
from kdnas.training.scale import LossScale
from tests.toy import data

SPACE = load_space("toy").fitted(classes=3, image_channels=3)
DATA = data()
RATE = 0.01


class Slope(Distiller):
    """A loss whose gradient is one number everywhere: the sum of all weights, times `slope`."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = slope

    def losses(self, model, batch, step) -> Iterator[tuple[str, torch.Tensor]]:
        yield "slope", self.slope * torch.stack([p.sum() for p in model.parameters()]).sum()


def training(slope=1.0, **changes):
    options = {"steps": 100, "batch_size": 4, "learning_rate": RATE, "warmup": 0.0, "floor": 1.0}
    options |= {"weight_decay": 0.0, "clip": 0.0} | changes
    network = initialised(lambda: Network(SPACE.blueprint(SPACE.largest)), 0)
    return Training(network, Slope(slope), DATA, None, Recipe(**options))


def weights(training):
    return {name: p.detach().clone() for name, p in training.model.named_parameters()}


def moves(training, steps=1):
    """What each of the steps added to the weights, by name."""
    changes = []
    for _ in range(steps):
        before = weights(training)
        training.step()
        changes.append({name: p - before[name] for name, p in weights(training).items()})
    return changes


def all_near(change, expected):
    return all(torch.allclose(c, torch.full_like(c, expected), rtol=1e-3, atol=1e-6) for c in change.values())


def count(training):
    return sum(p.numel() for p in training.model.parameters())


def test_nesterov_momentum_is_nine_tenths():
    # v <- 0.9 v + g, the weights move by rate (g + 0.9 v): 1.9, 2.71, 3.439 times the gradient.
    first, second, third = moves(training(), 3)
    assert all_near(first, -RATE * 1.9)
    assert all_near(second, -RATE * 2.71)
    assert all_near(third, -RATE * 3.439)


def test_the_momentum_outlives_the_gradient():
    loop = training()
    loop.step()
    loop.distiller.slope = 0.0
    (change,) = moves(loop)
    assert all_near(change, -RATE * 0.81)


def test_adamw_moves_every_weight_by_the_rate_whatever_the_gradient():
    for slope in (0.5, 20.0):
        (change,) = moves(training(slope, optimizer="adamw"))
        assert all_near(change, -RATE)


@pytest.mark.parametrize("clip", [0.25, 5.0])
def test_a_longer_gradient_is_scaled_down_to_the_bound(clip):
    loop = training(slope=3.0, clip=clip)
    length = 3.0 * math.sqrt(count(loop))
    assert length > 2 * clip
    (change,) = moves(loop)
    assert float(loop.gradient_norm) == pytest.approx(length, rel=1e-5)  # before clipping
    assert all_near(change, -RATE * 1.9 * clip / math.sqrt(count(loop)))


def test_the_clipped_gradient_has_the_bounds_length_over_all_weights_together():
    loop = training(slope=3.0, clip=0.25)
    loop.step()
    assert math.sqrt(sum(float(p.grad.square().sum()) for p in loop.model.parameters())) == pytest.approx(
        0.25, rel=1e-4
    )


def test_a_shorter_gradient_and_a_bound_of_zero_change_nothing():
    for clip in (1e4, 0.0):
        (change,) = moves(training(slope=3.0, clip=clip))
        assert all_near(change, -RATE * 1.9 * 3.0)


def test_the_default_recipe_clips_at_five():
    assert Recipe().clip == 5.0


@pytest.mark.parametrize(("optimizer", "factor"), [("sgd", 1.9), ("adamw", 1.0)])
def test_weight_decay_shrinks_matrices_and_kernels_and_spares_biases_and_normalisation(optimizer, factor):
    loop = training(slope=0.0, weight_decay=0.5, optimizer=optimizer)
    before = weights(loop)
    loop.step()
    kinds = {True: 0, False: 0}
    for name, weight in weights(loop).items():
        kinds[weight.dim() > 1] += 1
        if weight.dim() > 1:
            expected = before[name] * (1 - RATE * 0.5 * factor)
            assert torch.allclose(weight, expected, rtol=1e-5, atol=1e-8), name
            assert not torch.equal(weight, before[name])
        else:
            assert torch.equal(weight, before[name]), name
    assert min(kinds.values()) > 2


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_groups_carry_the_recipes_decay_and_none_on_vectors(optimizer):
    matrices, vectors = training(weight_decay=0.123, optimizer=optimizer).optimizer.param_groups
    assert matrices["weight_decay"] == 0.123 and vectors["weight_decay"] == 0
    assert {p.dim() > 1 for p in matrices["params"]} == {True}
    assert {p.dim() > 1 for p in vectors["params"]} == {False}


def test_decay_is_no_part_of_the_length_that_is_clipped():
    loop = training(slope=0.0, weight_decay=0.5, clip=1e-6)
    before = weights(loop)
    loop.step()
    assert float(loop.gradient_norm) == 0.0
    assert torch.allclose(loop.model.head.linear.weight, before["head.linear.weight"] * (1 - RATE * 0.95))


class Watching(Distiller):
    """Trains on the labels, and notes in what precision the network computes."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: list[tuple[torch.dtype, torch.dtype]] = []

    def losses(self, model, batch, step) -> Iterator[tuple[str, torch.Tensor]]:
        outputs = model(batch.images)
        product = batch.images.flatten(1) @ batch.images.flatten(1).T
        self.kinds.append((outputs.logits.dtype, product.dtype))
        yield "labels", torch.nn.functional.cross_entropy(outputs.logits.float(), batch.labels)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_the_recipes_precision_is_that_of_the_forward_pass_and_weights_stay_float32(precision):
    network = initialised(lambda: Network(SPACE.blueprint(SPACE.largest)), 0)
    loop = Training(network, Watching(), DATA, None, Recipe(steps=4, batch_size=4, precision=precision))
    loop.step()
    loop.step()
    kind = getattr(torch, precision)
    assert loop.distiller.kinds == [(kind, kind)] * 2
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in network.parameters()} == {torch.float32}
    assert not torch.is_autocast_enabled("cpu")


class Tiny(Distiller):
    """Trains on the labels by a small share of their loss, whose gradients float16 does not hold."""

    factor = 1e-6

    def losses(self, model, batch, step) -> Iterator[tuple[str, torch.Tensor]]:
        yield "labels", self.factor * torch.nn.functional.cross_entropy(model(batch.images).logits, batch.labels)


def half_training(precision="float16"):
    network = initialised(lambda: Network(SPACE.blueprint(SPACE.largest)), 0)
    recipe = Recipe(steps=8, batch_size=4, precision=precision, weight_decay=0.0)
    return Training(network, Tiny(), DATA, None, recipe)


def test_gradients_that_float16_does_not_hold_are_those_of_float32():
    exact, half = (half_training(precision) for precision in ("float32", "float16"))
    for loop in (exact, half):
        loop.step()
    assert float(half.gradient_norm) == pytest.approx(float(exact.gradient_norm), rel=0.01)
    half.scale.value = 1.0
    before = float(half.gradient_norm)
    half.step()
    assert float(half.gradient_norm) < 0.9 * before  # most of them are 0


def test_a_step_whose_scaled_gradient_is_infinite_is_left_out_and_the_scale_halved():
    loop = half_training()
    loop.step()
    norm, before, loop.scale.value = loop.gradient_norm, weights(loop), 2.0**60
    loop.step()
    assert loop.scale.value == 2.0**59 and loop.index == 2 and loop.gradient_norm is norm
    assert all(torch.equal(weight, before[name]) for name, weight in weights(loop).items())
    resumed = half_training()
    resumed.load(loop.state())
    assert resumed.scale == loop.scale
    assert "scale" not in half_training("bfloat16").state()


def test_a_gradient_that_no_scale_mends_is_an_error(monkeypatch):
    loop = half_training()
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda gradients: torch.tensor(float("inf")))
    loop.scale.value = 2.0**-14
    with pytest.raises(FloatingPointError, match="the gradient is not finite at step 0"):
        loop.step()


def test_the_scale_is_doubled_after_many_steps():
    scale = LossScale(8.0, 1998)
    scale.step_taken()
    assert scale.value == 8.0
    scale.step_taken()
    assert scale == LossScale(16.0, 0)


def test_bfloat16_computes_other_losses_than_float32_and_near_ones():
    def first(precision):
        network = initialised(lambda: Network(SPACE.blueprint(SPACE.largest)), 0)
        recipe = Recipe(steps=4, batch_size=16, precision=precision)
        (value,) = Training(network, FromLabels(), DATA, None, recipe).step().values()
        return value

    exact, rounded = first("float32"), first("bfloat16")
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.05)
