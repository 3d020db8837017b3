import tracemalloc

import numpy as np
import pytest
from scipy.stats import norm

from kdnas.scorers._predictor import fit
from kdnas.statistics import kendall
from tests.counting import counted


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


# The Gaussian process with a prior score.

CHOICES, OPTIONS = 6, 3
COLUMNS = CHOICES * OPTIONS
GROUPS = (range(COLUMNS), (COLUMNS, COLUMNS + 1))


def scene(seed, rows=300, *, effect=1.0, score_noise=0.5, noise=0.1):
    """One-hot choices with two sizes, a truth with one interaction, measurements of it, and a score of it."""
    rng = np.random.default_rng(seed)
    chosen = rng.integers(OPTIONS, size=(rows, CHOICES))
    one_hot = np.eye(OPTIONS)[chosen].reshape(rows, -1)
    cost = rng.uniform(0.1, 2, size=CHOICES)
    size = np.log(1 + chosen @ cost)
    truth = effect * (one_hot @ rng.normal(size=COLUMNS) + (chosen[:, 0] == chosen[:, 1])) + 2 * size
    truth = (truth - truth.mean()) / truth.std()
    measured = truth + noise * rng.normal(size=rows)
    features = np.c_[one_hot, size, size + 0.1 * rng.normal(size=rows)]
    return features, measured, truth + score_noise * rng.normal(size=rows)


@pytest.mark.parametrize(("rows", "columns"), [(12, 3), (40, 8)])
def test_a_process_is_exact_on_linear_truths(rows, columns):
    rng = np.random.default_rng(rows)
    units = 10.0 ** np.arange(columns)
    slopes = rng.normal(size=columns) / units
    x, new = (rng.normal(size=(n, columns)) * units for n in (rows, 50))
    predictor = fit(x, 90 + x @ slopes, "gaussian_process")
    assert predictor.predict(new) == pytest.approx(90 + new @ slopes, abs=2e-3 * np.std(x @ slopes))


def test_ninety_per_cent_intervals_hold_ninety_per_cent_of_new_measurements():
    shares = []
    for rows in (10, 20, 60):
        for seed in range(20):
            x, y, score = scene(seed)
            beliefs = fit(x[:rows], y[:rows], "gaussian_process", groups=GROUPS, score=score[:rows]).believe(
                x[rows:], score[rows:]
            )
            shares.append(np.mean((beliefs.low <= y[rows:]) & (y[rows:] <= beliefs.high)))
    assert 0.85 <= np.mean(shares) <= 0.95
    assert all(0.85 <= part.mean() <= 0.95 for part in np.split(np.array(shares), 3))


@pytest.mark.parametrize(
    "settings", [{"score_noise": 0.4}, {"score_noise": 0.2}, {"score_noise": 0.35, "effect": 0.0, "noise": 0.4}]
)
def test_ten_trainings_rank_no_worse_than_the_score_in_the_mean(settings):
    gains, lines = [], 0
    for seed in range(50):
        x, y, score = scene(seed, **settings)
        if settings.get("effect") == 0:  # features that say nothing
            x = np.random.default_rng(seed).permutation(x)
        predictor = fit(x[:10], y[:10], "gaussian_process", groups=GROUPS, score=score[:10])
        predicted = predictor.predict(x[10:], score[10:])
        gains.append(kendall(predicted, y[10:]) - kendall(score[10:], y[10:]))
        lines += predictor.falls_back
        if predictor.falls_back:
            assert gains[-1] == pytest.approx(0, abs=1e-12)
            assert kendall(score[:10], y[:10]) == predictor.score_tau
    assert np.mean(gains) >= -0.01
    assert 0 < lines < 50


def test_measurements_improve_on_the_score():
    gains = []
    for seed in range(10):
        x, y, score = scene(seed)
        predictor = fit(x[:40], y[:40], "gaussian_process", groups=GROUPS, score=score[:40])
        gains.append(kendall(predictor.predict(x[40:], score[40:]), y[40:]) - kendall(score[40:], y[40:]))
    assert np.mean(gains) > 0.05


def test_units_and_the_order_of_columns_and_rows_do_not_matter():
    x, y, score = scene(3, 60)
    rng = np.random.default_rng(0)
    columns, rows = rng.permutation(x.shape[1]), rng.permutation(30)
    place = np.argsort(columns)
    groups = [[int(place[c]) for c in group] for group in GROUPS][::-1]
    plain = fit(x[:30], y[:30], "gaussian_process", groups=GROUPS, score=score[:30])
    scaled = x * 10.0 ** rng.integers(-6, 7, x.shape[1]) + 3
    other = fit(
        scaled[:30][rows][:, columns],
        1000 * y[:30][rows] - 70,
        "gaussian_process",
        groups=groups,
        score=0.01 * score[:30][rows] + 5,
    )
    expected = plain.believe(x[30:], score[30:])
    beliefs = other.believe(scaled[30:][:, columns], 0.01 * score[30:] + 5)
    for a, b in zip(beliefs, expected, strict=True):
        assert (a + 70) / 1000 == pytest.approx(b, abs=1e-3)


def test_ten_thousand_networks_need_neither_a_loop_nor_a_matrix_of_all_pairs():
    x, y, score = scene(0, 10_100)
    wide = np.c_[x, np.random.default_rng(0).normal(size=(len(x), 40))]
    groups = (*GROUPS, range(x.shape[1], wide.shape[1]))
    predictor = fit(wide[:100], y[:100], "gaussian_process", groups=groups, score=score[:100])
    tracemalloc.start()
    try:
        beliefs, calls = counted(lambda: predictor.believe(wide[100:], score[100:]))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert calls < 5000 and peak < 10_000**2
    assert kendall(beliefs.mean, y[100:]) > 0.7


def test_the_expected_improvement_is_the_closed_form():
    x, y, score = scene(1, 80)
    predictor = fit(x[:20], y[:20], "gaussian_process", groups=GROUPS, score=score[:20])
    mean, deviation = predictor.model.posterior(x[20:], score[20:])
    z = (mean - 0.5) / deviation
    expected = deviation * (z * norm.cdf(z) + norm.pdf(z))
    assert predictor.improvement(x[20:], 0.5, score[20:]) == pytest.approx(expected, abs=0.01 * deviation.max())


def test_a_difference_is_surer_than_its_ends_and_adds_up():
    x, y, score = scene(2, 60)
    predictor = fit(x[:30], y[:30], "gaussian_process", groups=GROUPS, score=score[:30])
    mean = predictor.predict(x[30:], score[30:])
    change = predictor.compare(x[30:], score[30:])
    assert change.mean == pytest.approx(mean - mean[0])
    assert change.low[0] == change.high[0] == pytest.approx(0, abs=1e-6)
    # By the full posterior covariance, from draws: Var(a - b) = Var a + Var b - 2 Cov.
    both = np.r_[x[30:], x[30:31]]
    assert predictor.compare(both, np.r_[score[30:], score[30:31]]).high[-1] == pytest.approx(0, abs=1e-4)


def test_accuracies_stay_below_one_and_follow_their_errors():
    x, y, score = scene(4, 200)
    accuracy = 1 - 0.05 * np.exp(-y)  # errors around 5 %
    predictor = fit(x[:60], accuracy[:60], "gaussian_process", groups=GROUPS, score=score[:60], unit="accuracy")
    beliefs = predictor.believe(x[60:], score[60:])
    assert (beliefs.low < beliefs.mean).all() and (beliefs.mean < beliefs.high).all() and beliefs.high.max() < 1.005
    assert 0.8 <= np.mean((beliefs.low <= accuracy[60:]) & (accuracy[60:] <= beliefs.high)) <= 1
    straight = fit(x[:60], accuracy[:60], "gaussian_process", groups=GROUPS, score=score[:60])
    assert predictor.error < straight.error
    assert 0 < predictor.noise < 0.02


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"groups": [[0, 1], [1]]}, "`groups` must hold each of the 2 columns once, got"),
        ({"score": [1, 2]}, r"`score` must have one number for each of 4 networks, got \(2,\)"),
        ({"score": [1, 2, float("nan"), 3]}, "`score` must be finite"),
        ({"unit": "accuracy"}, r"`targets` must be in \[0, 1\] where `unit` is accuracy, got 90"),
        ({"unit": "points"}, "`unit` must be one of any, accuracy"),
        ({"kind": "linear", "score": [1, 2, 3, 4]}, "of a gaussian_process"),
    ],
)
def test_wrong_input_of_a_process_is_refused_with_the_reason(change, said):
    x, y = np.arange(8.0).reshape(4, 2), [0.5, 0.6, 90, 0.7]
    with pytest.raises(ValueError, match=said):
        fit(x, y, **{"kind": "gaussian_process", **change})


def test_a_process_is_asked_as_it_was_fitted():
    x, y, score = scene(0, 20)
    predictor = fit(x, y, "gaussian_process", groups=GROUPS, score=score)
    with pytest.raises(ValueError, match="`score` must be passed as in the fit, got none"):
        predictor.predict(x)
    with pytest.raises(ValueError, match="as in the fit, got"):
        predictor.predict(x[:, 1:], score)
    with pytest.raises(ValueError, match="`kind` must be gaussian_process for intervals, got linear"):
        fit(x, y).believe(x)
