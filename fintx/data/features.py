"""Features: named causal inputs made from an asset's bars; the value at t uses rows ≤ t alone.

Prices are taken as traded (unadjusted for dividends), as the labels are. A feature is one entry of `FEATURES`, which
states what it needs; the sets are spelled out below it, so that a new feature changes none of them. TA-Lib computes the
indicators that it has; the rest is NumPy. Values are NaN while they warm up; recursive indicators (DEMA, RSI, ADX, …)
start at the first row. The tests cut off and replace the future of every feature.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import talib

from fintx.data.bars import Bars
from fintx.errors import FintxError
from fintx.types import Floats

VIX = "VIX"
"""The context symbol that the vix_… features read."""
MAX_AGE_DAYS = 5
"""An as-of join takes no value older than this (calendar days): a long weekend, and no stale series."""
MAX_UNOPENED = 0.7
"""A source whose opens equal the close before on more days than this, in its worst year, has no usable gaps.

Measured: stocks priced in eighths of a dollar reach 0.54, stale opens of Yahoo's 0.84, the S&P 500 before 2006 0.96.
A share of the whole history separates them less well: good years dilute bad ones.
"""
_YEAR_OF_BARS = 250
_TRADING_DAYS = 252


class UnknownFeature(FintxError):
    """A name that is neither a feature nor a set, or one whose series is missing."""


Need = Literal["volume", "gaps", "VIX"]
"""Of the bars: volumes that aren't all 0, opens that are prices of their own (`has_gaps`). VIX: in the context."""


@dataclass(frozen=True)
class Feature:
    """An input of the model: how it is computed, and what it needs."""

    description: str
    function: Callable[[Bars, Floats], Floats]
    """(bars, VIX closes as of each bar) → (T,)."""
    warm_up: int = 0
    """Rows at most before its first value."""
    needs: tuple[Need, ...] = ()


def resolve(
    names: tuple[str, ...],
    *,
    context: tuple[str, ...],
    gaps: bool | None = None,
    gapless_context: tuple[str, ...] = (),
) -> tuple[str, ...]:
    """Expand sets, in order.

    Args:
        names: features, sets, or SYM:feature for a feature of a context symbol's own bars.
        context: the context symbols available.
        gaps: whether every asset's opens are prices of their own (`has_gaps`): if so `stationary` includes `gap`, if
            not, features that need gaps are refused. None: not known yet.
        gapless_context: context symbols whose opens are not: SYM:gap is refused.

    Raises:
        UnknownFeature: unknown names with the nearest valid ones, missing series, or a feature named twice.
    """
    resolved: list[str] = []
    for name in names:
        resolved += SETS.get(name, (name,))
        if name == "stationary":
            resolved += [*(("gap",) if gaps else ()), *(SETS["stationary_vix"] if VIX in context else ())]
    for name in resolved:
        _check_name(name, context)
        symbol, _, own = name.rpartition(":")
        gapless = symbol in gapless_context if symbol else gaps is False
        if gapless and "gaps" in FEATURES[own].needs:
            raise UnknownFeature(
                f'data.features: "{name}" means nothing where the open equals the close before on more than '
                f"{MAX_UNOPENED:.0%} of a year's days (an index's first print); take it out or set a later data.start"
            )
    twice = sorted({name for name in resolved if resolved.count(name) > 1})
    if twice:
        raise UnknownFeature(f"data.features: {', '.join(twice)} named twice (a set may hold it); take one out")
    return tuple(resolved)


def _check_name(name: str, context: tuple[str, ...]) -> None:
    symbol, colon, own = name.rpartition(":")
    if colon and symbol not in context:
        there = ", ".join(context) or "none"
        raise UnknownFeature(f'data.features: "{name}" needs {symbol or "SYM:"} in data.context (there: {there})')
    if colon and (own in SETS or (own in FEATURES and "VIX" in FEATURES[own].needs)):
        raise UnknownFeature(
            f'data.features: "{name}" does not exist: SYM: goes before a single feature of own bars; say "{own}"'
        )
    if own not in FEATURES:
        near = difflib.get_close_matches(own, [*FEATURES, *SETS], n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else f"; sets are {', '.join(SETS)}"
        raise UnknownFeature(f'data.features: "{name}" is no feature or set{hint}')
    if "VIX" in FEATURES[own].needs and VIX not in context:
        raise UnknownFeature(f'data.features: "{name}" needs VIX: bring it in and set data.context = ["VIX"]')


def needing(need: Need, names: tuple[str, ...]) -> list[str]:
    """Those of the resolved names that need it of the asset's own bars."""
    return [name for name in names if ":" not in name and need in FEATURES[name].needs]


def slowest(names: tuple[str, ...]) -> tuple[str, int]:
    """The resolved name with the longest warm-up, and its rows."""
    return max(((name, FEATURES[name.rpartition(":")[2]].warm_up) for name in names), key=lambda pair: pair[1])


def compute(names: tuple[str, ...], bars: Bars, context: Mapping[str, Bars]) -> Floats:
    """The features of one asset.

    Args:
        names: resolved names.
        bars: the asset's, oldest first.
        context: bars of the context symbols; joined as of each of the asset's days.

    Returns:
        (T, F) float64; NaN while a feature warms up, or where its context has no value of the last days.
    """
    vix = np.full(len(bars), np.nan)
    if VIX in context:
        vix = as_of(bars.dates, context[VIX].dates, context[VIX].close)
    columns = []
    for name in names:
        symbol, _, own = name.rpartition(":")
        if symbol:
            other = context[symbol]
            values = FEATURES[own].function(other, np.full(len(other), np.nan))
            columns.append(as_of(bars.dates, other.dates, values))
        else:
            columns.append(FEATURES[own].function(bars, vix))
    return np.stack(columns, axis=1)


def has_gaps(bars: Bars) -> bool:
    """Whether opens are prices of their own: an index's first print often is the close before."""
    unopened = (bars.open[1:] == bars.close[:-1]).astype(float)
    by_year = rolling_mean(unopened, min(_YEAR_OF_BARS, max(len(unopened), 1)))
    return not bool((by_year > MAX_UNOPENED).any())


# --- building blocks --------------------------------------------------------------------------------------------------


def lagged(x: Floats, k: int) -> Floats:
    """x[t − k]; NaN for the first k rows."""
    shifted = np.full(len(x), np.nan)
    shifted[k:] = x[: max(len(x) - k, 0)]
    return shifted


def rolling(x: Floats, n: int) -> Floats:
    """(T, n) of the last n values up to and with each row; NaN rows while there are fewer."""
    if len(x) == 0:
        return np.empty((0, n))
    return np.lib.stride_tricks.sliding_window_view(np.concatenate([np.full(n - 1, np.nan), x]), n)


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
    return np.where(np.isnan(window).any(axis=1), np.nan, (window <= window[:, -1:]).mean(axis=1))


def ratio(numerator: Floats, denominator: Floats, otherwise: float | Floats = 0.0) -> Floats:
    """numerator / denominator; `otherwise` where the denominator is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(denominator == 0, otherwise, numerator / denominator)


def log_return(close: Floats, k: int) -> Floats:
    """ln(close[t] / close[t − k])."""
    return np.log(close / lagged(close, k))


def realized_vol(close: Floats, n: int) -> Floats:
    """√(mean of the last n squared daily log returns), per day."""
    return np.sqrt(rolling_mean(np.square(log_return(close, 1)), n))


def parkinson_vol(bars: Bars, n: int) -> Floats:
    """Parkinson 1980: √(mean of ln(high/low)² / (4 ln 2)) over n days, per day."""
    return np.sqrt(rolling_mean(np.square(np.log(bars.high / bars.low)), n) / (4 * np.log(2)))


def garman_klass_vol(bars: Bars, n: int) -> Floats:
    """Garman & Klass 1980: √(mean of ½ ln(high/low)² − (2 ln 2 − 1) ln(close/open)²) over n days, per day."""
    high_low, close_open = np.log(bars.high / bars.low), np.log(bars.close / bars.open)
    return np.sqrt(rolling_mean(0.5 * np.square(high_low) - (2 * np.log(2) - 1) * np.square(close_open), n))


def macd(close: Floats) -> Floats:
    """MACD line: EMA 12 − EMA 26."""
    return talib.MACD(close, fastperiod=12, slowperiod=26, signalperiod=9)[0]


def stoch_rsi(close: Floats) -> Floats:
    """Fast %K over 5 of the RSI over 14, 0 … 100 (TA-Lib STOCHRSI 14, 5, 3; its %D is left out)."""
    return talib.STOCHRSI(close, timeperiod=14, fastk_period=5, fastd_period=3)[0]


def bollinger_b(close: Floats, n: int, width: float) -> Floats:
    """%B: where the close lies between the bands of n days and `width` SDs; 0 at the lower, 1 at the upper."""
    upper, _, lower = talib.BBANDS(close, timeperiod=n, nbdevup=width, nbdevdn=width)
    return ratio(close - lower, upper - lower, 0.5)


def vwap(bars: Bars, n: int) -> Floats:
    """Volume-weighted mean of the typical price over n days; the plain mean where there was no volume."""
    typical = (bars.high + bars.low + bars.close) / 3
    return ratio(rolling_mean(typical * bars.volume, n), rolling_mean(bars.volume, n), rolling_mean(typical, n))


def volume_ratio(volume: Floats, n: int) -> Floats:
    """ln(volume / its mean over n days, this one included); 0 on days without volume and for series that have none."""
    mean = rolling_mean(volume, n)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((volume <= 0) & ~np.isnan(mean), 0.0, np.log(volume / mean))


def weekly(dates: np.ndarray, close: Floats, indicator: Callable[[Floats], Floats]) -> Floats:
    """An indicator of weekly closes, as known on each day: of the last complete week.

    A week (Monday to Sunday) is complete at the first bar of a later one: on a Friday nobody knows without a holiday
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
    newest = np.searchsorted(source_dates, dates, side="right") - 1
    row = np.maximum(newest, 0)
    fresh = (dates - source_dates[row]).astype("timedelta64[D]").astype(int) <= MAX_AGE_DAYS
    return np.where((newest >= 0) & fresh, values[row], np.nan)


def _weekly_rsi(b: Bars) -> Floats:
    return weekly(b.dates, b.close, lambda close: talib.RSI(close, 14))


def _atr(b: Bars) -> Floats:
    return talib.ATR(b.high, b.low, b.close, timeperiod=14)


def _adx(b: Bars) -> Floats:
    return talib.ADX(b.high, b.low, b.close, timeperiod=14)


def _weekday_angle(b: Bars) -> Floats:
    return 2 * np.pi * ((b.dates.astype(np.int64) + 3) % 7).astype(float) / 7


def _month_angle(b: Bars) -> Floats:
    return 2 * np.pi * (b.dates.astype("datetime64[M]").astype(np.int64) % 12).astype(float) / 12


def _annual_vol(b: Bars) -> Floats:
    return np.maximum(realized_vol(b.close, 21) * np.sqrt(_TRADING_DAYS), 1e-4)


def _over(n: int, function: Callable[[Bars, int], Floats]) -> Callable[[Bars, Floats], Floats]:
    """A feature's function over n days: a lambda made in a loop would take the loop's last n."""
    return lambda bars, _: function(bars, n)


def _of_vix(description: str, function: Callable[[Floats], Floats], warm_up: int = 0) -> Feature:
    return Feature(description, lambda _, vix: function(vix), warm_up, ("VIX",))


# --- features and sets ------------------------------------------------------------------------------------------------

FEATURES: dict[str, Feature] = {
    # levels
    "open": Feature("open, as traded", lambda b, _: b.open.copy()),
    "high": Feature("high, as traded", lambda b, _: b.high.copy()),
    "low": Feature("low, as traded", lambda b, _: b.low.copy()),
    "close": Feature("close, as traded", lambda b, _: b.close.copy()),
    "volume": Feature("volume, as traded", lambda b, _: b.volume.copy(), 0, ("volume",)),
    **{f"dema_{n}": Feature(
        f"double EMA of the close, {n} days", _over(n, lambda b, n: talib.DEMA(b.close, n)), 2 * n - 2)
       for n in (9, 10, 20, 25, 90)},
    **{f"sma_{n}": Feature(f"mean close of {n} days", _over(n, lambda b, n: rolling_mean(b.close, n)), n - 1)
       for n in (12, 50, 100, 200)},
    "vwap_20": Feature("volume-weighted typical price, 20 days", lambda b, _: vwap(b, 20), 19, ("volume",)),
    # oscillators
    "rsi_14": Feature("RSI of 14 days, 0 … 100", lambda b, _: talib.RSI(b.close, 14), 14),
    "weekly_rsi_14": Feature("RSI of 14 complete weeks", lambda b, _: _weekly_rsi(b), 75),
    "stochrsi_14": Feature("StochRSI (14, 5, 3) fast %K, 0 … 100", lambda b, _: stoch_rsi(b.close), 20),
    "weekly_stochrsi_14": Feature(
        "StochRSI of complete weeks, 0 … 100", lambda b, _: weekly(b.dates, b.close, stoch_rsi), 105),
    "macd": Feature("MACD line (12, 26), in price units", lambda b, _: macd(b.close), 33),
    "obv": Feature("on-balance volume since the first bar", lambda b, _: talib.OBV(b.close, b.volume), 0, ("volume",)),
    "adosc_3_10": Feature(
        "Chaikin oscillator (3, 10)",
        lambda b, _: talib.ADOSC(b.high, b.low, b.close, b.volume, 3, 10), 9, ("volume",)),
    "atr_14": Feature("average true range, 14 days", lambda b, _: _atr(b), 14),
    "adx_14": Feature("directional movement index, 14 days, 0 … 100", lambda b, _: _adx(b), 27),
    "bollinger_b_20": Feature("Bollinger %B (20, 2)", lambda b, _: bollinger_b(b.close, 20, 2.0), 19),
    # independent of the price's level
    **{f"log_return_{k}": Feature(f"log return of {k} day{'s' if k > 1 else ''}", _over(
           k, lambda b, k: log_return(b.close, k)), k)
       for k in (1, 2, 5, 10, 21, 63)},
    **{f"realized_vol_{n}": Feature(
        f"realised volatility per day, {n} days", _over(n, lambda b, n: realized_vol(b.close, n)), n)
       for n in (5, 21, 63)},
    "parkinson_vol_21": Feature("Parkinson volatility per day, 21 days", lambda b, _: parkinson_vol(b, 21), 20),
    "garman_klass_vol_21": Feature(
        "Garman–Klass volatility per day, 21 days", lambda b, _: garman_klass_vol(b, 21), 20),
    "range": Feature("ln(high / low)", lambda b, _: np.log(b.high / b.low)),
    "close_in_range": Feature(
        "where the close lies in the day's range, 0 … 1", lambda b, _: ratio(b.close - b.low, b.high - b.low, 0.5)),
    "gap": Feature(
        "ln(open / close before); refused for an index whose open is that close",
        lambda b, _: np.log(b.open / lagged(b.close, 1)), 1, ("gaps",)),
    **{f"sma_distance_{n}": Feature(
        f"ln(close / mean close of {n} days)", _over(n, lambda b, n: np.log(b.close / rolling_mean(b.close, n))), n - 1)
       for n in (20, 50, 200)},
    "rsi_14_centered": Feature("RSI of 14 days, −1 … 1", lambda b, _: talib.RSI(b.close, 14) / 50 - 1, 14),
    "weekly_rsi_14_centered": Feature("RSI of 14 complete weeks, −1 … 1", lambda b, _: _weekly_rsi(b) / 50 - 1, 75),
    "stochrsi_14_centered": Feature("StochRSI fast %K, −1 … 1", lambda b, _: stoch_rsi(b.close) / 50 - 1, 20),
    "macd_in_atr": Feature("MACD line / ATR 14", lambda b, _: ratio(macd(b.close), _atr(b)), 33),
    "adx_14_scaled": Feature("ADX 14, 0 … 1", lambda b, _: _adx(b) / 100, 27),
    **{f"volume_ratio_{n}": Feature(
        f"ln(volume / its mean of {n} days)", _over(n, lambda b, n: volume_ratio(b.volume, n)), n - 1, ("volume",))
       for n in (20, 63)},
    "weekday_sin": Feature("day of the week on a circle", lambda b, _: np.sin(_weekday_angle(b))),
    "weekday_cos": Feature("day of the week on a circle", lambda b, _: np.cos(_weekday_angle(b))),
    "month_sin": Feature("month on a circle", lambda b, _: np.sin(_month_angle(b))),
    "month_cos": Feature("month on a circle", lambda b, _: np.cos(_month_angle(b))),
    # of VIX
    "vix_close": _of_vix("VIX", np.copy),
    "vix_sma_10": _of_vix("mean VIX of 10 days", lambda v: rolling_mean(v, 10), 9),
    "vix_sma_20": _of_vix("mean VIX of 20 days", lambda v: rolling_mean(v, 20), 19),
    "vix_percentile_60": _of_vix("share of 60 days with a VIX no higher", lambda v: rolling_rank(v, 60), 59),
    "vix_zscore_20": _of_vix(
        "(VIX − mean) / SD of 20 days", lambda v: ratio(v - rolling_mean(v, 20), rolling_std(v, 20)), 19),
    "vix_regime": _of_vix(
        "0 below 15, 1 below 25, 2 from there",
        lambda v: np.where(np.isnan(v), np.nan, (v >= 15).astype(float) + (v >= 25))),
    "vix_change_1": _of_vix("VIX / VIX a day before − 1", lambda v: v / lagged(v, 1) - 1, 1),
    "vix_change_5": _of_vix("VIX / VIX 5 days before − 1", lambda v: v / lagged(v, 5) - 1, 5),
    "vix_log": _of_vix("ln VIX", np.log),
    "vix_log_change_1": _of_vix("change of ln VIX in a day", lambda v: log_return(v, 1), 1),
    "vix_log_change_5": _of_vix("change of ln VIX in 5 days", lambda v: log_return(v, 5), 5),
    "vix_sma_distance_20": _of_vix("ln(VIX / its mean of 20 days)", lambda v: np.log(v / rolling_mean(v, 20)), 19),
    "vix_percentile_252": _of_vix("share of 252 days with a VIX no higher", lambda v: rolling_rank(v, 252), 251),
    "vix_realized_gap": Feature(
        "ln(VIX / realised volatility of 21 days, annual)",
        lambda b, v: np.log(v / 100 / _annual_vol(b)), 21, ("VIX",)),
    "variance_risk_premium": Feature(
        "(VIX/100)² − realised variance of 21 days, annual (Bollerslev, Tauchen & Zhou 2009)",
        lambda b, v: np.square(v / 100) - np.square(_annual_vol(b)), 21, ("VIX",)),
}  # fmt: skip

_A20 = (
    "dema_9", "dema_10", "dema_20", "dema_25", "dema_90", "sma_12", "sma_50", "sma_100", "sma_200", "rsi_14",
    "weekly_rsi_14", "stochrsi_14", "weekly_stochrsi_14", "macd", "obv", "adosc_3_10", "atr_14", "adx_14",
    "bollinger_b_20", "vwap_20",
)  # fmt: skip
SETS: dict[str, tuple[str, ...]] = {
    "stationary": (
        "log_return_1", "log_return_2", "log_return_5", "log_return_10", "log_return_21", "log_return_63",
        "realized_vol_5", "realized_vol_21", "realized_vol_63", "parkinson_vol_21", "garman_klass_vol_21", "range",
        "close_in_range", "sma_distance_20", "sma_distance_50", "sma_distance_200", "rsi_14_centered",
        "weekly_rsi_14_centered", "stochrsi_14_centered", "macd_in_atr", "adx_14_scaled", "volume_ratio_20",
        "volume_ratio_63", "weekday_sin", "weekday_cos", "month_sin", "month_cos", "bollinger_b_20",
    ),
    "stationary_vix": (
        "vix_log", "vix_log_change_1", "vix_log_change_5", "vix_sma_distance_20", "vix_percentile_252",
        "vix_realized_gap", "variance_risk_premium",
    ),
    "a20": _A20,
    "a25": ("open", "high", "low", "close", "volume", *_A20),
    "vix8": (
        "vix_close", "vix_sma_10", "vix_sma_20", "vix_percentile_60", "vix_zscore_20", "vix_regime", "vix_change_1",
        "vix_change_5",
    ),
}  # fmt: skip
"""a20, a25 and vix8 are those of the earlier PyTorch study, for comparison; levels drift, so `stationary` is the
default. `stationary` includes `gap` where opens are prices of their own, and `stationary_vix` where VIX is in the
context. A published set never changes: studies are compared by its name."""
