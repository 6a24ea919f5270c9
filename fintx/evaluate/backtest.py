"""Backtest: what following a forecast would have earned after costs, with one position at a time.

For threshold tasks with a target above the entry. It shows whether skill pays and is no trading system. Every
assumption is a line of `assumptions`, shown beside the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from fintx.data.bars import Bars
from fintx.tasks import Threshold
from fintx.types import Floats

YEAR = 252


@dataclass(frozen=True)
class TradingRules:
    """How a positive prediction becomes a trade."""

    entry: Literal["close", "next_open"] = "next_open"
    """close: of the decision day, which is an input of the forecast: optimistic. next_open: of the day after."""
    cost_bp: float = 5.0
    """Per side, in basis points of the price: fees, half the spread, slippage."""

    @property
    def keeps(self) -> float:
        """Share of the capital that one side's costs leave."""
        return 1 - self.cost_bp / 1e4


@dataclass(frozen=True, eq=False)
class StrategyReturns:
    """Daily returns of one strategy, on one asset or on a portfolio."""

    dates: np.ndarray
    """(D,) datetime64[D]: the days of the backtest, with a position or without."""
    returns: Floats
    """(D,) simple return of the day on the whole capital; 0 without a position."""
    held: np.ndarray
    """(D,) bool: a position was open on the day."""
    trades: int
    wins: int
    """Trades with a profit after costs."""


@dataclass(frozen=True)
class Performance:
    """A strategy's returns after costs, in a few numbers."""

    name: str
    trades: int
    win_rate: float | None
    exposure: float
    """Share of days with a position."""
    annual_return: float
    """Geometric mean, per year."""
    annual_volatility: float
    sharpe: float | None
    """Annual, without an interest rate; None where returns never vary."""
    max_drawdown: float
    """Deepest fall from a peak, as a positive share."""


@dataclass(frozen=True)
class DeflatedSharpe:
    """Bailey & López de Prado 2014."""

    probability: float
    """That the true Sharpe ratio exceeds what the best of n_trials worthless ones shows; below .95 is no evidence."""
    threshold: float
    """That Sharpe ratio, annual."""


def applies(level: Threshold | None) -> bool:
    """Whether there is a target above the close, at which to sell."""
    return level is not None and level.threshold > 0


def assumptions(rules: TradingRules, task: Threshold) -> tuple[str, ...]:
    """All assumptions of the backtest, a line each."""
    entry = (
        "at the close that the forecast was made from (optimistic: that close is an input)"
        if rules.entry == "close"
        else "at the next day's open; no trade if it opens at the target or above"
    )
    end = f"at the close of day {task.horizon}"
    leave = (
        f"once a day's high reaches {1 + task.threshold:.4g} × the decision day's close (at the open if that is "
        f"higher), else {end}; the whole position is assumed to find a buyer at that price"
        if task.price == "high"
        else end
    )
    return (
        f"A probability at or above the training base rate buys {entry}; nothing is tuned on these days.",
        f"It sells {leave}.",
        f"Costs are {rules.cost_bp:g} basis points per side, of the price.",
        "At most one position per asset at a time, with all of that asset's share of the capital; further signals "
        "meanwhile are ignored. Assets have equal shares, rebalanced daily at no cost.",
        "No leverage, no short positions, no interest on cash, no dividends, no taxes.",
    )


def trade(
    bars: Bars, decision_days: np.ndarray, buy: np.ndarray, task: Threshold, rules: TradingRules
) -> StrategyReturns:
    """Trade one asset by a forecast.

    Args:
        bars: of the asset; nothing after the last decision day + h is used.
        decision_days: (S,) datetime64[D], increasing, each a day of the bars with h more behind it.
        buy: (S,) bool, known at each decision day's close.

    Returns:
        From the day after the first decision day to h days after the last.

    Raises:
        ValueError: a task without a target above the close, or decision days that the bars lack.
    """
    if not applies(task):
        raise ValueError("a backtest needs a threshold task whose target lies above the close")
    place = np.searchsorted(bars.dates, decision_days)
    if len(place) == 0 or place[-1] + task.horizon >= len(bars) or (bars.dates[place] != decision_days).any():
        raise ValueError(f"{bars.symbol}: the bars lack decision days, or the {task.horizon} days behind the last")
    first, last = int(place[0]), int(place[-1]) + task.horizon
    is_signal = np.zeros(len(bars), bool)
    is_signal[place[buy]] = True
    growth, held = np.ones(last + 1), np.zeros(last + 1, bool)
    trades, wins, day = 0, 0, first
    while day <= last - task.horizon:
        target = bars.close[day] * (1 + task.threshold)
        price = bars.close[day] if rules.entry == "close" else bars.open[day + 1]
        if not is_signal[day] or price >= target:
            day += 1
            continue
        exit_day, exit_price = _exit(bars, day, target, task)
        marks = np.concatenate([[price], bars.close[day + 1 : exit_day], [exit_price]])
        daily = marks[1:] / marks[:-1]
        daily[0] *= rules.keeps
        daily[-1] *= rules.keeps
        growth[day + 1 : exit_day + 1] *= daily
        held[day + 1 : exit_day + 1] = True
        trades, wins = trades + 1, wins + int(np.prod(daily) > 1)
        day = exit_day  # its close may decide the next trade
    days = slice(first + 1, last + 1)
    return StrategyReturns(bars.dates[days], growth[days] - 1, held[days], trades, wins)


def _exit(bars: Bars, day: int, target: float, task: Threshold) -> tuple[int, float]:
    """The day that a position ends on, and its price."""
    end = day + task.horizon
    if task.price == "high":
        reached = np.flatnonzero(bars.high[day + 1 : end + 1] >= target)
        if len(reached):
            exit_day = day + 1 + int(reached[0])
            # A limit order fills at the open if the day opens above it; on an entry at the open it opened below.
            return exit_day, float(max(target, bars.open[exit_day]))
    return end, float(bars.close[end])


def buy_and_hold(bars: Bars, like: StrategyReturns, rules: TradingRules) -> StrategyReturns:
    """The asset over the same days as a strategy: bought at the close before them, costs at both ends."""
    place = np.searchsorted(bars.dates, like.dates)
    returns = bars.close[place] / bars.close[place - 1] - 1
    for end in (0, -1):
        returns[end] = (1 + returns[end]) * rules.keeps - 1
    return StrategyReturns(like.dates, returns, np.ones(len(returns), bool), 1, int(np.prod(1 + returns) > 1))


def portfolio(parts: list[StrategyReturns]) -> StrategyReturns:
    """Equal shares of the capital in every asset, over all their days; a day without bars of an asset earns it 0."""
    days = np.unique(np.concatenate([part.dates for part in parts]))
    returns, held = np.zeros(len(days)), np.zeros(len(days), bool)
    for part in parts:
        place = np.searchsorted(days, part.dates)
        returns[place] += part.returns / len(parts)
        held[place] |= part.held
    return StrategyReturns(days, returns, held, sum(part.trades for part in parts), sum(part.wins for part in parts))


def performance(name: str, strategy: StrategyReturns) -> Performance:
    """Figures of a strategy's returns."""
    wealth = np.cumprod(1 + strategy.returns)
    n = len(wealth)
    daily_sharpe = sharpe(strategy.returns)
    peak = np.maximum.accumulate(np.concatenate([[1.0], wealth]))[1:]
    return Performance(
        name=name,
        trades=strategy.trades,
        win_rate=strategy.wins / strategy.trades if strategy.trades else None,
        exposure=float(strategy.held.mean()),
        annual_return=float(wealth[-1] ** (YEAR / n) - 1),
        annual_volatility=_sd(strategy.returns) * np.sqrt(YEAR),
        sharpe=None if daily_sharpe is None else daily_sharpe * np.sqrt(YEAR),
        max_drawdown=float(np.max(1 - wealth / peak)),
    )


def sharpe(returns: Floats) -> float | None:
    """Mean over SD of daily returns, per day; None where they never vary."""
    sd = _sd(returns)
    return float(np.mean(returns) / sd) if sd > 1e-15 else None


def _sd(returns: Floats) -> float:
    return float(np.std(returns, ddof=1)) if len(returns) > 1 else 0.0


def deflated_sharpe(returns: Floats, *, n_trials: int, sharpe_variance: float) -> DeflatedSharpe | None:
    """The deflated Sharpe ratio (Bailey & López de Prado 2014, eq. 1 and 2); None where returns never vary.

    SR₀ = √V · ((1 − γ) Φ⁻¹(1 − 1/N) + γ Φ⁻¹(1 − 1/(N e))), the expected best of N worthless trials, and
    DSR = Φ((SR − SR₀) √(T − 1) / √(1 − γ₃ SR + (γ₄ − 1)/4 · SR²)), all per day, γ₃ skewness, γ₄ kurtosis.

    Args:
        returns: (T,) daily, of the chosen trial.
        n_trials: all that were tried, not those that are shown.
        sharpe_variance: V, variance of the trials' Sharpe ratios per day; 0: they are all alike.
    """
    daily_sharpe = sharpe(returns)
    if daily_sharpe is None:
        return None
    z = (returns - returns.mean()) / returns.std()
    skewness, kurtosis = float(np.mean(z**3)), float(np.mean(z**4))
    return _deflated(daily_sharpe, len(returns), skewness, kurtosis, n_trials=n_trials, variance=sharpe_variance)


def _deflated(
    daily_sharpe: float, n: int, skewness: float, kurtosis: float, *, n_trials: int, variance: float
) -> DeflatedSharpe:
    """From the moments of the returns alone, as the paper's example has it."""
    from scipy.special import ndtr, ndtri

    threshold = 0.0
    if n_trials > 1:
        far, further = ndtri(1 - 1 / n_trials), ndtri(1 - 1 / (n_trials * np.e))
        threshold = float(np.sqrt(variance) * ((1 - np.euler_gamma) * far + np.euler_gamma * further))
    error = np.sqrt(1 - skewness * daily_sharpe + (kurtosis - 1) / 4 * daily_sharpe**2)
    probability = float(ndtr((daily_sharpe - threshold) * np.sqrt(n - 1) / error))
    return DeflatedSharpe(probability, threshold * float(np.sqrt(YEAR)))
