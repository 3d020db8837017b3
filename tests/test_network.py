"""The context managers that hook modules and set modes leave nothing behind."""

import pytest
import torch
from torch import nn

from kdnas.network import batch_statistics, hooked, modes, untracked


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
