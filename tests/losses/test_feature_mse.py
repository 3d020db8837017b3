import pytest
import torch

from kdnas.losses.example import example, fill
from kdnas.losses.feature.feature_mse import FeatureMse
from kdnas.outputs import Outputs

LABELS = torch.zeros(1, dtype=torch.long)


def outputs(*features):
    return Outputs(torch.zeros(len(features[0]), 2), features)


def reference(student, teacher, weight):
    total, count = 0.0, 0
    for s, t in zip(student.numpy(), teacher.numpy(), strict=True):
        for y in range(t.shape[1]):
            for x in range(t.shape[2]):
                for c in range(t.shape[0]):
                    predicted = sum(weight[c, k] * s[k, y, x] for k in range(s.shape[0]))
                    total, count = total + (predicted - t[c, y, x]) ** 2, count + 1
    return total / count


def test_two_maps_by_hand():
    # Squared differences 1, 4, 9, 0 over 4 elements.
    s, t = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.0, 0.0, 0.0, 4.0])
    value = FeatureMse()(outputs(s.reshape(1, 2, 2, 1)), outputs(t.reshape(1, 2, 2, 1)), LABELS)
    assert value.item() == pytest.approx(14 / 4)


def test_agrees_with_a_loop():
    student, teacher, labels = example()
    loss = FeatureMse(weights=(1.0, 0.5))
    loss.prepare(student, teacher)
    fill(loss.double())
    expected = sum(
        w * reference(s, t, adapter.weight.detach().numpy())
        for w, s, t, adapter in zip(
            (1.0, 0.5), student.features, teacher.features, loss.taps.adapters.values(), strict=True
        )
    )
    assert loss(student, teacher, labels).item() == pytest.approx(expected, rel=1e-12)


def test_equal_maps_give_zero():
    student, _, labels = example()
    assert FeatureMse()(student, student, labels).item() == 0


def test_unequal_channels_need_prepare():
    with pytest.raises(ValueError, match="prepare"):
        FeatureMse()(*example())
