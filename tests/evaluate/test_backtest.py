"""Trades by hand, the paper's own example of the deflated Sharpe ratio, and no look ahead."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fintx.data import bars as bars_module
from fintx.data.bars import Bars
from fintx.evaluate import backtest
from fintx.evaluate.backtest import TradingRules
from fintx.tasks import Threshold

TASK = Threshold(price="high", threshold=0.01, horizon=2)
FREE = TradingRules(cost_bp=0.0)


def make(open_, high, low, close) -> Bars:
    days = np.datetime64("2020-01-01") + np.arange(len(close))
    columns = [np.asarray(column, float) for column in (open_, high, low, close)]
    return bars_module.make_bars(
        "A", days, open=columns[0], high=columns[1], low=columns[2], close=columns[3], volume=np.ones(len(close))
    )


def walk(n: int, seed: int) -> Bars:
    rng = np.random.default_rng(seed)
    close = 100 * np.exp(np.cumsum(0.012 * rng.normal(size=n)))
    open_ = np.r_[100.0, close[:-1]] * np.exp(0.004 * rng.normal(size=n))
    reach = np.exp(0.006 * rng.random(n))
    return make(open_, np.maximum(open_, close) * reach, np.minimum(open_, close) / reach, close)


def trade(bars: Bars, says: list[int], task: Threshold = TASK, rules: TradingRules = FREE) -> backtest.StrategyReturns:
    days = bars.dates[: len(bars) - task.horizon]
    return backtest.trade(bars, days, np.isin(np.arange(len(days)), says), task, rules)


# --- trades by hand ---------------------------------------------------------------------------------------------------

FLAT = {"open_": [100] * 6, "high": [100.5] * 6, "low": [99] * 6, "close": [100] * 6}


def test_the_target_is_sold_at_on_the_day_it_is_reached():
    bars = make(FLAT["open_"], [100.5, 100.5, 102, 100.5, 100.5, 100.5], FLAT["low"], FLAT["close"])
    strategy = trade(bars, [0])
    np.testing.assert_allclose(strategy.returns, [0, 0.01, 0, 0, 0], atol=1e-12)  # days 1 … 5
    assert (strategy.trades, strategy.wins) == (1, 1)
    np.testing.assert_array_equal(strategy.held, [True, True, False, False, False])


def test_an_open_above_the_target_sells_at_the_open():
    bars = make([100, 100, 103, 100, 100, 100], [100.5, 100.5, 104, 100.5, 100.5, 100.5], FLAT["low"], FLAT["close"])
    assert trade(bars, [0]).returns[1] == pytest.approx(0.03)


def test_what_never_reaches_the_target_is_sold_at_the_end():
    bars = make(FLAT["open_"], FLAT["high"], FLAT["low"], [100, 99.5, 99.2, 100, 100, 100])
    strategy = trade(bars, [0])
    np.testing.assert_allclose(np.prod(1 + strategy.returns), 0.992)
    assert strategy.wins == 0


def test_entry_at_the_close_earns_the_night_and_entry_at_the_open_does_not():
    bars = make(
        [100, 100.8, 100, 100, 100, 100], [100.5, 100.9] + [100.9] * 4, [99] * 6, [100, 100.5, 100, 100, 100, 100]
    )
    close, open_ = (
        np.prod(1 + trade(bars, [0], rules=TradingRules(entry, 0.0)).returns) for entry in ("close", "next_open")
    )
    assert close == pytest.approx(1.0) and open_ == pytest.approx(100 / 100.8)


def test_an_open_beyond_the_target_is_no_trade():
    bars = make([100, 101.5, 100, 100, 100, 100], [100.5, 102] + [100.5] * 4, FLAT["low"], FLAT["close"])
    assert trade(bars, [0]).trades == 0
    assert trade(bars, [0], rules=TradingRules("close", 0.0)).returns[0] == pytest.approx(0.015)


def test_a_close_task_has_no_limit_order():
    task = Threshold(price="close", threshold=0.01, horizon=2)
    bars = make(FLAT["open_"], [100.5, 105, 100.5, 100.5, 100.5, 100.5], FLAT["low"], FLAT["close"])
    assert np.prod(1 + trade(bars, [0], task).returns) == pytest.approx(1.0)


def test_costs_are_paid_on_both_sides():
    bars = make(**FLAT)
    assert np.prod(1 + trade(bars, [0], rules=TradingRules("close", 10.0)).returns) == pytest.approx(0.999**2)
    assert trade(bars, [0], rules=TradingRules("close", 10.0)).wins == 0


def test_one_position_at_a_time():
    bars = make(**FLAT)
    assert trade(bars, [0, 1]).trades == 1
    assert trade(bars, [0, 2]).trades == 2  # the day of the exit may enter again at its end


@given(st.integers(0, 200), st.integers(0, 40), st.sampled_from(["close", "next_open"]))
def test_the_future_changes_no_day_before_it(seed, cut, entry):
    bars, other = walk(60, seed), walk(60, seed + 1)
    mixed = make(*(np.where(np.arange(60) <= cut, getattr(bars, n), getattr(other, n)) for n in bars_module.PRICES))
    yes = np.random.default_rng(seed).random(58) < 0.5
    before, after = (backtest.trade(b, b.dates[:58], yes, TASK, TradingRules(entry)) for b in (bars, mixed))
    np.testing.assert_allclose(before.returns[:cut], after.returns[:cut], atol=1e-12)


@given(st.integers(0, 200))
def test_daily_returns_multiply_to_the_trades(seed):
    """Another book-keeping: each trade's whole gain, by exit price over entry price."""
    bars = walk(80, seed)
    yes = np.random.default_rng(seed).random(78) < 0.4
    strategy, day, wealth = backtest.trade(bars, bars.dates[:78], yes, TASK, TradingRules("close", 7.0)), 0, 1.0
    while day < 78:
        if not yes[day]:
            day += 1
            continue
        target = 1.01 * bars.close[day]
        ends = [d for d in (day + 1, day + 2) if bars.high[d] >= target]
        out = ends[0] if ends else day + 2
        price = max(target, bars.open[out]) if ends else bars.close[out]
        wealth *= price / bars.close[day] * (1 - 7e-4) ** 2
        day = out
    assert np.prod(1 + strategy.returns) == pytest.approx(wealth, rel=1e-9)


def test_a_driftless_price_earns_nothing_before_costs_and_loses_them_after():
    """With trades at fair prices no rule can win: optional stopping."""
    rng = np.random.default_rng(0)
    close = 100 * np.exp(np.cumsum(0.01 * rng.normal(size=20_000) - 0.5e-4))
    flat = make(close, close, close, close)
    task = Threshold(price="close", threshold=0.01, horizon=3)
    for cost, expected in ((0.0, 0.0), (20.0, -2 * 20e-4)):
        strategy = trade(flat, list(range(0, 19_990, 4)), task, TradingRules("close", cost))
        per_trade = np.log1p(strategy.returns).sum() / strategy.trades
        assert per_trade == pytest.approx(expected, abs=3 * 0.01 * np.sqrt(3 / strategy.trades))


def test_tasks_without_a_target_above_are_refused():
    task = Threshold(price="high", threshold=-0.01, horizon=2)
    with pytest.raises(ValueError, match="target lies above"):
        trade(walk(20, 0), [0], task)
    bars = walk(20, 0)
    with pytest.raises(ValueError, match="lack decision days"):
        backtest.trade(bars, bars.dates[:19], np.ones(19, bool), TASK, FREE)


# --- figures ----------------------------------------------------------------------------------------------------------


def test_buy_and_hold_is_the_price_less_costs():
    bars = walk(60, 3)
    like = trade(bars, [5])
    benchmark = backtest.buy_and_hold(bars, like, TradingRules(cost_bp=10.0))
    assert np.prod(1 + benchmark.returns) == pytest.approx(bars.close[-1] / bars.close[0] * 0.999**2)


def test_performance_by_hand():
    days = np.datetime64("2020-01-01") + np.arange(4)
    strategy = backtest.StrategyReturns(
        days, np.array([0.1, -0.2, 0.0, 0.1]), np.array([True, True, False, True]), 2, 1
    )
    figures = backtest.performance("x", strategy)
    assert figures.annual_return == pytest.approx((1.1 * 0.8 * 1.1) ** (252 / 4) - 1)
    assert figures.max_drawdown == pytest.approx(0.2)
    assert (figures.win_rate, figures.exposure) == (0.5, 0.75)
    assert figures.sharpe == pytest.approx(0.0, abs=1e-12)
    still = backtest.performance("cash", backtest.StrategyReturns(days, np.zeros(4), np.zeros(4, bool), 0, 0))
    assert still.sharpe is None and still.win_rate is None and still.max_drawdown == 0.0


def test_a_fall_from_the_start_is_a_drawdown():
    days = np.datetime64("2020-01-01") + np.arange(2)
    strategy = backtest.StrategyReturns(days, np.array([-0.5, 0.0]), np.ones(2, bool), 1, 0)
    assert backtest.performance("x", strategy).max_drawdown == pytest.approx(0.5)


def test_a_portfolio_gives_every_asset_its_share():
    days = np.datetime64("2020-01-01") + np.arange(3)
    one = backtest.StrategyReturns(days, np.array([0.1, 0.0, 0.2]), np.array([True, False, True]), 2, 2)
    two = backtest.StrategyReturns(days[1:], np.array([0.3, 0.0]), np.array([True, False]), 1, 1)
    combined = backtest.portfolio([one, two])
    np.testing.assert_allclose(combined.returns, [0.05, 0.15, 0.1])
    assert (combined.trades, combined.wins, combined.held.tolist()) == (3, 3, [True, True, True])


def test_the_papers_example_of_a_deflated_sharpe_ratio():
    """Bailey & López de Prado 2014, "A numerical example": 2.5 a year over 1,250 days, skewness −3, kurtosis 10."""
    ratio = backtest._deflated(
        2.5 / np.sqrt(250), 1250, -3.0, 10.0, n_trials=100, variance=0.5 / 250
    )  # fmt: skip
    assert ratio.threshold / np.sqrt(backtest.YEAR) == pytest.approx(0.1132, abs=5e-5)
    assert ratio.probability == pytest.approx(0.9004, abs=5e-5)


def test_the_best_of_worthless_trials_is_no_evidence():
    rng = np.random.default_rng(5)
    naive = deflated = 0
    for _ in range(200):
        trials = 0.01 * rng.normal(size=(50, 750))
        ratios = np.array([backtest.sharpe(row) for row in trials])
        best = trials[ratios.argmax()]
        naive += backtest.deflated_sharpe(best, n_trials=1, sharpe_variance=0.0).probability > 0.95
        ratio = backtest.deflated_sharpe(best, n_trials=50, sharpe_variance=float(ratios.var(ddof=1)))
        deflated += ratio.probability > 0.95
    assert naive > 150  # the luckiest of fifty looks like skill
    assert deflated < 20  # no more than the stated 5 %, with room for chance


def test_cash_has_no_deflated_sharpe_ratio():
    assert backtest.deflated_sharpe(np.zeros(100), n_trials=5, sharpe_variance=0.1) is None


def test_assumptions_name_entry_target_and_costs():
    text = " ".join(backtest.assumptions(TradingRules("next_open", 5.0), TASK))
    assert all(words in text for words in ("next day's open", "1.01 ×", "5 basis points", "training base rate"))
    close = " ".join(backtest.assumptions(TradingRules("close"), Threshold(price="close", threshold=0.01, horizon=3)))
    assert "an input" in close and "high reaches" not in close
