import numpy as np
import pytest

from kdnas.scorers._predictor import fit
from kdnas.statistics import kendall


def test_a_linear_predictor_recovers_a_linear_target_and_its_coefficients_units_do_not_matter():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(12, 3)) * [1, 1e6, 1e-6]
    y = 90 + x @ [2.0, -3e-6, 4e6]
    made = fit(x, y)
    assert made.error == pytest.approx(0, abs=1e-8)
    assert made.tau == pytest.approx(1)
    new = rng.normal(size=(5, 3)) * [1, 1e6, 1e-6]
    assert made.predict(new) == pytest.approx(90 + new @ [2.0, -3e-6, 4e6])


def test_the_left_out_predictions_are_those_of_fits_to_the_others():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(10, 2)), rng.normal(size=10)
    made = fit(x, y)
    design = np.c_[x, np.ones(10)]
    expected = []
    for i in range(10):
        others = np.arange(10) != i
        expected.append(design[i] @ np.linalg.lstsq(design[others], y[others], rcond=None)[0])
    assert made.left_out == pytest.approx(np.array(expected))
    assert made.error == pytest.approx(np.sqrt(np.mean((np.array(expected) - y) ** 2)))
    assert made.tau == pytest.approx(kendall(expected, y))


def test_a_gaussian_process_follows_what_a_line_cannot():
    x = np.linspace(-2, 2, 30)[:, None]
    y = 5 * np.sin(2 * x[:, 0])
    curved, straight = fit(x, y, "gaussian_process"), fit(x, y)
    assert curved.error < 0.2 < 1 < straight.error
    assert curved.predict(x) == pytest.approx(y, abs=0.2)


def test_pure_noise_has_a_left_out_error_of_its_own_size():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(30, 5)), rng.normal(size=30)
    for kind in ("linear", "gaussian_process"):
        made = fit(x, y, kind)
        assert made.error > 0.8 * y.std(), kind
        assert np.abs(made.tau) < 0.5, kind


@pytest.mark.parametrize("kind", ["linear", "gaussian_process"])
def test_constant_and_repeated_features_and_constant_targets_are_survived(kind):
    rng = np.random.default_rng(3)
    column = rng.normal(size=8)
    made = fit(np.c_[column, column, np.full(8, 3.0)], column, kind)
    assert np.isfinite(made.left_out).all()
    assert made.tau > 0.8
    flat = fit(np.c_[column], np.full(8, 91.5), kind)
    assert flat.error == pytest.approx(0, abs=1e-6)
    assert flat.tau == 0


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: fit([[1.0], [2.0]], [1, 2]), "at least 3"),
        (lambda: fit([[1.0], [2.0], [3.0]], [1, 2]), r"\[networks\]"),
        (lambda: fit([[1.0], [2.0], [float("inf")]], [1, 2, 3]), "`features` must be finite"),
        (lambda: fit([[1.0], [2.0], [3.0]], [1, 2, 3], "forest"), "`kind` must be one of linear, gaussian_process"),
    ],
)
def test_wrong_input_is_refused_with_the_reason(call, said):
    with pytest.raises(ValueError, match=said):
        call()
