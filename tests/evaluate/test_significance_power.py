"""Power and luck against simulation and known moments."""

from __future__ import annotations

import numpy as np
import pytest

from fintx.evaluate import metrics, significance


@pytest.mark.parametrize(
    "n, expected",
    # 2 and 3: closed forms 1/√π and 3/(2√π); the others: Harter 1961, table 1
    [(1, 0.0), (2, 1 / np.sqrt(np.pi)), (3, 1.5 / np.sqrt(np.pi)), (10, 1.53875), (50, 2.24907), (100, 2.50759)],
)
def test_expected_maximum_is_the_published_one(n, expected):
    assert significance.expected_maximum(n) == pytest.approx(expected, abs=6e-6)


def test_expected_maximum_by_simulation():
    draws = np.random.default_rng(0).normal(size=(20_000, 600)).max(axis=1)
    assert significance.expected_maximum(600) == pytest.approx(draws.mean(), abs=4 * draws.std() / np.sqrt(20_000))


def test_detectable_is_280_standard_errors():
    assert significance.smallest_detectable(1.0) == pytest.approx(2.8016, abs=1e-4)


def test_a_difference_of_that_size_is_seen_in_80_percent():
    rng = np.random.default_rng(1)
    seen = np.abs(significance.smallest_detectable(1.0) + rng.normal(size=100_000)) > 1.96
    assert seen.mean() == pytest.approx(0.8, abs=0.004)


def test_the_paired_error_is_that_of_two_forecasters_whose_logits_differ():
    """Two forecasters about a calibrated one, each by half of the gap: the per-row difference's SD is as stated."""
    rng = np.random.default_rng(2)
    n, rate = 400_000, 0.3
    truth = np.log(rate / (1 - rate)) + rng.normal(size=n)
    y = (rng.random(n) < metrics.sigmoid(truth)).astype(float)
    gap = significance.LOGIT_GAP * rng.normal(size=n)
    difference = np.subtract(*(metrics.per_sample_loss("probability", truth + s * gap / 2, y) for s in (1, -1)))
    power = significance.paired_power(rate, 1000, 500.0, n_trials=50)
    assert power.paired_se == pytest.approx(difference.std() / np.sqrt(500), rel=0.02)


def test_the_best_of_equal_trials_looks_better_by_the_stated_luck():
    rng = np.random.default_rng(3)
    power = significance.paired_power(0.25, 800, 800.0, n_trials=20)
    own = power.paired_se / np.sqrt(2)  # two trials' difference has the paired error
    losses = own * rng.normal(size=(40_000, 20))
    assert -losses.min(axis=1).mean() == pytest.approx(power.luck_nats, rel=0.02)


def test_rows_that_can_show_nothing_are_refused():
    with pytest.raises(ValueError, match="base rate within"):
        significance.paired_power(0.0, 10, 10.0, n_trials=5)
    with pytest.raises(ValueError, match="at least one trial"):
        significance.expected_maximum(0)
