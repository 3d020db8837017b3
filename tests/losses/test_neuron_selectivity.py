import math

import numpy as np
import pytest
import torch

from kdnas.losses.example import example, wave
from kdnas.losses.feature.neuron_selectivity import NeuronSelectivity
from kdnas.outputs import Outputs

LABELS = torch.zeros(1, dtype=torch.long)
KERNELS = [
    {"kernel": "linear"},
    {"kernel": "polynomial"},
    {"kernel": "polynomial", "degree": 3, "offset": 0.5},
    {"kernel": "gaussian"},
    {"kernel": "gaussian", "bandwidth": 0.7},
]


def outputs(feature):
    return Outputs(torch.zeros(len(feature), 2), (feature,))


def reference(student, teacher, kernel="polynomial", degree=2, offset=0.0, bandwidth=None):
    values = []
    for s, t in zip(student.numpy(), teacher.numpy(), strict=True):
        s, t = ([c.flatten() / np.sqrt((c**2).sum()) for c in maps] for maps in (s, t))
        if bandwidth is None:
            squared = np.mean([((x - y) ** 2).sum() for x in s for y in t])
        else:
            squared = bandwidth**2

        def k(x, y, squared=squared):
            if kernel == "linear":
                return x @ y
            if kernel == "polynomial":
                return (x @ y + offset) ** degree
            return math.exp(-((x - y) ** 2).sum() / (2 * squared))

        def mean(xs, ys, k=k):
            return sum(k(x, y) for x in xs for y in ys) / len(xs) / len(ys)

        values.append(mean(s, s) + mean(t, t) - 2 * mean(s, t))
    return np.mean(values)


def test_one_channel_against_two_by_hand():
    # s = (1, 0); t = (1, 0), (0, 1). Squared products: ss 1, tt (1 + 0 + 0 + 1)/4, st (1 + 0)/2.
    s, t = torch.tensor([[3.0, 0.0]]).reshape(1, 1, 1, 2), torch.tensor([[2.0, 0.0], [0.0, 5.0]]).reshape(1, 2, 1, 2)
    assert NeuronSelectivity()(outputs(s), outputs(t), LABELS).item() == pytest.approx(1 + 1 / 2 - 2 * 1 / 2)
    linear = NeuronSelectivity(kernel="linear")(outputs(s), outputs(t), LABELS)
    assert linear.item() == pytest.approx(0.5**2 + 0.5**2)
    # Squared distances: st 0 and 2, so sigma^2 = 1 and exp(-2/2) where patterns differ.
    e = math.exp(-1)
    gaussian = NeuronSelectivity(kernel="gaussian")(outputs(s), outputs(t), LABELS)
    assert gaussian.item() == pytest.approx(1 + (2 + 2 * e) / 4 - 2 * (1 + e) / 2)


@pytest.mark.parametrize("arguments", KERNELS, ids=str)
def test_agrees_with_a_loop(arguments):
    student, teacher, labels = example()
    value = NeuronSelectivity(**arguments)(student, teacher, labels).item()
    pairs = zip(student.features, teacher.features, strict=True)
    assert value == pytest.approx(sum(reference(s, t, **arguments) for s, t in pairs), rel=1e-9)


@pytest.mark.parametrize("arguments", KERNELS, ids=str)
def test_a_permutation_or_a_repetition_of_the_channels_gives_zero(arguments):
    teacher = wave(2, 3, 4, 5)
    student = torch.cat([teacher.flip(1), teacher], 1) * 7
    assert NeuronSelectivity(**arguments)(outputs(student), outputs(teacher), LABELS).item() == pytest.approx(
        0, abs=1e-12
    )


@pytest.mark.parametrize("arguments", [KERNELS[0], KERNELS[2], KERNELS[4]], ids=str)
def test_gradient_is_that_of_the_value(arguments):
    loss = NeuronSelectivity(**arguments)
    teacher = outputs(wave(2, 2, 3, 4, phase=1))
    assert torch.autograd.gradcheck(lambda x: loss(outputs(x), teacher, LABELS), wave(2, 3, 3, 4).requires_grad_())


@pytest.mark.parametrize("arguments", KERNELS, ids=str)
def test_gradients_stay_small_between_patterns_that_are_all_but_equal(arguments):
    student = (torch.ones(2, 3, 4, 4) + 1e-4 * wave(2, 3, 4, 4).float()).requires_grad_()
    NeuronSelectivity(**arguments)(outputs(student), outputs(torch.ones(2, 3, 4, 4)), LABELS).backward()
    assert student.grad.abs().max() < 10


def test_no_tensor_is_larger_than_the_matrices_of_pairs():
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (made if isinstance(made, tuple | list) else [made]) if torch.is_tensor(x))
            return made

    student, teacher = wave(2, 16, 7, 7).requires_grad_(), wave(2, 24, 7, 7)
    for arguments in KERNELS:
        with Watch():
            NeuronSelectivity(**arguments)(outputs(student), outputs(teacher), LABELS).backward()
    assert max(sizes) <= 2 * 24 * 49


def test_arguments_are_checked():
    for arguments in ({"kernel": "rbf"}, {"degree": 0}, {"degree": 1.5}, {"offset": -1.0}, {"bandwidth": 0.0}):
        with pytest.raises(ValueError, match="must be"):
            NeuronSelectivity(**arguments)


def test_the_gram_matrices_of_positions_give_the_kernels_value_and_exactly_0_for_equal_maps():
    loss = NeuronSelectivity()
    student, teacher = wave(2, 7, 2, 3), wave(2, 9, 2, 3, phase=1)
    s, t = (
        np.stack([[c / np.linalg.norm(c) for c in m.reshape(len(m), -1)] for m in x.numpy()])
        for x in (student, teacher)
    )
    expected = np.mean(
        [
            ((a @ a.T) ** 2).mean() + ((b @ b.T) ** 2).mean() - 2 * ((a @ b.T) ** 2).mean()
            for a, b in zip(s, t, strict=True)
        ]
    )
    assert loss.between(student, teacher, 0).item() == pytest.approx(expected, rel=1e-12)
    assert loss.between(student.float(), student.float(), 0).item() == 0
    x = student.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss.between(x, teacher, 0), x)
