import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdnas.losses.dense.pixel_wise import PixelWise
from kdnas.losses.example import example, wave
from kdnas.losses.response.soft_targets import SoftTargets
from kdnas.outputs import Outputs
from kdnas.randomness import torch_rng


def softmax(z):
    return np.exp(z) / np.exp(z).sum()


def reference(z_s, z_t, temperature):
    batch, classes, height, width = z_s.shape
    total = 0.0
    for b in range(batch):
        for y in range(height):
            for x in range(width):
                p, q = (softmax(z[b, :, y, x].numpy() / temperature) for z in (z_s, z_t))
                total += sum(q[c] * math.log(q[c] / p[c]) for c in range(classes))
    return temperature**2 * total / (batch * height * width)


def test_two_pixels_by_hand():
    # Teacher (1/2, 1/2) at both; student (3/4, 1/4), KL log(4/3) / 2, and (1/2, 1/2), KL 0.
    student = torch.tensor([[3.0, 1.0], [1.0, 1.0]]).log().reshape(1, 2, 2, 1)
    loss = PixelWise()(Outputs(student), Outputs(torch.zeros(1, 2, 2, 1)), torch.zeros(1))
    assert loss.item() == pytest.approx(math.log(4 / 3) / 4)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_agrees_with_a_loop(temperature):
    student, teacher, labels = example(dense=True)
    value = PixelWise(temperature=temperature)(student, teacher, labels).item()
    assert value == pytest.approx(reference(student.logits, teacher.logits, temperature), rel=1e-12)


def test_golden():
    student, teacher, _ = example(dense=True)
    assert PixelWise.golden == pytest.approx(reference(student.logits, teacher.logits, 1.0), rel=1e-12)


def test_left_out_positions_do_not_count():
    student, teacher, labels = example(dense=True)
    labels[:, 2:] = -100
    top = [Outputs(o.logits[:, :, :2]) for o in (student, teacher)]
    expected = PixelWise()(*top, labels[:, :2]).item()
    assert PixelWise()(student, teacher, labels).item() == pytest.approx(expected, rel=1e-12)
    finer = labels.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert PixelWise()(student, teacher, finer).item() == pytest.approx(expected, rel=1e-12)
    assert PixelWise()(student, teacher, torch.full_like(labels, -100)).item() == 0


def test_a_larger_map_is_averaged_to_the_smaller():
    student, teacher, labels = example(dense=True)
    finer = Outputs(teacher.logits.repeat_interleave(2, 2).repeat_interleave(3, 3))
    expected = PixelWise()(student, teacher, labels).item()
    assert PixelWise()(student, finer, labels).item() == pytest.approx(expected, rel=1e-12)


@given(st.integers(0, 2**32 - 1), st.floats(0.5, 8.0))
def test_of_one_position_it_is_the_distillation_of_classes(seed, temperature):
    z_s, z_t = torch.randn(2, 3, 5, generator=torch_rng(seed), dtype=torch.float64) * 3
    labels = torch.zeros(3, dtype=torch.long)
    expected = SoftTargets(temperature=temperature)(Outputs(z_s), Outputs(z_t), labels)
    maps = [Outputs(z[:, :, None, None]) for z in (z_s, z_t)]
    value = PixelWise(temperature=temperature)(*maps, labels[:, None, None])
    assert value.item() == pytest.approx(expected.item(), rel=1e-9, abs=1e-12)


def test_logits_without_positions_are_refused():
    flat = Outputs(wave(4, 5))
    for call in (PixelWise().prepare, lambda s, t: PixelWise()(s, t, torch.zeros(4))):
        with pytest.raises(ValueError, match=r"student \(4, 5\) and teacher \(4, 5\)"):
            call(flat, flat)
    with pytest.raises(ValueError, match="class by class"):
        PixelWise().prepare(Outputs(wave(2, 3, 4, 4)), Outputs(wave(2, 5, 4, 4)))
    with pytest.raises(ValueError, match="`temperature` must be above 0"):
        PixelWise(temperature=0)
