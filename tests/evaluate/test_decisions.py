"""Precision, recall and lift equal scikit-learn's, and the table says how many rows said yes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import precision_recall_curve

from fintx.evaluate import calibration, metrics


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
    found = calibration.precision_recall(logits, truth)
    precision, recall, thresholds = precision_recall_curve(truth, logits)
    np.testing.assert_allclose(found.precision[::-1], precision[:-1], atol=1e-12)
    np.testing.assert_allclose(found.recall[::-1], recall[:-1], atol=1e-12)
    np.testing.assert_allclose(found.threshold[::-1], metrics.sigmoid(thresholds), atol=1e-12)
    assert (found.precision_low <= found.precision).all() and (found.precision <= found.precision_high).all()
    assert found.lift[-1] == pytest.approx(1.0) and found.predicted[-1] == len(truth)


@given(scored())
def test_the_table_counts_what_its_threshold_says(case):
    logits, truth = case
    for row in calibration.threshold_table(logits, truth):
        said = metrics.sigmoid(logits) >= row.threshold
        assert row.predicted == said.sum() >= round((1 - row.decile) * len(logits) - 0.5)
        assert row.precision.k == row.recall.k == truth[said].sum()
        assert row.recall.n == truth.sum()
        assert row.lift == pytest.approx(truth[said].mean() / truth.mean())
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
    (row,) = calibration.threshold_table(np.arange(10.0), np.zeros(10), deciles=(0.5,))
    assert row.recall.value is None and row.lift is None and row.precision.value == 0.0
    curve = calibration.precision_recall(np.arange(10.0), np.zeros(10))
    assert np.isnan(curve.recall).all() and np.isnan(curve.lift).all() and curve.average_precision is None
