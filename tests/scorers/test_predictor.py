import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdnas.scorers._predictor import fit, rank_ensemble
from kdnas.statistics import kendall

TABLES = st.integers(1, 4).flatmap(
    lambda scorers: st.integers(2, 7).flatmap(
        lambda networks: st.lists(
            st.lists(st.integers(-3, 3), min_size=networks, max_size=networks), min_size=scorers, max_size=scorers
        )
    )
)


def test_an_ensemble_by_hand():
    # Ranks of three networks: (0, 1/2, 1), and with a tie (1, 1/4, 1/4).
    assert rank_ensemble([[1, 2, 3], [9, 4, 4]]) == pytest.approx([0.5, 0.375, 0.625])
    assert rank_ensemble([[1, 2, 3], [9, 4, 4]], weights=[1, 3]) == pytest.approx([0.75, 0.3125, 0.4375])
    assert rank_ensemble([[5, 5, 5]]) == pytest.approx([0.5, 0.5, 0.5])
    assert rank_ensemble([[5]]) == pytest.approx([0])


@settings(max_examples=60, deadline=None)
@given(TABLES, st.data())
def test_an_ensemble_is_monotone_in_every_score(table, data):
    scorer = data.draw(st.integers(0, len(table) - 1))
    network = data.draw(st.integers(0, len(table[0]) - 1))
    before = rank_ensemble(table)
    table[scorer][network] += data.draw(st.integers(0, 5))
    assert rank_ensemble(table)[network] >= before[network] - 1e-12


@settings(max_examples=60, deadline=None)
@given(TABLES)
def test_a_network_that_all_scorers_place_above_another_stays_above_it(table):
    found, array = rank_ensemble(table), np.asarray(table)
    assert found.min() >= 0 and found.max() <= 1
    for i in range(array.shape[1]):
        for j in range(array.shape[1]):
            if (array[:, i] > array[:, j]).all():
                assert found[i] > found[j]


def test_an_ensemble_sees_order_only():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(3, 20))
    assert rank_ensemble([np.exp(scores[0]), scores[1] * 7 - 2, scores[2] ** 3]) == pytest.approx(rank_ensemble(scores))


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
        (lambda: rank_ensemble([]), "one length"),
        (lambda: rank_ensemble([[1, 2], [1]]), "one length"),
        (lambda: rank_ensemble([[1, float("nan")]]), "finite"),
        (lambda: rank_ensemble([[1, 2]], weights=[-1]), "not negative"),
        (lambda: rank_ensemble([[1, 2]], weights=[1, 1]), "1 numbers"),
        (lambda: fit([[1.0], [2.0]], [1, 2]), "at least 3"),
        (lambda: fit([[1.0], [2.0], [3.0]], [1, 2]), r"\[networks\]"),
        (lambda: fit([[1.0], [2.0], [float("inf")]], [1, 2, 3]), "features must be finite"),
        (lambda: fit([[1.0], [2.0], [3.0]], [1, 2, 3], "forest"), "`kind` must be one of linear, gaussian_process"),
    ],
)
def test_wrong_input_is_refused_with_the_reason(call, said):
    with pytest.raises(ValueError, match=said):
        call()
