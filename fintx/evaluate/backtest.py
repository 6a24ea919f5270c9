"""What would following the forecast have earned after costs, with at most one position at a time?

For threshold tasks with a target above the entry. It shows whether skill pays; it is no trading system. Every
assumption is a line of `assumptions`, to be printed beside the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from fintx.data.bars import Bars
from fintx.tasks import Threshold
from fintx.types import Floats

YEAR = 252
_EULER = 0.5772156649015329


@dataclass(frozen=True)
class TradingRules:
    """How a yes becomes a trade."""

    entry: Literal["close", "next_open"] = "next_open"
    """close: of the decision day, which the forecast itself has used: kind to it. next_open: of the day after."""
    cost_bp: float = 5.0
    """Per side, in hundredths of a percent of the price: fees, half the spread, slippage."""


@dataclass(frozen=True, eq=False)
class StrategyReturns:
    """Daily returns of one rule on one asset."""

    dates: np.ndarray
    """(D,) datetime64[D]: the days of the backtest, traded or not."""
    returns: Floats
    """(D,) simple return of the day on the whole capital; 0 without a position."""
    held: np.ndarray
    """(D,) bool: a position was open on the day."""
    trades: int
    wins: int
    """Trades that earned something after costs."""
    at_target: int
    """Trades that left at the target."""


@dataclass(frozen=True)
class Performance:
    """A ledger in figures."""

    name: str
    days: int
    trades: int
    win_rate: float | None
    exposure: float
    """Share of days with a position."""
    total_return: float
    annual_return: float
    """Geometric."""
    annual_volatility: float
    sharpe: float | None
    """Annual, without an interest rate; none where returns never vary."""
    max_drawdown: float
    """Deepest fall from a peak, as a positive share."""


@dataclass(frozen=True)
class DeflatedSharpe:
    """Bailey & López de Prado 2014."""

    probability: float
    """That the true Sharpe ratio is above what the best of n_trials worthless ones shows; below .95 is no evidence."""
    threshold: float
    """That Sharpe ratio, annual."""
    n_trials: int


def applies(level: Threshold | None) -> bool:
    """Whether there is a target above the close, at which to sell."""
    return level is not None and level.threshold > 0


def assumptions(rules: TradingRules, task: Threshold) -> tuple[str, ...]:
    """All that the backtest takes for granted, a line each."""
    enter = (
        "at the close that the forecast was made from (kind to it: that close is an input)"
        if rules.entry == "close"
        else "at the next day's open; no trade if it opens at the target or above"
    )
    end = f"at the close of day {task.horizon}"
    leave = (
        f"once a day's high reaches {1 + task.threshold:.4g} × the decision day's close (at the open if that is "
        f"higher), else {end}; the whole position is taken to find a buyer at that price"
        if task.price == "high"
        else end
    )
    return (
        f"A yes, a probability at or above the training base rate, buys {enter}; nothing is tuned on these days.",
        f"It sells {leave}.",
        f"Costs are {rules.cost_bp:g} basis points per side, of the price.",
        "At most one position per asset at a time, with all of that asset's share of the capital; a yes meanwhile is "
        "lost. Assets have equal shares, rebalanced daily at no cost.",
        "No leverage, no short positions, no interest on cash, no dividends, no taxes.",
    )


def trade(
    bars: Bars, decision_days: np.ndarray, yes: np.ndarray, task: Threshold, rules: TradingRules
) -> StrategyReturns:
    """Follow a rule through one asset's bars.

    Args:
        bars: of the asset; nothing after the last decision day + h is used.
        decision_days: (S,) datetime64[D], increasing, each a day of the bars with h more behind it.
        yes: (S,) bool, known at each decision day's close.

    Returns:
        From the first decision day to h days after the last.

    Raises:
        ValueError: a task without a target above the close, or decision days that the bars lack.
    """
    if not applies(task):
        raise ValueError("a backtest needs a threshold task whose target lies above the close")
    place = np.searchsorted(bars.dates, decision_days)
    if len(place) == 0 or place[-1] + task.horizon >= len(bars) or (bars.dates[place] != decision_days).any():
        raise ValueError(f"{bars.symbol}: the bars lack decision days, or the {task.horizon} days behind the last")
    first, last = int(place[0]), int(place[-1]) + task.horizon
    says = np.zeros(len(bars), bool)
    says[place[yes]] = True
    growth, held = np.ones(last + 1), np.zeros(last + 1, bool)
    cost, trades, wins, at_target, day = rules.cost_bp / 1e4, 0, 0, 0, first
    while day <= last - task.horizon:
        target = bars.close[day] * (1 + task.threshold)
        price = bars.close[day] if rules.entry == "close" else bars.open[day + 1]
        if not says[day] or price >= target:
            day += 1
            continue
        out, exit_price = _exit(bars, day, target, task)
        marks = np.concatenate([[price], bars.close[day + 1 : out], [exit_price]])
        daily = marks[1:] / marks[:-1]
        daily[0] *= 1 - cost
        daily[-1] *= 1 - cost
        growth[day + 1 : out + 1] *= daily
        held[day + 1 : out + 1] = True
        trades, wins = trades + 1, wins + int(np.prod(daily) > 1)
        at_target += int(exit_price >= target)
        day = out  # its close may decide the next trade
    days = slice(first + 1, last + 1)
    return StrategyReturns(bars.dates[days], growth[days] - 1, held[days], trades, wins, at_target)


def _exit(bars: Bars, day: int, target: float, task: Threshold) -> tuple[int, float]:
    """The day a position ends, and at which price."""
    end = day + task.horizon
    if task.price == "high":
        reached = np.flatnonzero(bars.high[day + 1 : end + 1] >= target)
        if len(reached):
            out = day + 1 + int(reached[0])
            # A limit order fills at the open if the day opens above it; on an entry at the open it opened below.
            return out, float(max(target, bars.open[out]))
    return end, float(bars.close[end])


def buy_and_hold(bars: Bars, like: StrategyReturns, rules: TradingRules) -> StrategyReturns:
    """The asset over the very days of another ledger: bought at the close before them, costs at both ends."""
    place = np.searchsorted(bars.dates, like.dates)
    returns = bars.close[place] / bars.close[place - 1] - 1
    cost = rules.cost_bp / 1e4
    returns[0] = (1 + returns[0]) * (1 - cost) - 1
    returns[-1] = (1 + returns[-1]) * (1 - cost) - 1
    won = int(np.prod(1 + returns) > 1)
    return StrategyReturns(like.dates, returns, np.ones(len(returns), bool), 1, won, 0)


def portfolio(ledgers: list[StrategyReturns]) -> StrategyReturns:
    """Equal shares of the capital in every asset, over all their days; a day without bars of an asset earns it 0."""
    days = np.unique(np.concatenate([ledger.dates for ledger in ledgers]))
    returns, held = np.zeros(len(days)), np.zeros(len(days), bool)
    for ledger in ledgers:
        place = np.searchsorted(days, ledger.dates)
        returns[place] += ledger.returns / len(ledgers)
        held[place] |= ledger.held
    counts = [sum(getattr(ledger, name) for ledger in ledgers) for name in ("trades", "wins", "at_target")]
    return StrategyReturns(days, returns, held, *counts)


def performance(name: str, ledger: StrategyReturns) -> Performance:
    """A ledger in figures."""
    wealth = np.cumprod(1 + ledger.returns)
    n = len(wealth)
    spread = float(ledger.returns.std(ddof=1)) if n > 1 else 0.0
    peak = np.maximum.accumulate(np.concatenate([[1.0], wealth]))[1:]
    per_day = sharpe(ledger.returns)
    return Performance(
        name=name,
        days=n,
        trades=ledger.trades,
        win_rate=ledger.wins / ledger.trades if ledger.trades else None,
        exposure=float(ledger.held.mean()),
        total_return=float(wealth[-1] - 1),
        annual_return=float(wealth[-1] ** (YEAR / n) - 1),
        annual_volatility=spread * np.sqrt(YEAR),
        sharpe=None if per_day is None else per_day * np.sqrt(YEAR),
        max_drawdown=float(np.max(1 - wealth / peak)),
    )


def sharpe(returns: Floats) -> float | None:
    """Mean over SD of daily returns, per day; none where they never vary."""
    spread = float(np.std(returns, ddof=1)) if len(returns) > 1 else 0.0
    return float(np.mean(returns) / spread) if spread > 1e-15 else None


def deflated_sharpe(returns: Floats, *, n_trials: int, sharpe_variance: float) -> DeflatedSharpe | None:
    """The deflated Sharpe ratio (Bailey & López de Prado 2014, eq. 1 and 2); none where returns never vary.

    SR₀ = √V · ((1 − γ) Φ⁻¹(1 − 1/N) + γ Φ⁻¹(1 − 1/(N e))), the expected best of N worthless trials, and
    DSR = Φ((SR − SR₀) √(T − 1) / √(1 − γ₃ SR + (γ₄ − 1)/4 · SR²)), all per day, γ₃ skewness, γ₄ kurtosis.

    Args:
        returns: (T,) daily, of the chosen trial.
        n_trials: all that were tried, not those that are shown.
        sharpe_variance: V, variance of the trials' Sharpe ratios per day; 0: they are all alike.
    """
    per_day = sharpe(returns)
    if per_day is None:
        return None
    z = (returns - returns.mean()) / returns.std()
    return _deflated(
        per_day, len(returns), float(np.mean(z**3)), float(np.mean(z**4)), n_trials=n_trials, variance=sharpe_variance
    )


def _deflated(
    per_day: float, n: int, skewness: float, kurtosis: float, *, n_trials: int, variance: float
) -> DeflatedSharpe:
    from scipy.special import ndtr, ndtri

    if n_trials < 1 or variance < 0:
        raise ValueError(f"wanted at least one trial and a variance ≥ 0, got {n_trials} and {variance}")
    best = 0.0
    if n_trials > 1:
        far, further = ndtri(1 - 1 / n_trials), ndtri(1 - 1 / (n_trials * np.e))
        best = float(np.sqrt(variance) * ((1 - _EULER) * far + _EULER * further))
    error = np.sqrt(1 - skewness * per_day + (kurtosis - 1) / 4 * per_day**2)
    probability = float(ndtr((per_day - best) * np.sqrt(n - 1) / error))
    return DeflatedSharpe(probability, best * float(np.sqrt(YEAR)), n_trials)
