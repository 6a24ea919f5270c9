"""Reliability and scaling against closed forms, SciPy and forecasts whose calibration is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.metrics import brier_score_loss

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
    found = calibration.wilson(k, n, level=level)
    expected = binomtest(k, n).proportion_ci(level, method="wilson")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert found.low <= found.value <= found.high


def test_nothing_seen_is_nothing_known():
    assert calibration.wilson(0, 0) == calibration.Share(None, 0.0, 1.0, 0, 0)
    with pytest.raises(ValueError, match="0 ≤ k ≤ n"):
        calibration.wilson(3, 2)


# --- reliability ------------------------------------------------------------------------------------------------------


def test_bins_hold_equal_mass_and_agree_with_the_calibration_error():
    logits, truth = forecaster(1000)
    found = calibration.reliability(logits, truth)
    assert [row.observed.n for row in found] == [100] * 10
    gap = sum(row.observed.n * abs(row.observed.value - row.mean) for row in found) / 1000
    assert gap == pytest.approx(metrics.calibration_error(logits, truth), rel=1e-9)
    assert all(a.high < b.low for a, b in zip(found[:-1], found[1:], strict=True))


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
    parts = calibration.brier_parts(logits, truth, bins=bins)
    assert parts.brier == pytest.approx(brier_score_loss(truth, metrics.sigmoid(logits)), rel=1e-9)
    total = parts.reliability - parts.resolution + parts.uncertainty + parts.within
    assert total == pytest.approx(parts.brier, abs=1e-12)


def test_forecasts_of_few_values_have_murphys_three_parts_alone():
    """A hand-made case: .2 said 10 times (1 came), .7 said 10 times (8 came); base rate .45."""
    logits = np.log(np.repeat([0.2, 0.7], 10) / np.repeat([0.8, 0.3], 10))
    truth = np.r_[np.ones(1), np.zeros(9), np.ones(8), np.zeros(2)]
    parts = calibration.brier_parts(logits, truth, bins=2)
    assert parts.reliability == pytest.approx((0.1**2 + 0.1**2) / 2)
    assert parts.resolution == pytest.approx(0.35**2)
    assert parts.uncertainty == pytest.approx(0.45 * 0.55)
    assert parts.within == pytest.approx(0, abs=1e-12)


# --- scaling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sureness", [0.5, 1.0, 3.0])
def test_temperature_recovers_how_much_too_sure_a_forecast_is(sureness):
    logits, truth = forecaster(40_000, sureness=sureness)
    found = calibration.temperature(logits, truth)
    assert found == pytest.approx(sureness, rel=0.05)
    # The optimum: d loss / d (1/T) = mean(z (p − y)) = 0.
    assert np.mean(logits * (metrics.sigmoid(logits / found) - truth)) == pytest.approx(0, abs=1e-4)


def test_temperature_keeps_order_and_side():
    logits, truth = forecaster(500, sureness=3)
    scaled = calibration.fit_temperature(logits, truth)(logits)
    assert metrics.auc(scaled, truth) == metrics.auc(logits, truth)
    np.testing.assert_array_equal(np.sign(scaled), np.sign(logits))


def test_a_forecast_that_is_reversed_keeps_a_finite_temperature():
    logits, truth = forecaster(500)
    assert calibration.temperature(-logits, truth) == pytest.approx(20, rel=1e-3)


def test_isotonic_is_the_least_squares_increasing_fit():
    """By the minimax formula: the fit at i is max over a ≤ i of min over b ≥ i of the mean of a … b."""
    logits, truth = forecaster(40, seed=3)
    order = np.argsort(logits)
    y = truth[order]
    means = [[y[a : b + 1].mean() if b >= a else np.inf for b in range(40)] for a in range(40)]
    expected = [max(min(means[a][b] for b in range(i, 40)) for a in range(i + 1)) for i in range(40)]
    found = metrics.sigmoid(calibration.fit_isotonic(logits, truth)(logits[order]))
    np.testing.assert_allclose(found, expected, atol=2e-6)  # probabilities are kept 1e-6 off 0 and 1


def test_scaling_mends_rows_it_never_saw():
    logits, truth = forecaster(8000, sureness=3)
    none, temperature, isotonic = calibration.recalibrate(logits[:4000], truth[:4000], logits[4000:], truth[4000:])
    assert (none.method, temperature.method, isotonic.method) == ("none", "temperature", "isotonic")
    assert none.n == 4000
    for mended in (temperature, isotonic):
        assert mended.log_loss < none.log_loss - 0.1
        assert mended.calibration_error < 0.3 * none.calibration_error
    assert none.log_loss == pytest.approx(metrics.per_sample_loss("probability", logits[4000:], truth[4000:]).mean())


def test_forward_scaling_learns_from_earlier_groups_alone():
    logits, truth = forecaster(3000, sureness=2)
    groups = np.repeat([0, 1, 2], 1000)
    judged = calibration.recalibrate_forward(logits, truth, groups)
    assert [row.n for row in judged] == [2000] * 3
    by_hand = np.r_[
        calibration.fit_temperature(logits[:1000], truth[:1000])(logits[1000:2000]),
        calibration.fit_temperature(logits[:2000], truth[:2000])(logits[2000:]),
    ]
    expected = metrics.per_sample_loss("probability", by_hand, truth[1000:]).mean()
    assert judged[1].log_loss == pytest.approx(expected, rel=1e-12)
    # One fold alone can judge nothing, but its halves can.
    with pytest.raises(ValueError, match="two folds, or halves of one"):
        calibration.recalibrate_forward(logits, truth, np.zeros(3000, int))


def test_halves_are_parted_by_the_horizon():
    days = np.repeat(np.datetime64("2020-01-01") + np.arange(20), 2)  # two assets
    groups = calibration.halves(days, horizon=3)
    assert [int((groups == group).sum()) for group in (0, -1, 1)] == [14, 6, 20]
    judged = calibration.recalibrate_forward(*forecaster(40), groups)
    assert judged[0].n == 20
