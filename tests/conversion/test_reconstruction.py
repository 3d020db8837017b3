"""Layers fitted by least squares, and the order of channels that such a fit prefers."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdnas.conversion.convert import convert
from kdnas.conversion.importance import channel_importance, sort_by_importance
from kdnas.conversion.reconstruction import Reconstruction
from kdnas.conversion.removal import Removal, ResidualBlock, units
from tests.conversion.test_removal import Mixed
from tests.conversion.test_trace import lived

IMAGES = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Two(nn.Module):
    """Two convolutions with biases and no batch norm."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 12, 3, 1, 1), nn.Conv2d(12, 6, 3, 2, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return self.head(F.relu(self.two(F.relu(self.one(x)))).mean((2, 3)))


def two(change=lambda module: None):
    torch.manual_seed(0)
    module = Two().eval()
    with torch.no_grad():
        change(module)
    return module


def parts(module, images=IMAGES, importance=None):
    """The whole network of a module, in the module's own order of channels, and its removal."""
    own = importance or (lambda network, groups: [torch.zeros(group.size) for group in groups])
    conversion = convert(module, image=tuple(images.shape[1:]), needs_choices=False, importance=own)
    network = conversion.supernet.extract(conversion.space.largest).eval()
    return network, Removal(conversion.space, units(conversion.space))


def masks_without(removal, key, channels):
    masks = {unit.key: torch.ones(unit.size, dtype=torch.bool) for unit in removal.units}
    masks[key][list(channels)] = False
    return masks


def first_group(removal):
    return next(unit.key for unit in removal.units if not isinstance(unit, ResidualBlock))


def double(module):
    """Channel 7 is twice channel 2 behind the ReLU."""
    module.one.weight[7], module.one.bias[7] = 2 * module.one.weight[2], 2 * module.one.bias[2]


def constant(module):
    """Channel 5 is 3 everywhere."""
    module.one.weight[5], module.one.bias[5] = 0, 3


@pytest.mark.parametrize(("change", "channel"), [(double, 7), (constant, 5)])
def test_what_other_channels_or_a_bias_can_say_is_not_lost(change, channel):
    network, removal = parts(two(change))
    masks = masks_without(removal, first_group(removal), [channel])
    fitted = Reconstruction(removal, network, IMAGES).network(masks)
    with torch.no_grad():
        whole, cut, plain = (
            n(IMAGES).logits for n in (network, fitted, removal.network(dict(network.state_dict()), masks))
        )
    error, untouched = (float((x - whole).norm() / whole.norm()) for x in (cut, plain))
    # A constant channel varies at the border, where the padding is zero.
    assert error < (0.01 if change is double else 0.05) and error < untouched / 5


def test_the_weights_are_the_ridge_regression_of_the_whole_layers_outputs():
    network, removal = parts(two())
    kept = [0, 1, 3, 4, 8, 9, 11]
    masks = masks_without(removal, first_group(removal), set(range(12)) - set(kept))
    fitted = Reconstruction(removal, network, IMAGES).network(masks)
    conv = network.get_submodule(
        next(name for name, m in network.named_modules() if getattr(m, "out_channels", 0) == 6)
    )
    inputs = F.relu(
        network.get_submodule(next(n for n, m in network.named_modules() if getattr(m, "out_channels", 0) == 12))(
            IMAGES
        )
    )
    patches = F.unfold(inputs, 3, padding=1, stride=2).transpose(1, 2).flatten(0, 1).double().detach().numpy()
    outputs = patches @ conv.weight.detach().double().flatten(1).numpy().T
    columns = np.concatenate([np.arange(9 * k, 9 * k + 9) for k in kept])
    x, y = patches[:, columns], outputs
    x, y = x - x.mean(0), y - y.mean(0)
    own = conv.weight.detach().double().flatten(1).numpy()[:, columns].T
    square = x.T @ x / len(x)
    ridge = 1e-3 * np.diag(square).mean()
    expected = np.linalg.solve(square + ridge * np.eye(len(square)), x.T @ y / len(x) + ridge * own).T
    got = next(m for m in fitted.modules() if getattr(m, "out_channels", 0) == 6)
    assert got.weight.detach().flatten(1).numpy() == pytest.approx(expected, rel=1e-3, abs=1e-4)
    bias = conv.bias.detach().double().numpy() + (patches @ conv.weight.detach().double().flatten(1).numpy().T).mean(0)
    bias -= expected @ patches[:, columns].mean(0)
    assert got.bias.detach().numpy() == pytest.approx(bias, rel=1e-3, abs=1e-4)


def test_nothing_removed_is_nothing_changed():
    network, removal = parts(lived(Mixed()))
    masks = {unit.key: torch.ones(unit.size, dtype=torch.bool) for unit in removal.units}
    fitted = Reconstruction(removal, network, IMAGES).network(masks)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, fitted.state_dict()[name]), name


def test_a_fitted_network_is_closer_to_the_source_than_a_cut_one():
    network, removal = parts(lived(Mixed()), importance=None)
    masks = {unit.key: torch.arange(unit.size) < max(1, unit.size // 2) for unit in removal.units}
    cut = removal.network(dict(network.state_dict()), masks).eval()
    fitted = Reconstruction(removal, network, IMAGES).network(masks).eval()
    other = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        distances = [float((n(other).logits - network(other).logits).norm()) for n in (fitted, cut)]
    assert distances[0] < 0.9 * distances[1]


def test_a_removed_block_is_left_out_of_the_fit():
    network, removal = parts(lived(Mixed()))
    masks = {unit.key: torch.arange(unit.size) < max(1, unit.size // 2) for unit in removal.units}
    block = next(unit for unit in removal.units if isinstance(unit, ResidualBlock))
    masks[block.key][:] = False
    fitted = Reconstruction(removal, network, IMAGES).network(masks).eval()
    assert fitted(IMAGES).logits.isfinite().all()
    assert not any(name.startswith(f"{block.position}.parts") for name in fitted.state_dict())


def test_few_positions_are_drawn_alike_each_time():
    network, removal = parts(lived(Mixed()))
    masks = {unit.key: torch.arange(unit.size) < max(1, unit.size // 2) for unit in removal.units}
    first, second = (Reconstruction(removal, network, IMAGES, positions=200).network(masks) for _ in range(2))
    whole = Reconstruction(removal, network, IMAGES).network(masks)
    states = [n.state_dict() for n in (first, second, whole)]
    assert all(torch.equal(t, states[1][name]) for name, t in states[0].items())
    assert any(not torch.allclose(t, states[2][name]) for name, t in states[0].items())


def test_large_images_are_measured_in_batches(monkeypatch):
    network, removal = parts(two())
    groups = [unit for unit in removal.units if not isinstance(unit, ResidualBlock)]
    masks = {unit.key: torch.arange(unit.size) < max(1, unit.size // 2) for unit in removal.units}

    def measured():
        fitted = Reconstruction(removal, network, IMAGES).network(masks).state_dict()
        return fitted, channel_importance(network, groups, "reconstruction", IMAGES)

    whole, order = measured()
    sizes = []
    for module in ("reconstruction", "importance"):
        monkeypatch.setattr(f"kdnas.conversion.{module}.image_batches", lambda images: images.split(16))
    network.register_forward_pre_hook(lambda _, arguments: sizes.append(len(arguments[0])))
    parted, other = measured()
    assert sizes == [16, 16, 8] * 2
    for name, tensor in whole.items():
        torch.testing.assert_close(parted[name], tensor, rtol=1e-3, atol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(order, other, strict=True))


def test_channels_that_others_repeat_come_last():
    network, removal = parts(two(double))
    groups = [unit for unit in removal.units if not isinstance(unit, ResidualBlock)]
    values = channel_importance(network, groups, "reconstruction", IMAGES)[0]
    assert values[[2, 7]].min() == 0  # whichever of the two is chosen, the other says nothing new


def test_each_choice_gains_most_of_a_least_squares_fit():
    network, removal = parts(two())
    group = next(unit for unit in removal.units if not isinstance(unit, ResidualBlock))
    values = channel_importance(network, [group], "reconstruction", IMAGES)[0]
    order = values.argsort(descending=True).tolist()
    module = network.get_submodule("{}.parts.{}".format(*group.readers[0]))
    inputs = F.relu(next(m for m in network.modules() if getattr(m, "out_channels", 0) == 12)(IMAGES))
    x = inputs.transpose(0, 1).flatten(1).T.detach().double().numpy()
    x = x - x.mean(0)
    target = x @ module.weight.detach().double().transpose(0, 1).flatten(1).numpy()

    def error(channels):
        fit, *_ = np.linalg.lstsq(x[:, channels], target, rcond=None)
        return np.square(target - x[:, channels] @ fit).sum()

    for rank in range(4):
        errors = {channel: error([*order[:rank], channel]) for channel in range(12) if channel not in order[:rank]}
        assert errors[order[rank]] <= min(errors.values()) * (1 + 1e-6)


def test_sorting_by_reconstruction_leaves_the_whole_network_alone():
    module = lived(Mixed())
    conversion = convert(module, image=(3, 8, 8))
    before = conversion.supernet(IMAGES, conversion.space.largest).logits
    sort_by_importance(conversion.supernet, lambda n, g: channel_importance(n, g, "reconstruction", IMAGES))
    torch.testing.assert_close(
        conversion.supernet(IMAGES, conversion.space.largest).logits, before, rtol=1e-4, atol=1e-5
    )
