"""Labels come from the future of raw prices alone, and have the base rates that are known of SPY."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fintx.config import TaskConfig
from fintx.data import bars as bars_module
from fintx.data import labels
from fintx.data.bars import Bars


def threshold(horizon: int, *, price: str = "high", level: float = 0.01) -> TaskConfig:
    return TaskConfig(kind="threshold", price=price, threshold=level, horizon=horizon)


def flat(close: list[float], high: list[float] | None = None) -> Bars:
    """Bars of given closes (and highs) on consecutive days."""
    prices = np.asarray(close, float)
    days = np.datetime64("2020-01-06") + np.arange(len(prices))
    top = prices if high is None else np.asarray(high, float)
    return bars_module.make("X", days, open=prices, high=top, low=prices, close=prices, volume=np.ones(len(prices)))


TASKS = {
    "high +1 %": threshold(3),
    "high +0.2 %, next day": threshold(1, level=0.002),
    "high −1 %": threshold(4, level=-0.01),
    "close +1 %": threshold(5, price="close"),
    "close −1 %": threshold(2, price="close", level=-0.01),
    "direction, next day": TaskConfig(kind="direction", horizon=1),
    "direction": TaskConfig(kind="direction", horizon=4),
    "regression, next day": TaskConfig(kind="regression", horizon=1),
    "regression": TaskConfig(kind="regression", horizon=7),
}


def by_hand(task: TaskConfig, bars: Bars, t: int) -> float:
    """The label of bar t, one bar at a time."""
    future = range(t + 1, t + task.horizon + 1)
    if future[-1] >= len(bars):
        return math.nan
    now, end = bars.close[t], bars.close[t + task.horizon]
    if task.kind == "regression":
        return math.log(end / now)
    if task.kind == "direction":
        return float(end > now)
    if task.price == "high":
        return float(any(bars.high[day] >= (1 + task.threshold) * now for day in future))
    return float(end >= (1 + task.threshold) * now)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS.keys())
def test_every_label_equals_a_loop_over_its_future(task, make_bars):
    bars = make_bars("X", 200, seed=1)
    expected = [by_hand(task, bars, t) for t in range(len(bars))]
    np.testing.assert_allclose(labels.cut(task, bars), expected, rtol=1e-12, equal_nan=True)
    if task.kind != "regression":
        assert 0 < np.nanmean(expected) < 1, "the case shows nothing: one class alone"


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS.keys())
def test_the_last_horizon_rows_and_no_others_have_no_label(task, make_bars):
    cut = labels.cut(task, make_bars("X", 60, seed=2))
    assert np.flatnonzero(np.isnan(cut)).tolist() == list(range(60 - task.horizon, 60))


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS.keys())
def test_a_label_moves_with_its_horizon_and_with_nothing_beyond(task, make_bars):
    bars, t = make_bars("X", 60, seed=3), 30
    beyond = bars.take(np.arange(t + task.horizon + 1))
    assert labels.cut(task, beyond)[t] == labels.cut(task, bars)[t]
    assert np.isnan(labels.cut(task, bars.take(np.arange(t + task.horizon)))[t])
    assert labels.ends(task, bars)[t] == bars.dates[t + task.horizon]


@pytest.mark.parametrize("n", range(8))
def test_a_history_shorter_than_the_horizon_has_no_label(n, make_bars):
    bars = make_bars("X", 20, seed=4).take(np.arange(n))
    task = threshold(7)
    assert len(labels.cut(task, bars)) == n and np.isnan(labels.cut(task, bars)).all()
    assert len(labels.ends(task, bars)) == n and np.isnat(labels.ends(task, bars)).all()


@pytest.mark.parametrize("horizon", [1, 3, 10])
def test_a_label_ends_exactly_where_it_exists(horizon, make_bars):
    bars, task = make_bars("X", 40, seed=5, missing=0.3), threshold(horizon)
    np.testing.assert_array_equal(np.isnat(labels.ends(task, bars)), np.isnan(labels.cut(task, bars)))


def test_reaching_the_threshold_exactly_counts():
    # 4 × 1.25 = 5 is exact in binary.
    assert labels.cut(threshold(1, level=0.25), flat([4, 4, 4], [4, 5, 4.99]))[:2].tolist() == [1, 0]
    assert labels.cut(threshold(1, price="close", level=0.25), flat([4, 5, 6.24]))[:2].tolist() == [1, 0]


def test_an_unchanged_close_is_no_rise():
    assert labels.cut(TaskConfig(kind="direction", horizon=1), flat([4, 4, 4.01, 4]))[:3].tolist() == [0, 1, 0]


def test_the_decision_days_own_high_is_past():
    assert labels.cut(threshold(2), flat([10, 10, 10, 10], [99, 10, 10, 10]))[:2].tolist() == [0, 0]


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS.keys())
def test_the_currency_unit_does_not_matter(task, make_bars):
    bars = make_bars("X", 80, seed=6)
    doubled = bars_module.make(
        "X", bars.dates, open=2 * bars.open, high=2 * bars.high, low=2 * bars.low, close=2 * bars.close,
        volume=np.zeros(80),
    )  # fmt: skip
    np.testing.assert_array_equal(labels.cut(task, doubled), labels.cut(task, bars))


@pytest.mark.parametrize(
    ("price", "horizon", "whole", "recent"),
    [
        ("high", 1, 0.2327, 0.2012),
        ("high", 3, 0.4740, 0.4641),
        ("high", 5, 0.5946, 0.6056),
        ("close", 1, 0.139, None),
        ("close", 3, 0.277, None),
        ("close", 5, 0.348, None),
    ],
)
def test_base_rates_on_spy_are_the_published_ones(price, horizon, whole, recent, real):
    """To the third decimal. Reference: the project's table of measured base rates, all days and 2023–24."""
    bars = real("SPY")["SPY"]
    cut = labels.cut(threshold(horizon, price=price), bars)
    years = bars.dates.astype("datetime64[Y]").astype(int) + 1970
    assert np.nanmean(cut) == pytest.approx(whole, abs=5e-4)
    if recent is not None:
        assert np.nanmean(cut[np.isin(years, (2023, 2024))]) == pytest.approx(recent, abs=5e-4)


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (threshold(1), "1 if the highest high of the next trading day is ≥ today's close +1 %, else 0."),
        (threshold(3), "1 if the highest high of the next 3 trading days is ≥ today's close +1 %, else 0."),
        (
            threshold(2, price="close", level=-0.025),
            "1 if the close of the 2nd trading day from now is ≥ today's close -2.5 %, else 0.",
        ),
        (
            TaskConfig(kind="direction", horizon=11),
            "1 if the close of the 11th trading day from now is above today's close, else 0.",
        ),
        (
            TaskConfig(kind="regression", horizon=21),
            "The log return from today's close to the close of the 21st trading day from now.",
        ),
    ],
)
def test_the_label_is_described_in_a_sentence(task, words):
    assert labels.describe(task) == words
