"""Which inputs can a model see? Named causal features of an asset's bars: the value at t uses rows ≤ t alone.

Prices are taken as traded (unadjusted for dividends), as the labels are. A feature is declared once, here; the tests
cut off and replace the future of every one.
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
from fintx.types import FintxError, Floats

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


@dataclass(frozen=True)
class Feature:
    """A named input."""

    words: str
    function: Callable[[Bars, Floats], Floats]
    """(bars, VIX closes as of each bar) → (T,)."""
    needs: Literal["asset", "VIX"] = "asset"


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
            and where they are not `gap` is refused. None: not known yet.
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
    refused = {f"{symbol}:gap" for symbol in gapless_context} | ({"gap"} if gaps is False else set())
    for name in found:
        if name in refused:
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
    if colon and (own in SETS or (own in FEATURES and FEATURES[own].needs == "VIX")):
        raise UnknownFeature(
            f'data.features: "{name}" does not exist: SYM: goes before a single feature of own bars; say "{own}"'
        )
    if own not in FEATURES:
        near = difflib.get_close_matches(own, [*FEATURES, *SETS], n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else f"; sets are {', '.join(SETS)}"
        raise UnknownFeature(f'data.features: "{name}" is no feature or set{hint}')
    if FEATURES[own].needs == "VIX" and VIX not in context:
        raise UnknownFeature(f'data.features: "{name}" needs VIX: bring it in and set data.context = ["VIX"]')


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


def _price_levels() -> dict[str, Feature]:
    found = {
        name: Feature(f"{name}, as traded", _with(name, lambda b, column: getattr(b, column).copy()))
        for name in ("open", "high", "low", "close", "volume")
    }
    for n in (9, 10, 20, 25, 90):
        found[f"dema_{n}"] = Feature(f"double EMA of the close, {n} days", _with(n, lambda b, n: ind.dema(b.close, n)))
    for n in (12, 50, 100, 200):
        found[f"sma_{n}"] = Feature(f"mean close of {n} days", _with(n, lambda b, n: ind.rolling_mean(b.close, n)))
    found["vwap_20"] = Feature(
        "volume-weighted typical price, 20 days", lambda b, _: ind.vwap(b.high, b.low, b.close, b.volume, 20)
    )
    return found


def _oscillators() -> dict[str, Feature]:
    return {
        "rsi_14": Feature("RSI of 14 days, 0 … 100", lambda b, _: ind.rsi(b.close, 14)),
        "weekly_rsi_14": Feature(
            "RSI of 14 weeks that are over", lambda b, _: ind.weekly(b.dates, b.close, lambda x: ind.rsi(x, 14))
        ),
        "stochrsi_14": Feature("StochRSI (14, 5, 3) fast %K, 0 … 100", lambda b, _: ind.stoch_rsi(b.close)),
        "weekly_stochrsi_14": Feature(
            "the same of weeks that are over", lambda b, _: ind.weekly(b.dates, b.close, ind.stoch_rsi)
        ),
        "macd": Feature("MACD line (12, 26), in price units", lambda b, _: ind.macd(b.close)),
        "obv": Feature("on-balance volume since the first bar", lambda b, _: talib.OBV(b.close, b.volume)),
        "adosc_3_10": Feature(
            "Chaikin oscillator (3, 10)",
            lambda b, _: talib.ADOSC(b.high, b.low, b.close, b.volume, fastperiod=3, slowperiod=10),
        ),
        "atr_14": Feature("average true range, 14 days", lambda b, _: talib.ATR(b.high, b.low, b.close, timeperiod=14)),
        "adx_14": Feature(
            "directional movement index, 14 days, 0 … 100",
            lambda b, _: talib.ADX(b.high, b.low, b.close, timeperiod=14),
        ),
        "bollinger_b_20": Feature("Bollinger %B (20, 2)", lambda b, _: ind.bollinger_b(b.close, 20, 2.0)),
    }


def _stationary() -> dict[str, Feature]:
    found = {
        f"log_return_{k}": Feature(f"log return of {k} days", _with(k, lambda b, k: ind.log_return(b.close, k)))
        for k in (1, 2, 5, 10, 21, 63)
    }
    for n in (5, 21, 63):
        found[f"realized_vol_{n}"] = Feature(
            f"realised volatility per day, {n} days", _with(n, lambda b, n: ind.realized_vol(b.close, n))
        )
    found["parkinson_vol_21"] = Feature(
        "Parkinson volatility per day, 21 days", lambda b, _: ind.parkinson_vol(b.high, b.low, 21)
    )
    found["garman_klass_vol_21"] = Feature(
        "Garman–Klass volatility per day, 21 days",
        lambda b, _: ind.garman_klass_vol(b.open, b.high, b.low, b.close, 21),
    )
    found["range"] = Feature("ln(high / low)", lambda b, _: np.log(b.high / b.low))
    found["close_in_range"] = Feature("where the close lies in the day's range, 0 … 1", _close_in_range)
    found["gap"] = Feature(
        "ln(open / close before); refused for an index whose open is that close",
        lambda b, _: np.log(b.open / ind.lagged(b.close, 1)),
    )
    for n in (20, 50, 200):
        found[f"sma_distance_{n}"] = Feature(
            f"ln(close / mean close of {n} days)", _with(n, lambda b, n: np.log(b.close / ind.rolling_mean(b.close, n)))
        )
    found["rsi_14_centered"] = Feature("RSI of 14 days, −1 … 1", lambda b, _: ind.rsi(b.close, 14) / 50 - 1)
    found["weekly_rsi_14_centered"] = Feature(
        "RSI of 14 weeks that are over, −1 … 1",
        lambda b, _: ind.weekly(b.dates, b.close, lambda x: ind.rsi(x, 14)) / 50 - 1,
    )
    found["stochrsi_14_centered"] = Feature("StochRSI fast %K, −1 … 1", lambda b, _: ind.stoch_rsi(b.close) / 50 - 1)
    found["macd_in_atr"] = Feature("MACD line / ATR 14", _macd_in_atr)
    found["adx_14_scaled"] = Feature(
        "ADX 14, 0 … 1", lambda b, _: talib.ADX(b.high, b.low, b.close, timeperiod=14) / 100
    )
    for n in (20, 63):
        found[f"volume_ratio_{n}"] = Feature(
            f"ln(volume / its mean of {n} days)", _with(n, lambda b, n: ind.volume_ratio(b.volume, n))
        )
    found["weekday_sin"] = Feature("day of the week on a circle", lambda b, _: _cycle(_weekday(b), 7, np.sin))
    found["weekday_cos"] = Feature("day of the week on a circle", lambda b, _: _cycle(_weekday(b), 7, np.cos))
    found["month_sin"] = Feature("month on a circle", lambda b, _: _cycle(_month(b), 12, np.sin))
    found["month_cos"] = Feature("month on a circle", lambda b, _: _cycle(_month(b), 12, np.cos))
    return found


def _of_vix() -> dict[str, Feature]:
    functions: dict[str, tuple[str, Callable[[Bars, Floats], Floats]]] = {
        "vix_close": ("VIX", lambda _, v: v.copy()),
        "vix_sma_10": ("mean VIX of 10 days", lambda _, v: ind.rolling_mean(v, 10)),
        "vix_sma_20": ("mean VIX of 20 days", lambda _, v: ind.rolling_mean(v, 20)),
        "vix_percentile_60": ("share of 60 days with a VIX no higher", lambda _, v: ind.rolling_rank(v, 60)),
        "vix_zscore_20": (
            "(VIX − mean) / SD of 20 days",
            lambda _, v: _ratio(v - ind.rolling_mean(v, 20), ind.rolling_std(v, 20)),
        ),
        "vix_regime": ("0 below 15, 1 below 25, 2 from there", _vix_regime),
        "vix_change_1": ("VIX / VIX a day before − 1", lambda _, v: v / ind.lagged(v, 1) - 1),
        "vix_change_5": ("VIX / VIX 5 days before − 1", lambda _, v: v / ind.lagged(v, 5) - 1),
        "vix_log": ("ln VIX", lambda _, v: np.log(v)),
        "vix_log_change_1": ("change of ln VIX in a day", lambda _, v: ind.log_return(v, 1)),
        "vix_log_change_5": ("change of ln VIX in 5 days", lambda _, v: ind.log_return(v, 5)),
        "vix_sma_distance_20": ("ln(VIX / its mean of 20 days)", lambda _, v: np.log(v / ind.rolling_mean(v, 20))),
        "vix_percentile_252": ("share of 252 days with a VIX no higher", lambda _, v: ind.rolling_rank(v, 252)),
        "vix_realized_gap": (
            "ln(VIX / realised volatility of 21 days, annual)",
            lambda b, v: np.log(v / 100 / _annual_vol(b)),
        ),
        "variance_risk_premium": (
            "(VIX/100)² − realised variance of 21 days, annual (Bollerslev, Tauchen & Zhou 2009)",
            lambda b, v: np.square(v / 100) - np.square(_annual_vol(b)),
        ),
    }
    return {name: Feature(words, function, needs="VIX") for name, (words, function) in functions.items()}


def _ratio(numerator: Floats, denominator: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(denominator == 0, 0.0, numerator / denominator)


FEATURES: dict[str, Feature] = _price_levels() | _oscillators() | _stationary() | _of_vix()

_A20 = (
    *(f"dema_{n}" for n in (9, 10, 20, 25, 90)),
    *(f"sma_{n}" for n in (12, 50, 100, 200)),
    *("rsi_14", "weekly_rsi_14", "stochrsi_14", "weekly_stochrsi_14", "macd", "obv", "adosc_3_10", "atr_14"),
    *("adx_14", "bollinger_b_20", "vwap_20"),
)
SETS: dict[str, tuple[str, ...]] = {
    "stationary": (
        *(name for name in _stationary() if name != "gap"),
        "bollinger_b_20",
    ),
    "stationary_vix": tuple(_of_vix())[8:],
    "a20": _A20,
    "a25": ("open", "high", "low", "close", "volume", *_A20),
    "vix8": tuple(_of_vix())[:8],
}
"""a20, a25 and vix8 are those of the earlier PyTorch study, for comparison; levels drift, so `stationary` is the
default. `stationary` takes `gap` along where opens are prices of their own, and `stationary_vix` where VIX is in the
context."""
