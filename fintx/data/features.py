"""Features: named causal inputs made of an asset's bars; the value at t uses rows ≤ t alone.

Prices are taken as traded (unadjusted for dividends), as the labels are. A feature is one entry of `FEATURES`, which
says what it needs; the sets are spelled out below, so that another feature changes none. The tests cut off and replace
the future of every one.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import talib

from fintx.data import indicators as ind
from fintx.data.bars import Bars
from fintx.errors import FintxError
from fintx.types import Floats

VIX = "VIX"
"""The context symbol that the vix_… features read."""
_TRADING_DAYS = 252
_YEAR_OF_BARS = 250
MAX_UNOPENED = 0.7
"""A source whose opens equal the close before on more days than this, in its worst year, has no gaps to speak of.

Measured: stocks priced in eighths of a dollar reach 0.54, stale opens of Yahoo's 0.84, the S&P 500 before 2006 0.96.
A share of the whole history tells them less well: good years thin bad ones out.
"""


class UnknownFeature(FintxError):
    """A name that is neither a feature nor a set, or one whose series is missing."""


Need = Literal["volume", "gaps", "VIX"]
"""Of the bars: volumes that aren't all 0, opens that are prices of their own (`has_gaps`). VIX: in the context."""


@dataclass(frozen=True)
class Feature:
    """A named input."""

    words: str
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
        context: the context symbols at hand.
        gaps: whether every asset's opens are prices of their own (`has_gaps`): then `stationary` takes `gap` along,
            and where they are not what needs gaps is refused. None: not known yet.
        gapless_context: context symbols whose opens are not: SYM:gap is refused.

    Raises:
        UnknownFeature: unknown names with the nearest valid ones, missing series, or a feature named twice.
    """
    found: list[str] = []
    for name in names:
        if name == "stationary":
            found += SETS["stationary"] + (("gap",) if gaps else ())
            found += SETS["stationary_vix"] if VIX in context else ()
        elif name in SETS:
            found += SETS[name]
        else:
            found.append(name)
    for name in found:
        _check(name, context)
    for name in found:
        symbol, _, own = name.rpartition(":")
        gapless = symbol in gapless_context if symbol else gaps is False
        if gapless and "gaps" in FEATURES[own].needs:
            raise UnknownFeature(
                f'data.features: "{name}" means nothing where the open equals the close before on more than '
                f"{MAX_UNOPENED:.0%} of a year's days (an index's first print); take it out or set a later data.start"
            )
    twice = sorted({name for name in found if found.count(name) > 1})
    if twice:
        raise UnknownFeature(f"data.features: {', '.join(twice)} named twice (a set may hold it); take one out")
    return tuple(found)


def _check(name: str, context: tuple[str, ...]) -> None:
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

    Raises:
        UnknownFeature: an unknown name, or one whose context is missing.
    """
    vix = np.full(len(bars), np.nan)
    if VIX in context:
        vix = ind.as_of(bars.dates, context[VIX].dates, context[VIX].close)
    columns = []
    for name in names:
        _check(name, tuple(context))
        symbol, _, own = name.rpartition(":")
        if symbol:
            other = context[symbol]
            values = FEATURES[own].function(other, np.full(len(other), np.nan))
            columns.append(ind.as_of(bars.dates, other.dates, values))
        else:
            columns.append(FEATURES[own].function(bars, vix))
    return np.stack(columns, axis=1)


# --- what there is ----------------------------------------------------------------------------------------------------


def has_gaps(bars: Bars) -> bool:
    """Whether opens are prices of their own: an index's first print often is the close before."""
    unopened = (bars.open[1:] == bars.close[:-1]).astype(float)
    worst_year = ind.rolling_mean(unopened, min(_YEAR_OF_BARS, max(len(unopened), 1)))
    return not bool((worst_year > MAX_UNOPENED).any())


def _close_in_range(bars: Bars, _: Floats) -> Floats:
    width = bars.high - bars.low
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(width == 0, 0.5, (bars.close - bars.low) / width)


def _macd_in_atr(bars: Bars, _: Floats) -> Floats:
    atr = talib.ATR(bars.high, bars.low, bars.close, timeperiod=14)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(atr == 0, 0.0, ind.macd(bars.close) / atr)


def _cycle(position: Floats, period: float, function: Callable[[Floats], Floats]) -> Floats:
    return function(2 * np.pi * position / period)


def _weekday(bars: Bars) -> Floats:
    return ((bars.dates.astype(np.int64) + 3) % 7).astype(float)


def _month(bars: Bars) -> Floats:
    return (bars.dates.astype("datetime64[M]").astype(np.int64) % 12).astype(float)


def _vix_regime(_: Bars, vix: Floats) -> Floats:
    return np.where(np.isnan(vix), np.nan, (vix >= 15).astype(float) + (vix >= 25))


def _annual_vol(bars: Bars) -> Floats:
    return np.maximum(ind.realized_vol(bars.close, 21) * np.sqrt(_TRADING_DAYS), 1e-4)


def _with(value: Any, function: Callable[[Bars, Any], Floats]) -> Callable[[Bars, Floats], Floats]:
    """A feature's function with its span (or column) bound, whatever the loop variable becomes."""
    return lambda bars, _: function(bars, value)


def _ratio(numerator: Floats, denominator: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(denominator == 0, 0.0, numerator / denominator)


def _weekly_rsi(bars: Bars) -> Floats:
    return ind.weekly(bars.dates, bars.close, lambda close: ind.rsi(close, 14))


FEATURES: dict[str, Feature] = {
    # levels
    **{
        name: Feature(
            f"{name}, as traded",
            _with(name, lambda b, column: getattr(b, column).copy()),
            needs=("volume",) if name == "volume" else (),
        )
        for name in ("open", "high", "low", "close", "volume")
    },
    **{
        f"dema_{n}": Feature(
            f"double EMA of the close, {n} days", _with(n, lambda b, n: ind.dema(b.close, n)), 2 * n - 2
        )
        for n in (9, 10, 20, 25, 90)
    },
    **{
        f"sma_{n}": Feature(f"mean close of {n} days", _with(n, lambda b, n: ind.rolling_mean(b.close, n)), n - 1)
        for n in (12, 50, 100, 200)
    },
    "vwap_20": Feature(
        "volume-weighted typical price, 20 days",
        lambda b, _: ind.vwap(b.high, b.low, b.close, b.volume, 20),
        19,
        ("volume",),
    ),
    # oscillators
    "rsi_14": Feature("RSI of 14 days, 0 … 100", lambda b, _: ind.rsi(b.close, 14), 14),
    "weekly_rsi_14": Feature("RSI of 14 weeks that are over", lambda b, _: _weekly_rsi(b), 75),
    "stochrsi_14": Feature("StochRSI (14, 5, 3) fast %K, 0 … 100", lambda b, _: ind.stoch_rsi(b.close), 20),
    "weekly_stochrsi_14": Feature(
        "the same of weeks that are over", lambda b, _: ind.weekly(b.dates, b.close, ind.stoch_rsi), 105
    ),
    "macd": Feature("MACD line (12, 26), in price units", lambda b, _: ind.macd(b.close), 33),
    "obv": Feature(
        "on-balance volume since the first bar", lambda b, _: talib.OBV(b.close, b.volume), needs=("volume",)
    ),
    "adosc_3_10": Feature(
        "Chaikin oscillator (3, 10)",
        lambda b, _: talib.ADOSC(b.high, b.low, b.close, b.volume, fastperiod=3, slowperiod=10),
        9,
        ("volume",),
    ),
    "atr_14": Feature("average true range, 14 days", lambda b, _: talib.ATR(b.high, b.low, b.close, timeperiod=14), 14),
    "adx_14": Feature(
        "directional movement index, 14 days, 0 … 100",
        lambda b, _: talib.ADX(b.high, b.low, b.close, timeperiod=14),
        27,
    ),
    "bollinger_b_20": Feature("Bollinger %B (20, 2)", lambda b, _: ind.bollinger_b(b.close, 20, 2.0), 19),
    # free of the price's level
    **{
        f"log_return_{k}": Feature(f"log return of {k} days", _with(k, lambda b, k: ind.log_return(b.close, k)), k)
        for k in (1, 2, 5, 10, 21, 63)
    },
    **{
        f"realized_vol_{n}": Feature(
            f"realised volatility per day, {n} days", _with(n, lambda b, n: ind.realized_vol(b.close, n)), n
        )
        for n in (5, 21, 63)
    },
    "parkinson_vol_21": Feature(
        "Parkinson volatility per day, 21 days", lambda b, _: ind.parkinson_vol(b.high, b.low, 21), 20
    ),
    "garman_klass_vol_21": Feature(
        "Garman–Klass volatility per day, 21 days",
        lambda b, _: ind.garman_klass_vol(b.open, b.high, b.low, b.close, 21),
        20,
    ),
    "range": Feature("ln(high / low)", lambda b, _: np.log(b.high / b.low)),
    "close_in_range": Feature("where the close lies in the day's range, 0 … 1", _close_in_range),
    "gap": Feature(
        "ln(open / close before); refused for an index whose open is that close",
        lambda b, _: np.log(b.open / ind.lagged(b.close, 1)),
        1,
        ("gaps",),
    ),
    **{
        f"sma_distance_{n}": Feature(
            f"ln(close / mean close of {n} days)",
            _with(n, lambda b, n: np.log(b.close / ind.rolling_mean(b.close, n))),
            n - 1,
        )
        for n in (20, 50, 200)
    },
    "rsi_14_centered": Feature("RSI of 14 days, −1 … 1", lambda b, _: ind.rsi(b.close, 14) / 50 - 1, 14),
    "weekly_rsi_14_centered": Feature(
        "RSI of 14 weeks that are over, −1 … 1", lambda b, _: _weekly_rsi(b) / 50 - 1, 75
    ),
    "stochrsi_14_centered": Feature("StochRSI fast %K, −1 … 1", lambda b, _: ind.stoch_rsi(b.close) / 50 - 1, 20),
    "macd_in_atr": Feature("MACD line / ATR 14", _macd_in_atr, 33),
    "adx_14_scaled": Feature("ADX 14, 0 … 1", lambda b, _: talib.ADX(b.high, b.low, b.close, timeperiod=14) / 100, 27),
    **{
        f"volume_ratio_{n}": Feature(
            f"ln(volume / its mean of {n} days)",
            _with(n, lambda b, n: ind.volume_ratio(b.volume, n)),
            n - 1,
            ("volume",),
        )
        for n in (20, 63)
    },
    "weekday_sin": Feature("day of the week on a circle", lambda b, _: _cycle(_weekday(b), 7, np.sin)),
    "weekday_cos": Feature("day of the week on a circle", lambda b, _: _cycle(_weekday(b), 7, np.cos)),
    "month_sin": Feature("month on a circle", lambda b, _: _cycle(_month(b), 12, np.sin)),
    "month_cos": Feature("month on a circle", lambda b, _: _cycle(_month(b), 12, np.cos)),
    # of VIX
    "vix_close": Feature("VIX", lambda _, v: v.copy(), 0, ("VIX",)),
    "vix_sma_10": Feature("mean VIX of 10 days", lambda _, v: ind.rolling_mean(v, 10), 9, ("VIX",)),
    "vix_sma_20": Feature("mean VIX of 20 days", lambda _, v: ind.rolling_mean(v, 20), 19, ("VIX",)),
    "vix_percentile_60": Feature(
        "share of 60 days with a VIX no higher", lambda _, v: ind.rolling_rank(v, 60), 59, ("VIX",)
    ),
    "vix_zscore_20": Feature(
        "(VIX − mean) / SD of 20 days",
        lambda _, v: _ratio(v - ind.rolling_mean(v, 20), ind.rolling_std(v, 20)),
        19,
        ("VIX",),
    ),
    "vix_regime": Feature("0 below 15, 1 below 25, 2 from there", _vix_regime, 0, ("VIX",)),
    "vix_change_1": Feature("VIX / VIX a day before − 1", lambda _, v: v / ind.lagged(v, 1) - 1, 1, ("VIX",)),
    "vix_change_5": Feature("VIX / VIX 5 days before − 1", lambda _, v: v / ind.lagged(v, 5) - 1, 5, ("VIX",)),
    "vix_log": Feature("ln VIX", lambda _, v: np.log(v), 0, ("VIX",)),
    "vix_log_change_1": Feature("change of ln VIX in a day", lambda _, v: ind.log_return(v, 1), 1, ("VIX",)),
    "vix_log_change_5": Feature("change of ln VIX in 5 days", lambda _, v: ind.log_return(v, 5), 5, ("VIX",)),
    "vix_sma_distance_20": Feature(
        "ln(VIX / its mean of 20 days)", lambda _, v: np.log(v / ind.rolling_mean(v, 20)), 19, ("VIX",)
    ),
    "vix_percentile_252": Feature(
        "share of 252 days with a VIX no higher", lambda _, v: ind.rolling_rank(v, 252), 251, ("VIX",)
    ),
    "vix_realized_gap": Feature(
        "ln(VIX / realised volatility of 21 days, annual)",
        lambda b, v: np.log(v / 100 / _annual_vol(b)),
        21,
        ("VIX",),
    ),
    "variance_risk_premium": Feature(
        "(VIX/100)² − realised variance of 21 days, annual (Bollerslev, Tauchen & Zhou 2009)",
        lambda b, v: np.square(v / 100) - np.square(_annual_vol(b)),
        21,
        ("VIX",),
    ),
}

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
default. `stationary` takes `gap` along where opens are prices of their own, and `stationary_vix` where VIX is in the
context. A published set never changes: studies are compared by its name."""
