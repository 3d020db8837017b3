import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdnas.scorers.fitted_blocks import FittedBlocks
from kdnas.similarity import relative_l1
from tests.scorers.scene import SPACE, Shows, evidence, network, supernet, with_teacher


@pytest.fixture(scope="module")
def held():
    return evidence()


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def student(seed=0):
    return Shows(normal(20, 3, seed=seed), normal(20, 3, 8, 8, seed=seed + 1), normal(20, 5, 4, 4, seed=seed + 2))


def test_a_relative_error_by_hand():
    # The teacher's deviation is 2 around its mean 3; the absolute errors are 1, 0, 3, 0.
    teacher = torch.tensor([[1.0, 5.0], [1.0, 5.0]])
    assert float(relative_l1(torch.tensor([[2.0, 5.0], [4.0, 5.0]]), teacher)) == pytest.approx(1 / 2)
    assert float(relative_l1(teacher, teacher)) == 0


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.floats(1e-12, 1e12), st.floats(-5, 5))
def test_the_scale_and_shift_of_both_features_cancel(seed, scale, shift):
    x, y = normal(4, 3, 2, seed=seed), normal(4, 3, 2, seed=seed + 1)
    plain = float(relative_l1(x, y))
    assert float(relative_l1(x * scale, y * scale)) == pytest.approx(plain, rel=1e-4)
    assert float(relative_l1(x + shift, y + shift)) == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e30, 1e-30])
def test_a_constant_teacher_has_a_rating_too(value):
    y = torch.full((4, 5), value)
    assert float(relative_l1(y, y)) == 0
    assert float(relative_l1(y * 3 + (value == 0) * 2.0, y)) == pytest.approx(2, rel=1e-5)


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match="equal shapes"):
        relative_l1(torch.zeros(2, 3), torch.zeros(2, 4))


def test_the_rating_is_that_of_least_squares_on_the_other_half(held):
    shown, total = student().outputs, 0.0
    for mine, taught in zip(shown.features, held.teacher.features, strict=True):
        x, y = (f.double().permute(0, 2, 3, 1).numpy() for f in (mine, taught))
        x = np.concatenate([x, np.ones((*x.shape[:3], 1))], -1)
        fitted = np.linalg.lstsq(x[::2].reshape(-1, x.shape[-1]), y[::2].reshape(-1, y.shape[-1]), rcond=None)[0]
        left = y[1::2]
        total += np.abs(x[1::2] @ fitted - left).mean() / left.std()
    assert FittedBlocks().score(student(), held).value == pytest.approx(-total, rel=1e-5)


def test_the_teacher_itself_rates_zero_also_mixed_and_scaled(held):
    assert FittedBlocks().score(network(), held).value == pytest.approx(0, abs=1e-4)
    logits, (first, second) = held.teacher.logits, held.teacher.features
    assert FittedBlocks(adapters="none").score(Shows(logits, first, second), held).value == 0
    mixed = torch.einsum("oc,bchw->bohw", normal(first.shape[1], first.shape[1]) + 2, first) * 100 - 3
    assert FittedBlocks().score(Shows(logits, mixed, second), held).value == pytest.approx(0, abs=1e-3)
    assert FittedBlocks().score(student(), held).value < -0.5


def test_a_stage_of_noise_rates_worse_than_the_mean_and_wide_noise_gains_nothing(held):
    # The mean of a Gaussian is sqrt(2 / pi) deviations away from it on average.
    taught = with_teacher(held, features=(normal(20, 4, 2, 2, seed=9),))
    narrow, wide = (Shows(normal(20, 3), normal(20, width, 2, 2, seed=8)) for width in (1, 30))
    found = [-FittedBlocks().score(shown, taught).value for shown in (narrow, wide)]
    assert found[0] == pytest.approx((2 / np.pi) ** 0.5, abs=0.1)
    assert found[1] > found[0] + 0.2


@pytest.mark.parametrize("factor", [1e-4, 1.0, 1e6])
def test_the_scale_of_the_teachers_features_does_not_matter(held, factor):
    plain = FittedBlocks().score(student(), held).value
    scaled = with_teacher(held, features=tuple(factor * f for f in held.teacher.features))
    assert FittedBlocks().score(student(), scaled).value == pytest.approx(plain, rel=1e-4)


def test_dead_and_repeated_channels_of_the_student_are_survived(held):
    logits, first, second = student().outputs.logits, *student().outputs.features
    plain = FittedBlocks().score(student(), held).value
    more = torch.cat([first, first[:, :1], torch.zeros_like(first), torch.full_like(first, 1e5)], 1)
    assert FittedBlocks().score(Shows(logits, more, second), held).value == pytest.approx(plain, abs=1e-3)


def test_one_paths_rating_does_not_depend_on_the_others(held):
    bank, scorer = supernet(), FittedBlocks()
    first = scorer.score(bank.extract(SPACE.smallest), held)
    for architecture in list(SPACE.all())[:5]:
        scorer.score(bank.extract(architecture), held)
    assert scorer.score(bank.extract(SPACE.smallest), held) == first


def test_weights_and_pairs_are_as_given(held):
    parts = FittedBlocks().score(student(), held).parts
    assert FittedBlocks(weights=(2.0, 0.5)).score(student(), held).value == pytest.approx(
        -2 * parts["stage_0"] - 0.5 * parts["stage_1"]
    )
    deepest = FittedBlocks(pairs=((1, 1),)).score(student(), held)
    assert deepest.parts == {"stage_1": parts["stage_1"]}
    with pytest.raises(ValueError, match="one number per pair, got 1 for 2 pairs"):
        FittedBlocks(weights=(1.0,)).score(student(), held)


def test_what_cannot_be_rated_is_refused(held):
    with pytest.raises(ValueError, match="`adapters` must be one of fitted, none"):
        FittedBlocks(adapters="trained")
    with pytest.raises(ValueError, match="the student has none"):
        FittedBlocks().score(Shows(normal(20, 3)), held)
    with pytest.raises(ValueError, match="the teacher has none"):
        FittedBlocks().score(student(), with_teacher(held, features=()))
    with pytest.raises(ValueError, match="equal shapes"):
        FittedBlocks(adapters="none").score(student(), held)
    with pytest.raises(ValueError, match="at least 4 images"):
        FittedBlocks().score(network(), evidence(3))
