"""Hooks and modes leave nothing behind; batch-norm statistics are re-estimated, by hand."""

import os

import pytest
import torch
from torch import nn

from kdnas.network import batch_statistics, calibrate, hooked, modes, repeatable, untracked
from tests.toy import data

DATA = data()


def network():
    """Layers in different modes, one norm without running statistics."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4, track_running_stats=False)
    )
    model.train()
    model[1].eval()
    return model


def state(model):
    return [
        (m.training, getattr(m, "track_running_stats", None), len(m._forward_hooks), len(m._forward_pre_hooks))
        for m in model.modules()
    ]


IMAGES = torch.rand(5, 3, 2, 2)


def test_calls_of_hooked_modules_are_seen_before_and_after_and_in_order():
    model, calls = network(), []
    with hooked(
        [model[0], model[2]],
        before=lambda module, inputs: calls.append(("before", module, inputs[0])),
        after=lambda module, inputs, output: calls.append(("after", module, output)),
    ):
        images = model(IMAGES)
    model(IMAGES)
    assert [(when, module) for when, module, _ in calls] == [
        ("before", model[0]),
        ("after", model[0]),
        ("before", model[2]),
        ("after", model[2]),
    ]
    assert calls[0][2] is IMAGES and images.shape == calls[3][2].shape


@pytest.mark.parametrize("inside", [modes, batch_statistics, untracked, lambda m: hooked(m.modules(), after=print)])
def test_modes_tracking_and_hooks_are_as_before_after_an_error_too(inside):
    model = network()
    before = state(model)
    with inside(model):
        assert state(model) != before
    assert state(model) == before
    with pytest.raises(KeyboardInterrupt), inside(model):
        raise KeyboardInterrupt
    assert state(model) == before


def test_what_each_context_sets():
    model = network()
    with modes(model):
        assert not any(m.training for m in model.modules())
    with batch_statistics(model):
        assert [m.training for m in model] == [False, True, False, True]
        assert not model[1].track_running_stats
    with untracked(model) as norms:
        assert norms == [model[1], model[3]] and not model[1].track_running_stats and model[0].training


class Small(nn.Module):
    """Two convolutions, each with a batch norm, and dropout between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 1)
        self.norm, self.last = nn.BatchNorm2d(4, momentum=0.1), nn.BatchNorm2d(5, momentum=0.3)
        self.drop = nn.Dropout(0.5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.last(self.second(self.drop(self.norm(self.first(images)))))


def unsettled(seed=0):
    """A network whose statistics and affine parts are nowhere near the data's."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = Small()
        for norm in (network.norm, network.last):
            norm.running_mean.normal_(3.0, 2.0)
            norm.running_var.uniform_(5.0, 9.0)
            norm.num_batches_tracked.fill_(77)
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
    return network


def batches():
    return [DATA.normalise(DATA.train.take(torch.arange(start, start + 12))) for start in (0, 12, 24)]


def moments(maps):
    """Mean, and variance with n - 1 below, of each channel of one batch, `[batch, channels, height, width]`."""
    rows = maps.transpose(0, 1).flatten(1).double()
    centred = rows - rows.mean(1, keepdim=True)
    return rows.mean(1), centred.square().sum(1) / (rows.shape[1] - 1)


def normalised(maps, norm):
    rows = maps.transpose(0, 1).flatten(1)
    mean, variance = (v[None, :, None, None] for v in (rows.mean(1), rows.var(1, correction=0)))
    return (maps - mean) / (variance + norm.eps).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]


def by_hand(network):
    """Mean over the batches of each batch's moments, before either norm; every batch normalised by itself."""
    first, last = [], []
    with torch.no_grad():
        for images in batches():
            maps = network.first(images)
            first.append(moments(maps))
            last.append(moments(network.second(normalised(maps, network.norm))))
    return [[sum(part) / len(part) for part in zip(*every, strict=True)] for every in (first, last)]


def test_statistics_are_the_means_over_batches_by_hand():
    network = unsettled()
    expected = by_hand(network)
    calibrate(network, batches())
    for norm, (mean, variance) in zip((network.norm, network.last), expected, strict=True):
        torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.running_var.double(), variance, rtol=1e-4, atol=1e-5)
        assert int(norm.num_batches_tracked) == 3


def test_what_the_statistics_were_before_does_not_matter_and_twice_is_once():
    network, other = unsettled(), unsettled()
    other.norm.running_mean.add_(100.0)
    calibrate(network, batches())
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    calibrate(other, batches())
    calibrate(network, batches())
    for same in (network, other):
        assert all(torch.equal(tensor, before[name]) for name, tensor in same.state_dict().items())


@pytest.mark.parametrize("training", [True, False])
def test_momentum_and_mode_come_back_and_weights_stay(training):
    network = unsettled().train(training)
    network.drop.train(not training)
    before = {name: p.clone() for name, p in network.named_parameters()}
    calibrate(network, batches())
    assert (network.norm.momentum, network.last.momentum) == (0.1, 0.3)
    assert network.training is training and network.norm.training is training
    assert network.drop.training is not training
    assert all(torch.equal(p, before[name]) for name, p in network.named_parameters())
    assert all(p.grad is None and p.requires_grad for p in network.parameters())


def test_momentum_and_mode_come_back_after_an_error():
    network = unsettled().train()
    with pytest.raises(RuntimeError):
        calibrate(network, [batches()[0][:, :2]])
    assert (network.norm.momentum, network.last.momentum) == (0.1, 0.3)
    assert network.training and network.drop.training


def test_one_batch_makes_evaluation_nearly_the_same_as_training_on_it():
    network = unsettled()
    network.drop.p = 0.0
    images = batches()[0]
    calibrate(network, [images])
    torch.testing.assert_close(network.eval()(images), network.train()(images), rtol=0.02, atol=0.02)


def test_on_a_gpu_sums_are_repeatable_inside_and_as_they_were_afterwards(monkeypatch):
    memory = torch.utils.deterministic
    monkeypatch.setattr(memory, "fill_uninitialized_memory", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)

    def flags():
        sums = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        return *sums, memory.fill_uninitialized_memory, torch.backends.cudnn.benchmark

    assert flags() == (False, False, True, True)
    with pytest.raises(KeyError), repeatable(torch.device("cuda")):
        assert flags() == (True, True, False, False) and os.environ["CUBLAS_WORKSPACE_CONFIG"]
        raise KeyError
    assert flags() == (False, False, True, True)
    with repeatable(torch.device("cpu")):
        assert flags() == (False, False, True, True)
