"""Volatility is told from direction where the truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fintx import tasks
from fintx.config.schema import TaskConfig
from fintx.data import bars as bars_module
from fintx.evaluate import direction, metrics


def simulated(n: int, *, drift_known: bool, seed: int = 0):
    """Events ± 1 % of a normal move; the forecaster knows its volatility, or its drift, and nothing else."""
    rng = np.random.default_rng(seed)
    volatility = 0.01 * np.exp(0.6 * rng.normal(size=n))
    drift = 0.006 * rng.normal(size=n)
    move = drift + volatility * rng.normal(size=n)
    logits = drift / 0.006 if drift_known else np.log(volatility / 0.01)
    return logits, (move >= 0.01).astype(float), (move <= -0.01).astype(float)


def test_who_knows_volatility_alone_scores_the_opposite_event_as_well():
    mirror = direction.mirror_test(*simulated(20_000, drift_known=False), horizon=1)
    assert mirror.auc > 0.64
    assert abs(mirror.auc - mirror.opposite_auc) < 0.02
    assert abs(mirror.direction_auc - 0.5) < 3 * mirror.direction_se
    assert mirror.one_sided < mirror.n == 20_000


def test_who_knows_direction_scores_the_opposite_event_the_wrong_way_round():
    mirror = direction.mirror_test(*simulated(20_000, drift_known=True), horizon=1)
    assert mirror.auc > 0.6 and mirror.opposite_auc < 0.4
    assert mirror.direction_auc - 0.5 > 10 * mirror.direction_se


def test_the_standard_error_covers_one_half_as_often_as_it_says():
    inside = 0
    for seed in range(200):
        mirror = direction.mirror_test(*simulated(600, drift_known=False, seed=seed), horizon=1)
        inside += abs(mirror.direction_auc - 0.5) < 1.96 * mirror.direction_se
    assert inside >= 180  # 95 % of 200 less three standard errors


def test_overlapping_labels_widen_the_error_by_the_root_of_the_horizon():
    case = simulated(5000, drift_known=False)
    one, five = (direction.mirror_test(*case, horizon=h).direction_se for h in (1, 5))
    assert five == pytest.approx(np.sqrt(5) * one, rel=0.01)


def test_events_that_always_come_together_leave_no_direction():
    logits = np.arange(4.0)
    both = np.array([1.0, 0, 1, 0])
    mirror = direction.mirror_test(logits, both, both, horizon=1)
    assert mirror.one_sided == 0 and mirror.direction_auc is None and mirror.direction_se is None


def test_rows_without_an_opposite_are_refused():
    with pytest.raises(ValueError, match="must be finite"):
        direction.mirror_test(np.zeros(2), np.array([0.0, 1]), np.array([np.nan, 1]), horizon=1)


@given(
    st.lists(st.floats(50, 150), min_size=6, max_size=20), st.integers(1, 3), st.sampled_from([-0.02, 0.01, 0.05]),
    st.sampled_from(["high", "close"]), st.randoms(use_true_random=False),
)  # fmt: skip
def test_the_opposite_event_is_the_mirror_image(closes, horizon, threshold, price, random):
    close = np.array(closes)
    low, high = close * (1 - random.random() * 0.03), close * (1 + random.random() * 0.03)
    days = np.datetime64("2020-01-01") + np.arange(len(close))
    bars = bars_module.make_bars("A", days, open=close, high=high, low=low, close=close, volume=np.ones(len(close)))
    task = TaskConfig(kind="threshold", price=price, threshold=threshold, horizon=horizon)
    opposites = tasks.mirror_labels(task.rule.level, bars)
    for t in range(len(close) - horizon):
        lowest = low[t + 1 : t + 1 + horizon].min() if price == "high" else close[t + horizon]
        assert opposites[t] == float(lowest <= (1 - threshold) * close[t])
    assert np.isnan(opposites[len(close) - horizon :]).all()


def test_other_tasks_have_no_level_and_so_no_opposite_event():
    assert TaskConfig(kind="direction", horizon=1).rule.level is None
    assert TaskConfig(kind="regression", horizon=1).rule.level is None


# --- over time --------------------------------------------------------------------------------------------------------


@pytest.fixture
def rows():
    rng = np.random.default_rng(1)
    dates = np.datetime64("2018-06-01") + np.arange(900)
    logits = rng.normal(size=900)
    truth = (rng.random(900) < metrics.sigmoid(logits - 1)).astype(float)
    return logits, truth, dates


def test_years_add_up_to_the_whole(rows):
    logits, truth, dates = rows
    years = direction.by_year(logits, truth, dates, prior=0.3, baseline=np.zeros(900))
    assert [row.year for row in years] == [2018, 2019, 2020]
    assert sum(row.n for row in years) == 900
    whole = metrics.evaluate("probability", logits, truth, prior=0.3)
    assert sum(row.n * row.log_loss for row in years) / 900 == pytest.approx(whole["log_loss"], rel=1e-12)
    assert sum(row.n * row.gain for row in years) / 900 == pytest.approx(np.log(2) - whole["log_loss"], rel=1e-12)
    mine = dates.astype("datetime64[Y]") == np.datetime64("2019")
    alone = metrics.evaluate("probability", logits[mine], truth[mine], prior=0.3)
    assert years[1].skill == pytest.approx(alone["skill"], rel=1e-12)
    assert years[1].auc == alone["auc"]


def test_each_row_may_have_the_prior_of_its_fold(rows):
    logits, truth, dates = rows
    priors = np.where(dates < np.datetime64("2019"), 0.2, 0.4)
    years = direction.by_year(logits, truth, dates, prior=priors)
    assert years[0] == direction.by_year(logits, truth, dates, prior=0.2)[0]
    assert years[1] == direction.by_year(logits, truth, dates, prior=0.4)[1]


def test_within_year_auc_counts_pairs_of_the_same_year(rows):
    logits, truth, dates = rows
    years = dates.astype("datetime64[Y]")
    wins = pairs = 0
    for i in np.flatnonzero(truth == 1):
        negatives = (truth == 0) & (years == years[i])
        wins += np.sum(logits[i] > logits[negatives]) + 0.5 * np.sum(logits[i] == logits[negatives])
        pairs += negatives.sum()
    assert direction.within_year_auc(logits, truth, dates) == pytest.approx(wins / pairs, rel=1e-12)


def test_who_knows_the_year_alone_has_no_auc_within_years():
    rng = np.random.default_rng(2)
    dates = np.datetime64("2010-01-01") + np.arange(3652)
    level = dates.astype("datetime64[Y]").astype(int) % 2
    truth = (rng.random(3652) < np.where(level, 0.6, 0.1)).astype(float)
    assert metrics.auc(level.astype(float), truth) > 0.7
    assert direction.within_year_auc(level.astype(float), truth, dates) == 0.5


def test_no_year_with_both_classes_has_no_auc(rows):
    logits, _, dates = rows
    assert direction.within_year_auc(logits, np.zeros(900), dates) is None


def test_gains_add_up_by_day_whatever_the_order_of_rows(rows):
    logits, truth, dates = rows
    days = np.sort(np.r_[dates[:450], dates[:450]])
    mine, theirs = (metrics.per_sample_loss("probability", z, truth) for z in (logits, np.zeros(900)))
    order = np.random.default_rng(3).permutation(900)
    cumulative = direction.cumulative_gain(mine[order], theirs[order], days[order])
    assert len(cumulative.dates) == 450
    np.testing.assert_allclose(cumulative.gain, np.cumsum((theirs - mine).reshape(450, 2).sum(axis=1)), atol=1e-9)
    assert cumulative.total == pytest.approx(np.sum(theirs - mine))


def test_a_gain_of_one_year_is_called_one():
    dates = np.array(["2019-03-01", "2019-06-01", "2020-03-01", "2021-03-01"], "datetime64[D]")
    cumulative = direction.cumulative_gain(np.array([0.0, 0, 1, 0]), np.array([3.0, 2, 0, 1]), dates)
    np.testing.assert_array_equal(cumulative.gain, [3, 5, 4, 5])
    assert cumulative.deepest_fall == 1.0
    assert cumulative.best_year_share == pytest.approx(5 / 5)
    worse = direction.cumulative_gain(np.array([1.0]), np.array([0.0]), dates[:1])
    assert worse.best_year_share is None and worse.deepest_fall == 1.0
