"""Conformal intervals hold their level where the theory says so, and look at no target before it is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fintx.evaluate import calibration


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
            ).coverage
        )
    # 99 calibration rows: coverage is exactly 1 − α on average, .5 and .9 being k / 100
    assert np.mean(covered) == pytest.approx(level, abs=3 * np.std(covered) / np.sqrt(300))


def test_the_width_is_the_conformal_quantile():
    errors = np.arange(1.0, 10)  # nine rows: the 90 % quantile is the ninth, ⌈10 · .9⌉
    found = calibration.split_intervals(np.zeros(9), errors, np.zeros(2), np.array([9.0, 9.1]), level=0.9)
    np.testing.assert_array_equal(found.high, [9, 9])
    np.testing.assert_array_equal(found.covered, [True, False])
    assert found.median_width == 18.0
    too_few = calibration.split_intervals(np.zeros(8), errors[:8], np.zeros(1), np.ones(1), level=0.9)
    assert too_few.high[0] == np.inf


@pytest.mark.parametrize("horizon", [1, 5])
def test_adaptive_intervals_recover_after_the_market_changes(horizon):
    predicted, targets = returns(4500, 1, wild_from=500)
    parts = (predicted[:500], targets[:500], predicted[500:], targets[500:])
    split = calibration.split_intervals(*parts)
    adaptive = calibration.adaptive_intervals(*parts, horizon=horizon)
    assert split.coverage < 0.6
    assert adaptive.coverage == pytest.approx(0.9, abs=0.01)
    assert adaptive.covered[500:].mean() == pytest.approx(0.9, abs=0.02)


def test_long_run_coverage_is_within_the_papers_bound_whatever_the_series():
    """Gibbs & Candès 2021, proposition 4.1, on a series that is made to be missed: each error beats all before."""
    n, step = 2000, 0.05
    targets = np.cumsum(np.ones(n + 50))
    found = calibration.adaptive_intervals(
        np.zeros(50), targets[:50], np.zeros(n), targets[50:], horizon=1, level=0.9, step=step
    )
    assert abs(found.coverage - 0.9) <= (0.9 + step) / (step * n)
    assert np.isinf(found.high).any()


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
    other[40 - horizon + 1 : 40] += 1.0  # realised after the first judged row's day
    before, after = (
        calibration.adaptive_intervals(predicted[:40], t[:40], predicted[40:], t[40:], horizon=horizon)
        for t in (targets, other)
    )
    assert before.high[0] == after.high[0]


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="calibration and judged rows"):
        calibration.split_intervals(np.zeros(0), np.zeros(0), np.zeros(1), np.zeros(1))
