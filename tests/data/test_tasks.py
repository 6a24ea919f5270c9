"""Tasks: labels equal their definition, bar by bar, and the published base rates of SPY."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fintx import tasks
from fintx.config.schema import TaskConfig
from fintx.data import bars as bars_module
from fintx.data import sources

TASKS = {
    "high": {"kind": "threshold", "price": "high", "threshold": 0.01},
    "high, a fall": {"kind": "threshold", "price": "high", "threshold": -0.02},
    "close": {"kind": "threshold", "price": "close", "threshold": 0.01},
    "direction": {"kind": "direction"},
    "regression": {"kind": "regression"},
}


def slowly(task: TaskConfig, bars) -> list[float]:
    labels = []
    for t in range(len(bars)):
        ahead = range(t + 1, t + task.horizon + 1)
        if ahead[-1] >= len(bars):
            labels.append(float("nan"))
        elif task.kind == "threshold":
            reached = max(bars.high[s] for s in ahead) if task.price == "high" else bars.close[ahead[-1]]
            labels.append(float(reached >= (1 + task.threshold) * bars.close[t]))
        elif task.kind == "direction":
            labels.append(float(bars.close[ahead[-1]] > bars.close[t]))
        else:
            labels.append(np.log(bars.close[ahead[-1]] / bars.close[t]))
    return labels


@pytest.mark.parametrize("horizon", [1, 2, 5, 21])
@pytest.mark.parametrize("kind", TASKS)
def test_labels_equal_their_definition(kind, horizon, help):
    task, bars = TaskConfig(**TASKS[kind], horizon=horizon), help.walk(n=150)
    np.testing.assert_array_equal(tasks.labels(task.rule, bars), slowly(task, bars))


@pytest.mark.parametrize("kind", TASKS)
@given(n=st.integers(1, 30), horizon=st.integers(1, 40), seed=st.integers(0, 99))
def test_labels_equal_their_definition_on_any_history_however_short(kind, n, horizon, seed, help):
    task, bars = TaskConfig(**TASKS[kind], horizon=horizon), help.walk(n=n, seed=seed)
    np.testing.assert_array_equal(tasks.labels(task.rule, bars), slowly(task, bars))


def test_a_threshold_that_is_just_reached_counts(help):
    bars = help.walk(n=3)
    close = np.array([128.0, 100.0, 100.0])
    bars = replace(bars, close=close, high=np.array([130.0, 128.0 * 1.25, 100.0]))
    task = TaskConfig(kind="threshold", price="high", threshold=0.25, horizon=1)
    assert tasks.labels(task.rule, bars).tolist()[:2] == [1.0, 0.0]
    below = replace(bars, high=np.nextafter(bars.high, 0))
    assert tasks.labels(task.rule, below)[0] == 0.0


def test_an_unchanged_close_is_no_rise(help):
    bars = replace(help.walk(n=2), close=np.array([10.0, 10.0]))
    assert tasks.labels(TaskConfig(kind="direction", horizon=1).rule, bars)[0] == 0.0


@pytest.mark.parametrize("kind", TASKS)
def test_labels_do_not_know_the_price_level_nor_the_past(kind, help):
    task, bars = TaskConfig(**TASKS[kind], horizon=3), help.walk(n=300)
    prices = {column: 8 * getattr(bars, column) for column in ("open", "high", "low", "close")}
    np.testing.assert_allclose(
        tasks.labels(task.rule, replace(bars, **prices)), tasks.labels(task.rule, bars), rtol=1e-12
    )
    np.testing.assert_array_equal(
        tasks.labels(task.rule, bars.take(np.arange(100, 300))), tasks.labels(task.rule, bars)[100:]
    )


@pytest.mark.parametrize("horizon", [1, 3, 200])
def test_ends_are_the_days_of_the_last_bar_looked_at(horizon, help):
    bars, task = help.walk(n=100), TaskConfig(kind="direction", horizon=horizon)
    ends = tasks.label_ends(task.rule, bars)
    np.testing.assert_array_equal(np.isnat(ends), np.isnan(tasks.labels(task.rule, bars)))
    for t in range(100 - min(horizon, 100)):
        assert ends[t] == bars.dates[t + horizon]


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("horizon", [1, 4])
def test_a_label_depends_on_no_bar_after_its_end(kind, horizon, help):
    task, bars = TaskConfig(**TASKS[kind], horizon=horizon), help.walk(n=80)
    whole, ends = tasks.labels(task.rule, bars), tasks.label_ends(task.rule, bars)
    for t in (0, 17, 60):
        until_end = bars.take(np.flatnonzero(bars.dates <= ends[t]))
        assert tasks.labels(task.rule, until_end)[t] == whole[t]


@pytest.mark.parametrize(
    ("settings_", "words"),
    [
        (
            {"kind": "threshold", "price": "high", "threshold": 0.01, "horizon": 3},
            "1 if the highest high of the next 3 trading days is ≥ today's close +1 %, else 0.",
        ),
        (
            {"kind": "threshold", "price": "close", "threshold": -0.025, "horizon": 1},
            "1 if the close of the next trading day is ≥ today's close -2.5 %, else 0.",
        ),
        ({"kind": "direction", "horizon": 2}, "1 if the close of the 2nd trading day from now is above"),
        ({"kind": "direction", "horizon": 11}, "the 11th trading day"),
        ({"kind": "direction", "horizon": 23}, "the 23rd trading day"),
        ({"kind": "regression", "horizon": 21}, "The log return from today's close to the close of the 21st trading"),
    ],
    ids=["high", "close", "2nd", "11th", "23rd", "regression"],
)
def test_a_label_is_described_in_words(settings_, words):
    assert words in TaskConfig(**settings_).rule.describe()


# --- the published base rates -----------------------------------------------------------------------------------------

BASE_RATES = [
    # price, horizon, all, 2023–24 (None: not published)
    ("high", 1, 0.2327, 0.2012),
    ("high", 3, 0.4740, 0.4641),
    ("high", 5, 0.5946, 0.6056),
    ("close", 1, 0.139, None),
    ("close", 3, 0.277, None),
    ("close", 5, 0.348, None),
]


@pytest.mark.parametrize(("price", "horizon", "all_days", "two_years"), BASE_RATES)
def test_base_rates_of_spy_are_the_published_ones(price, horizon, all_days, two_years, shared_data, help):
    spy = sources.read_file(shared_data / "SPY.csv", "SPY", today=help.today)
    labels = tasks.labels(TaskConfig(kind="threshold", price=price, threshold=0.01, horizon=horizon).rule, spy)
    assert np.nanmean(labels) == pytest.approx(all_days, abs=0.0006)
    if two_years is not None:
        inside = (spy.dates >= np.datetime64("2023-01-01")) & (spy.dates <= np.datetime64("2024-12-31"))
        assert labels[inside].mean() == pytest.approx(two_years, abs=0.0006)


def test_an_exact_label_is_float64_and_untouched_by_the_embedded_bars():
    bars = sources.embedded()
    before = bars.close.copy()
    labels = tasks.labels(TaskConfig(kind="regression", horizon=5).rule, bars)
    assert labels.dtype == np.float64
    assert bars_module.bar_problems(bars) == []
    np.testing.assert_array_equal(bars.close, before)
