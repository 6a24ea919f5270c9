"""Calibration agrees with closed forms, SciPy and scikit-learn, and intervals look at no target before it is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.metrics import brier_score_loss, precision_recall_curve

from fintx.evaluate import calibration, metrics


def forecaster(n: int, *, sureness: float = 1.0, seed: int = 0):
    """Outcomes of known probability, and logits that are `sureness` times too sure."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(-0.5, 1.2, n)
    return sureness * truth, (rng.random(n) < metrics.sigmoid(truth)).astype(float)


# --- Wilson -----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 400), st.data(), st.sampled_from([0.8, 0.95, 0.99]))
def test_wilson_is_scipys(n, data, level):
    k = data.draw(st.integers(0, n))
    proportion = calibration.wilson(k, n, level=level)
    expected = binomtest(k, n).proportion_ci(level, method="wilson")
    assert (proportion.low, proportion.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert proportion.low <= proportion.value <= proportion.high


def test_a_proportion_of_no_rows_has_no_value():
    assert calibration.wilson(0, 0) == calibration.Proportion(None, 0.0, 1.0, 0, 0)
    with pytest.raises(ValueError, match="0 ≤ k ≤ n"):
        calibration.wilson(3, 2)


# --- reliability ------------------------------------------------------------------------------------------------------


def test_bins_hold_equal_mass_and_agree_with_the_calibration_error():
    logits, truth = forecaster(1000)
    curve = calibration.reliability(logits, truth)
    assert [row.observed.n for row in curve] == [100] * 10
    gap = sum(row.observed.n * abs(row.observed.value - row.mean) for row in curve) / 1000
    assert gap == pytest.approx(metrics.calibration_error(logits, truth), rel=1e-9)
    assert all(a.high < b.low for a, b in zip(curve[:-1], curve[1:], strict=True))


def test_a_calibrated_forecast_lies_within_its_intervals():
    rows = [row for seed in range(40) for row in calibration.reliability(*forecaster(1000, seed=seed))]
    inside = np.mean([row.observed.low <= row.mean <= row.observed.high for row in rows])
    assert inside == pytest.approx(0.95, abs=0.033)  # three standard errors of 400 bins


def test_equal_outputs_share_a_bin():
    (row,) = calibration.reliability(np.zeros(50), np.r_[np.ones(20), np.zeros(30)])
    assert (row.mean, row.observed.value, row.observed.n) == (0.5, 0.4, 50)


@given(st.integers(0, 1000), st.integers(1, 12))
def test_the_parts_of_the_brier_score_add_up(seed, bins):
    logits, truth = forecaster(60, sureness=1.7, seed=seed)
    parts = calibration.brier_parts(logits, truth, n_bins=bins)
    assert parts.brier == pytest.approx(brier_score_loss(truth, metrics.sigmoid(logits)), rel=1e-9)
    total = parts.reliability - parts.resolution + parts.uncertainty + parts.within
    assert total == pytest.approx(parts.brier, abs=1e-12)


def test_forecasts_of_few_values_have_murphys_three_parts_alone():
    """A hand-made case: .2 predicted 10 times (1 event), .7 predicted 10 times (8 events); base rate .45."""
    logits = np.log(np.repeat([0.2, 0.7], 10) / np.repeat([0.8, 0.3], 10))
    truth = np.r_[np.ones(1), np.zeros(9), np.ones(8), np.zeros(2)]
    parts = calibration.brier_parts(logits, truth, n_bins=2)
    assert parts.reliability == pytest.approx((0.1**2 + 0.1**2) / 2)
    assert parts.resolution == pytest.approx(0.35**2)
    assert parts.uncertainty == pytest.approx(0.45 * 0.55)
    assert parts.within == pytest.approx(0, abs=1e-12)


# --- recalibration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sureness", [0.5, 1.0, 3.0])
def test_temperature_recovers_how_much_too_sure_a_forecast_is(sureness):
    logits, truth = forecaster(40_000, sureness=sureness)
    temperature = 1 / calibration.fit_temperature(logits, truth)(1.0)
    assert temperature == pytest.approx(sureness, rel=0.05)
    # The optimum: d loss / d (1/T) = mean(z (p − y)) = 0.
    assert np.mean(logits * (metrics.sigmoid(logits / temperature) - truth)) == pytest.approx(0, abs=1e-4)


def test_temperature_keeps_order_and_side():
    logits, truth = forecaster(500, sureness=3)
    scaled = calibration.fit_temperature(logits, truth)(logits)
    assert metrics.auc(scaled, truth) == metrics.auc(logits, truth)
    np.testing.assert_array_equal(np.sign(scaled), np.sign(logits))


def test_a_forecast_that_is_reversed_keeps_a_finite_temperature():
    logits, truth = forecaster(500)
    assert 1 / calibration.fit_temperature(-logits, truth)(1.0) == pytest.approx(20, rel=1e-3)


def test_isotonic_is_the_least_squares_increasing_fit():
    """By the minimax formula: the fit at i is max over a ≤ i of min over b ≥ i of the mean of a … b."""
    logits, truth = forecaster(40, seed=3)
    order = np.argsort(logits)
    y = truth[order]
    means = [[y[a : b + 1].mean() if b >= a else np.inf for b in range(40)] for a in range(40)]
    expected = [max(min(means[a][b] for b in range(i, 40)) for a in range(i + 1)) for i in range(40)]
    result = metrics.sigmoid(calibration.fit_isotonic(logits, truth)(logits[order]))
    np.testing.assert_allclose(result, expected, atol=2e-6)  # probabilities are kept 1e-6 off 0 and 1


def test_recalibration_improves_rows_it_was_not_fitted_on():
    logits, truth = forecaster(8000, sureness=3)
    none, temperature, isotonic = calibration.recalibrate_forward(logits, truth, np.repeat([0, 1], 4000))
    assert (none.method, temperature.method, isotonic.method) == ("none", "temperature", "isotonic")
    assert none.n == 4000
    for recalibrated in (temperature, isotonic):
        assert recalibrated.log_loss < none.log_loss - 0.1
        assert recalibrated.calibration_error < 0.3 * none.calibration_error
    assert none.log_loss == pytest.approx(metrics.per_sample_loss("probability", logits[4000:], truth[4000:]).mean())


def test_forward_recalibration_is_fitted_on_earlier_groups_alone():
    logits, truth = forecaster(3000, sureness=2)
    groups = np.repeat([0, 1, 2], 1000)
    scores = calibration.recalibrate_forward(logits, truth, groups)
    assert [row.n for row in scores] == [2000] * 3
    by_hand = np.r_[
        calibration.fit_temperature(logits[:1000], truth[:1000])(logits[1000:2000]),
        calibration.fit_temperature(logits[:2000], truth[:2000])(logits[2000:]),
    ]
    expected = metrics.per_sample_loss("probability", by_hand, truth[1000:]).mean()
    assert scores[1].log_loss == pytest.approx(expected, rel=1e-12)
    # One fold alone can judge nothing, but its halves can.
    with pytest.raises(ValueError, match="two folds, or halves of one"):
        calibration.recalibrate_forward(logits, truth, np.zeros(3000, int))


def test_halves_are_separated_by_the_horizon():
    days = np.repeat(np.datetime64("2020-01-01") + np.arange(20), 2)  # two assets
    groups = calibration.halves(days, horizon=3)
    assert [int((groups == group).sum()) for group in (0, -1, 1)] == [14, 6, 20]
    scores = calibration.recalibrate_forward(*forecaster(40), groups)
    assert scores[0].n == 20


# --- decision thresholds ----------------------------------------------------------------------------------------------


@st.composite
def scored(draw):
    n = draw(st.integers(2, 60))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    logits = np.round(rng.normal(size=n), draw(st.integers(0, 3)))  # rounding makes ties
    truth = (rng.random(n) < 0.4).astype(float)
    truth[0] = 1.0
    return logits, truth


@given(scored())
def test_the_curve_is_scikit_learns(case):
    logits, truth = case
    curve = calibration.precision_recall(logits, truth)
    precision, recall, _ = precision_recall_curve(truth, logits)
    np.testing.assert_allclose(curve.precision[::-1], precision[:-1], atol=1e-12)
    np.testing.assert_allclose(curve.recall[::-1], recall[:-1], atol=1e-12)
    assert (curve.precision_low <= curve.precision).all() and (curve.precision <= curve.precision_high).all()
    assert curve.precision[-1] == curve.base_rate == pytest.approx(truth.mean())


@given(scored())
def test_the_table_counts_what_its_threshold_says(case):
    logits, truth = case
    for row in calibration.threshold_table(logits, truth):
        is_predicted = metrics.sigmoid(logits) >= row.threshold
        assert row.predicted == is_predicted.sum() >= round((1 - row.decile) * len(logits) - 0.5)
        assert row.precision.k == row.recall.k == truth[is_predicted].sum()
        assert row.recall.n == truth.sum()
        assert row.lift == pytest.approx(truth[is_predicted].mean() / truth.mean())
        assert row.lift_low <= row.lift <= row.lift_high


def test_distinct_outputs_leave_each_decile_its_share():
    rng = np.random.default_rng(0)
    logits = rng.permutation(1000).astype(float) / 1000
    truth = (rng.random(1000) < 0.3).astype(float)
    assert [row.predicted for row in calibration.threshold_table(logits, truth)] == list(range(900, 0, -100))


def test_a_useless_forecast_has_no_lift():
    rng = np.random.default_rng(1)
    table = calibration.threshold_table(rng.normal(size=20_000), (rng.random(20_000) < 0.2).astype(float))
    assert all(row.lift_low < 1 < row.lift_high for row in table[::4])


def test_rows_without_positives_have_no_recall_and_no_lift():
    row = calibration.threshold_table(np.arange(10.0), np.zeros(10))[4]
    assert row.recall.value is None and row.lift is None and row.precision.value == 0.0
    curve = calibration.precision_recall(np.arange(10.0), np.zeros(10))
    assert np.isnan(curve.recall).all() and curve.base_rate == 0


# --- conformal intervals ----------------------------------------------------------------------------------------------


def returns(n: int, seed: int, *, wild_from: int | None = None):
    rng = np.random.default_rng(seed)
    scale = np.full(n, 0.01)
    if wild_from is not None:
        scale[wild_from:] = 0.03
    return 0.001 * rng.normal(size=n), scale * rng.standard_t(4, size=n)


@pytest.mark.parametrize("level", [0.5, 0.9])
def test_split_intervals_cover_at_their_level_on_average(level):
    covered = []
    for seed in range(300):
        predicted, targets = returns(120, seed)
        covered.append(
            calibration.split_intervals(
                predicted[:99], targets[:99], predicted[99:], targets[99:], level=level
            ).covered.mean()
        )
    # 99 calibration rows: coverage is exactly 1 − α on average, .5 and .9 being k / 100
    assert np.mean(covered) == pytest.approx(level, abs=3 * np.std(covered) / np.sqrt(300))


def test_the_width_is_the_conformal_quantile():
    errors = np.arange(1.0, 10)  # nine rows: the 90 % quantile is the ninth, ⌈10 · .9⌉
    intervals = calibration.split_intervals(np.zeros(9), errors, np.zeros(2), np.array([9.0, 9.1]), level=0.9)
    np.testing.assert_array_equal(intervals.high, [9, 9])
    np.testing.assert_array_equal(intervals.covered, [True, False])
    np.testing.assert_array_equal(intervals.low, [-9, -9])
    too_few = calibration.split_intervals(np.zeros(8), errors[:8], np.zeros(1), np.ones(1), level=0.9)
    assert too_few.high[0] == np.inf


@pytest.mark.parametrize("horizon", [1, 5])
def test_adaptive_intervals_recover_after_the_market_changes(horizon):
    predicted, targets = returns(4500, 1, wild_from=500)
    parts = (predicted[:500], targets[:500], predicted[500:], targets[500:])
    split = calibration.split_intervals(*parts)
    adaptive = calibration.adaptive_intervals(*parts, horizon=horizon)
    assert split.covered.mean() < 0.6
    assert adaptive.covered.mean() == pytest.approx(0.9, abs=0.01)
    assert adaptive.covered[500:].mean() == pytest.approx(0.9, abs=0.02)


def test_long_run_coverage_is_within_the_papers_bound_whatever_the_series():
    """Gibbs & Candès 2021, proposition 4.1, on a series that is made to be missed: each error beats all before."""
    n, step = 2000, 0.05
    targets = np.cumsum(np.ones(n + 50))
    intervals = calibration.adaptive_intervals(
        np.zeros(50), targets[:50], np.zeros(n), targets[50:], horizon=1, level=0.9, step=step
    )
    assert abs(intervals.covered.mean() - 0.9) <= (0.9 + step) / (step * n)
    assert np.isinf(intervals.high).any()


@given(st.integers(0, 29), st.integers(1, 4), st.integers(0, 100))
def test_a_target_changes_no_interval_before_it_is_known(changed, horizon, seed):
    predicted, targets = returns(50, seed)
    other = targets.copy()
    other[20 + changed] += 1.0
    before, after = (
        calibration.adaptive_intervals(predicted[:20], t[:20], predicted[20:], t[20:], horizon=horizon)
        for t in (targets, other)
    )
    known = changed + horizon  # the first row whose decision day has seen that target
    np.testing.assert_array_equal(before.high[:known], after.high[:known])


@given(st.integers(1, 6))
def test_the_newest_calibration_targets_are_not_known_at_first(horizon):
    predicted, targets = returns(60, 0)
    other = targets.copy()
    other[40 - horizon + 1 : 40] += 1.0  # realised after the first later row's day
    before, after = (
        calibration.adaptive_intervals(predicted[:40], t[:40], predicted[40:], t[40:], horizon=horizon)
        for t in (targets, other)
    )
    assert before.high[0] == after.high[0]


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="calibration and later rows"):
        calibration.split_intervals(np.zeros(0), np.zeros(0), np.zeros(1), np.zeros(1))
