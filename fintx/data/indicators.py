"""How is an indicator computed? Causal building blocks on arrays: the value at t uses rows ≤ t, NaN while it warms up.

TA-Lib computes what it has; the rest is NumPy. Recursive indicators (DEMA, RSI, ADX, …) start at the first row.
"""

from __future__ import annotations

import numpy as np
import talib

from fintx.types import Floats

MAX_AGE_DAYS = 5
"""An as-of join takes no value older than this (calendar days): a long weekend, and no stale series."""


def lagged(x: Floats, k: int) -> Floats:
    """x[t − k]; NaN for the first k rows."""
    shifted = np.full(len(x), np.nan)
    shifted[k:] = x[: max(len(x) - k, 0)]
    return shifted


def rolling(x: Floats, n: int) -> Floats:
    """(T, n) of the last n values up to and with each row; NaN rows while there are fewer."""
    if len(x) == 0:
        return np.empty((0, n))
    padded = np.concatenate([np.full(n - 1, np.nan), x])
    return np.lib.stride_tricks.sliding_window_view(padded, n)


def rolling_mean(x: Floats, n: int) -> Floats:
    """Mean of the last n values."""
    return rolling(x, n).mean(axis=1)


def rolling_std(x: Floats, n: int) -> Floats:
    """Sample SD (n − 1) of the last n values; exactly 0 where they are equal, whatever their mean rounds to."""
    window = rolling(x, n)
    return np.where(np.ptp(window, axis=1) == 0, 0.0, window.std(axis=1, ddof=1))


def rolling_rank(x: Floats, n: int) -> Floats:
    """Share of the last n values that are no larger than the newest, in (0, 1]."""
    window = rolling(x, n)
    rank = (window <= window[:, -1:]).mean(axis=1)
    return np.where(np.isnan(window).any(axis=1), np.nan, rank)


def log_return(close: Floats, k: int) -> Floats:
    """ln(close[t] / close[t − k])."""
    return np.log(close / lagged(close, k))


def realized_vol(close: Floats, n: int) -> Floats:
    """√(mean of the last n squared daily log returns), per day."""
    return np.sqrt(rolling_mean(np.square(log_return(close, 1)), n))


def parkinson_vol(high: Floats, low: Floats, n: int) -> Floats:
    """Parkinson 1980: √(mean of ln(high/low)² / (4 ln 2)) over n days, per day."""
    return np.sqrt(rolling_mean(np.square(np.log(high / low)), n) / (4 * np.log(2)))


def garman_klass_vol(open: Floats, high: Floats, low: Floats, close: Floats, n: int) -> Floats:
    """Garman & Klass 1980: √(mean of ½ ln(high/low)² − (2 ln 2 − 1) ln(close/open)²) over n days, per day."""
    daily = 0.5 * np.square(np.log(high / low)) - (2 * np.log(2) - 1) * np.square(np.log(close / open))
    return np.sqrt(rolling_mean(daily, n))


def dema(close: Floats, n: int) -> Floats:
    """Double exponential moving average (Mulloy 1994)."""
    return talib.DEMA(close, timeperiod=n)


def rsi(close: Floats, n: int) -> Floats:
    """Relative strength index with Wilder's smoothing, 0 … 100."""
    return talib.RSI(close, timeperiod=n)


def stoch_rsi(close: Floats) -> Floats:
    """Fast %K over 5 of the RSI over 14, 0 … 100 (TA-Lib STOCHRSI 14, 5, 3; its %D is left out)."""
    return talib.STOCHRSI(close, timeperiod=14, fastk_period=5, fastd_period=3)[0]


def macd(close: Floats) -> Floats:
    """MACD line: EMA 12 − EMA 26."""
    return talib.MACD(close, fastperiod=12, slowperiod=26, signalperiod=9)[0]


def bollinger_b(close: Floats, n: int, width: float) -> Floats:
    """%B: where the close lies between the bands of n days and `width` SDs; 0 at the lower, 1 at the upper."""
    upper, _, lower = talib.BBANDS(close, timeperiod=n, nbdevup=width, nbdevdn=width)
    with np.errstate(divide="ignore", invalid="ignore"):
        position = (close - lower) / (upper - lower)
    return np.where(upper == lower, 0.5, position)


def vwap(high: Floats, low: Floats, close: Floats, volume: Floats, n: int) -> Floats:
    """Volume-weighted mean of the typical price over n days; the plain mean where there was no volume."""
    typical = (high + low + close) / 3
    traded = rolling_mean(volume, n)
    with np.errstate(divide="ignore", invalid="ignore"):
        weighted = rolling_mean(typical * volume, n) / traded
    return np.where(traded == 0, rolling_mean(typical, n), weighted)


def volume_ratio(volume: Floats, n: int) -> Floats:
    """ln(volume / its mean over n days, this one included); 0 on days without volume and for series that have none."""
    mean = rolling_mean(volume, n)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.log(volume / mean)
    return np.where((volume <= 0) & ~np.isnan(mean), 0.0, ratio)


def weekly(dates: np.ndarray, close: Floats, indicator) -> Floats:
    """An indicator of weekly closes, as known on each day: of the last week that is over.

    A week (Monday to Sunday) is over at the first bar of a later one: on a Friday nobody knows without a holiday
    calendar that it was the week's last. So a day never sees its own week.
    """
    if len(dates) == 0:
        return np.empty(0)
    week = (dates.astype("datetime64[D]").astype(np.int64) + 3) // 7  # 1970-01-01 was a Thursday
    ends = np.flatnonzero(np.append(week[1:] != week[:-1], True))
    values = indicator(np.ascontiguousarray(close[ends]))
    ordinal = np.searchsorted(ends, np.arange(len(week)))  # which of the weeks present a day lies in
    return np.where(ordinal > 0, values[np.maximum(ordinal - 1, 0)], np.nan)


def as_of(dates: np.ndarray, source_dates: np.ndarray, values: Floats) -> Floats:
    """The newest value dated at or before each date, at most MAX_AGE_DAYS old; else NaN."""
    if len(source_dates) == 0:
        return np.full(len(dates), np.nan)
    place = np.searchsorted(source_dates, dates, side="right") - 1
    there = place >= 0
    place = np.maximum(place, 0)
    fresh = (dates - source_dates[place]).astype("timedelta64[D]").astype(int) <= MAX_AGE_DAYS
    return np.where(there & fresh, values[place], np.nan)
