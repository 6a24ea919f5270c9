"""What are the indicators' values? Computed from their definitions in plain Python, as golden numbers for the tests.

    python tools/golden_indicators.py        writes tests/golden/indicators.json

Nothing here is shared with fintx: loops over lists, written from the sources named below. Where a definition leaves
the start of a recursion open, an average begins as the plain mean of its first n values (Wilder's and TA-Lib's way).
"""

from __future__ import annotations

import datetime
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

N_BARS, N_KEPT, SEED = 400, 20, 20240105
TARGET = Path(__file__).resolve().parents[1] / "tests" / "golden" / "indicators.json"

Column = list[float]
Sparse = list[float | None]
"""None while an indicator warms up."""


def synthetic_bars() -> dict[str, Any]:
    """A random walk in cents on weekdays with some holidays, and a volatility index."""
    rng = random.Random(SEED)
    found: dict[str, list[Any]] = {k: [] for k in ("dates", "open", "high", "low", "close", "volume", "vix")}
    day, close, vix = datetime.date(2020, 1, 1), 100.0, 18.0
    while len(found["dates"]) < N_BARS:
        day += datetime.timedelta(days=1)
        if day.weekday() >= 5 or rng.random() < 0.03:
            continue
        open_ = round(close * (1 + rng.gauss(0, 0.004)), 2)
        close = round(open_ * (1 + rng.gauss(0.0003, 0.012)), 2)
        vix = round(max(9.0, vix + 0.05 * (19 - vix) + rng.gauss(0, 1.1)), 2)
        found["dates"].append(day.isoformat())
        found["open"].append(open_)
        found["high"].append(round(max(open_, close) + abs(rng.gauss(0, 0.5)), 2))
        found["low"].append(round(min(open_, close) - abs(rng.gauss(0, 0.5)), 2))
        found["close"].append(close)
        found["volume"].append(rng.randrange(500_000, 3_000_000))
        found["vix"].append(vix)
    return found


# --- averages ---------------------------------------------------------------------------------------------------------


def recursive(x: Sparse, n: int, weight: float) -> Sparse:
    """avg[t] = avg[t−1] + weight · (x[t] − avg[t−1]), begun as the mean of the first n known values."""
    out: Sparse = []
    seed: Column = []
    average: float | None = None
    for value in x:
        if value is None:
            out.append(None)
            continue
        if average is None:
            seed.append(value)
            if len(seed) == n:
                average = math.fsum(seed) / n
        else:
            average += weight * (value - average)
        out.append(average)
    return out


def ema(x: Sparse, n: int) -> Sparse:
    """Exponential average with weight 2 / (n + 1)."""
    return recursive(x, n, 2 / (n + 1))


def wilder(x: Sparse, n: int) -> Sparse:
    """Wilder 1978: weight 1 / n."""
    return recursive(x, n, 1 / n)


def over(x: Sparse, n: int, function: Callable[[Column], float]) -> Sparse:
    """A function of the last n known values."""
    out: Sparse = []
    for t in range(len(x)):
        window = x[max(0, t - n + 1) : t + 1]
        known = [value for value in window if value is not None]
        out.append(function(known) if len(known) == n else None)
    return out


def mean(x: Column) -> float:
    return math.fsum(x) / len(x)


def deviation(x: Column, less: int) -> float:
    """√(Σ (x − mean)² / (n − less))."""
    middle = mean(x)
    return math.sqrt(math.fsum((value - middle) ** 2 for value in x) / (len(x) - less))


def both(a: Sparse, b: Sparse, function: Callable[[float, float], float]) -> Sparse:
    return [None if x is None or y is None else function(x, y) for x, y in zip(a, b, strict=True)]


# --- indicators -------------------------------------------------------------------------------------------------------


def dema(x: Column, n: int) -> Sparse:
    """Mulloy 1994: 2 EMA − EMA of the EMA."""
    first = ema(list(x), n)
    return both(first, ema(first, n), lambda a, b: 2 * a - b)


def rsi(x: Column, n: int) -> Sparse:
    """Wilder 1978: 100 · up / (up + down), the averages of rises and falls."""
    rises: Sparse = [None] + [max(b - a, 0.0) for a, b in zip(x, x[1:], strict=False)]
    falls: Sparse = [None] + [max(a - b, 0.0) for a, b in zip(x, x[1:], strict=False)]
    return both(wilder(rises, n), wilder(falls, n), lambda up, down: 100 * up / (up + down) if up + down else 0.0)


def stochastic_rsi(x: Column) -> Sparse:
    """Chande & Kroll 1994: where the RSI of 14 lies between its extremes of 5, 0 … 100."""

    def place(window: Column) -> float:
        low, high = min(window), max(window)
        return 100 * (window[-1] - low) / (high - low) if high > low else 0.0

    return over(rsi(x, 14), 5, place)


def true_range(b: dict[str, Any]) -> Sparse:
    """Wilder 1978: the largest of high − low, |high − close before|, |low − close before|."""
    out: Sparse = [None]
    for t in range(1, len(b["close"])):
        before = b["close"][t - 1]
        out.append(max(b["high"][t] - b["low"][t], abs(b["high"][t] - before), abs(b["low"][t] - before)))
    return out


def adx(b: dict[str, Any], n: int) -> Sparse:
    """Wilder 1978: the average of 100 · |DI+ − DI−| / (DI+ + DI−)."""
    plus: Sparse = [None]
    minus: Sparse = [None]
    for t in range(1, len(b["close"])):
        up, down = b["high"][t] - b["high"][t - 1], b["low"][t - 1] - b["low"][t]
        plus.append(up if up > down and up > 0 else 0.0)
        minus.append(down if down > up and down > 0 else 0.0)
    ranges = wilder(true_range(b), n)
    di_plus = both(wilder(plus, n), ranges, lambda move, width: 100 * move / width)
    di_minus = both(wilder(minus, n), ranges, lambda move, width: 100 * move / width)
    index = both(di_plus, di_minus, lambda p, m: 100 * abs(p - m) / (p + m) if p + m else 0.0)
    return wilder(index, n)


def on_balance_volume(b: dict[str, Any]) -> Sparse:
    """Granville 1963: volume added on rises, taken off on falls; begins with the first bar's volume."""
    total = float(b["volume"][0])
    out: Sparse = [total]
    for t in range(1, len(b["close"])):
        change = b["close"][t] - b["close"][t - 1]
        total += b["volume"][t] * ((change > 0) - (change < 0))
        out.append(total)
    return out


def chaikin_oscillator(b: dict[str, Any]) -> Sparse:
    """EMA 3 − EMA 10 of the accumulation/distribution line, both begun at the line's first value."""
    line: Column = []
    for high, low, close, volume in zip(b["high"], b["low"], b["close"], b["volume"], strict=True):
        width = high - low
        flow = ((close - low) - (high - close)) / width * volume if width else 0.0
        line.append((line[-1] if line else 0.0) + flow)
    fast, slow = recursive(list(line), 1, 2 / 4), recursive(list(line), 1, 2 / 11)
    return both(fast, slow, lambda a, c: a - c)


def percent_b(x: Column) -> Sparse:
    """Bollinger: (close − lower) / (upper − lower), bands 2 SD (of the population) about the mean of 20."""

    def place(window: Column) -> float:
        middle, reach = mean(window), 2 * deviation(window, 0)
        return (window[-1] - (middle - reach)) / (2 * reach)

    return over(list(x), 20, place)


def vwap(b: dict[str, Any], n: int) -> Sparse:
    """Σ typical price · volume / Σ volume over n days."""
    typical = [(h + low + c) / 3 for h, low, c in zip(b["high"], b["low"], b["close"], strict=True)]
    value: Sparse = [p * v for p, v in zip(typical, b["volume"], strict=True)]
    return both(over(value, n, math.fsum), over([float(v) for v in b["volume"]], n, math.fsum), lambda a, c: a / c)


def of_weeks_over(b: dict[str, Any], indicator: Callable[[Column], Sparse]) -> Sparse:
    """An indicator of the last closes of ISO weeks; a day sees the newest week before its own."""
    weeks: dict[tuple[int, int], float] = {}
    keys = []
    for day, close in zip(b["dates"], b["close"], strict=True):
        key = datetime.date.fromisoformat(day).isocalendar()[:2]
        weeks[key] = close
        keys.append(key)
    order = sorted(weeks)
    values = dict(zip(order, indicator([weeks[key] for key in order]), strict=True))
    before = {key: values[order[i - 1]] if i else None for i, key in enumerate(order)}
    return [before[key] for key in keys]


def parkinson(b: dict[str, Any], n: int) -> Sparse:
    """Parkinson 1980."""
    squares: Sparse = [math.log(h / low) ** 2 for h, low in zip(b["high"], b["low"], strict=True)]
    return over(squares, n, lambda w: math.sqrt(mean(w) / (4 * math.log(2))))


def garman_klass(b: dict[str, Any], n: int) -> Sparse:
    """Garman & Klass 1980, the practical estimator without cross terms."""
    daily: Sparse = [
        0.5 * math.log(h / low) ** 2 - (2 * math.log(2) - 1) * math.log(c / o) ** 2
        for o, h, low, c in zip(b["open"], b["high"], b["low"], b["close"], strict=True)
    ]
    return over(daily, n, lambda w: math.sqrt(mean(w)))


def changes(x: Column, k: int, function: Callable[[float, float], float]) -> Sparse:
    """A function of (now, k days before)."""
    return [None if t < k else function(x[t], x[t - k]) for t in range(len(x))]


def on_circle(dates: list[str], part: Callable[[datetime.date], int], period: int, name: str) -> Sparse:
    """sin or cos of a date's part, as the angle of a circle of `period`."""
    angles = [2 * math.pi * part(datetime.date.fromisoformat(day)) / period for day in dates]
    return [math.sin(a) if name == "sin" else math.cos(a) for a in angles]


def share_not_above(window: Column) -> float:
    return sum(value <= window[-1] for value in window) / len(window)


def indicators(b: dict[str, Any]) -> dict[str, Sparse]:
    """fintx's feature name → its values, one per bar."""
    close, vix = b["close"], b["vix"]
    returns = changes(close, 1, lambda now, then: math.log(now / then))
    squares: Sparse = [None if r is None else r * r for r in returns]
    macd = both(ema(list(close), 12), ema(list(close), 26), lambda a, c: a - c)
    realized = over(squares, 21, lambda w: math.sqrt(mean(w)))
    return (
        {f"dema_{n}": dema(close, n) for n in (9, 10, 20, 25, 90)}
        | {f"sma_{n}": over(list(close), n, mean) for n in (12, 50, 100, 200)}
        | {
            "rsi_14": rsi(close, 14),
            "weekly_rsi_14": of_weeks_over(b, lambda x: rsi(x, 14)),
            "stochrsi_14": stochastic_rsi(close),
            "weekly_stochrsi_14": of_weeks_over(b, stochastic_rsi),
            "macd": macd,
            "obv": on_balance_volume(b),
            "adosc_3_10": chaikin_oscillator(b),
            "atr_14": wilder(true_range(b), 14),
            "adx_14": adx(b, 14),
            "bollinger_b_20": percent_b(close),
            "vwap_20": vwap(b, 20),
            "parkinson_vol_21": parkinson(b, 21),
            "garman_klass_vol_21": garman_klass(b, 21),
            "macd_in_atr": both(macd, wilder(true_range(b), 14), lambda a, c: a / c),
            "vix_close": list(vix),
            "vix_sma_10": over(list(vix), 10, mean),
            "vix_sma_20": over(list(vix), 20, mean),
            "vix_percentile_60": over(list(vix), 60, share_not_above),
            "vix_percentile_252": over(list(vix), 252, share_not_above),
            "vix_zscore_20": over(list(vix), 20, lambda w: (w[-1] - mean(w)) / deviation(w, 1)),
            "vix_regime": [0.0 if v < 15 else 1.0 if v < 25 else 2.0 for v in vix],
            "vix_change_1": changes(vix, 1, lambda now, then: now / then - 1),
            "vix_change_5": changes(vix, 5, lambda now, then: now / then - 1),
            "vix_log": [math.log(v) for v in vix],
            "vix_log_change_1": changes(vix, 1, lambda now, then: math.log(now) - math.log(then)),
            "vix_log_change_5": changes(vix, 5, lambda now, then: math.log(now) - math.log(then)),
            "vix_sma_distance_20": over(list(vix), 20, lambda w: math.log(w[-1]) - math.log(mean(w))),
            "vix_realized_gap": both(list(vix), realized, lambda v, r: math.log(v / (100 * math.sqrt(252) * r))),
            "variance_risk_premium": both(list(vix), realized, lambda v, r: (v / 100) ** 2 - 252 * r * r),
        }
        | stationary(b, squares)
    )


def stationary(b: dict[str, Any], squares: Sparse) -> dict[str, Sparse]:
    """Those that know no price level; `squares`: squared daily log returns."""
    close, dates, volume = b["close"], b["dates"], [float(v) for v in b["volume"]]
    days = list(zip(b["open"], b["high"], b["low"], close, strict=True))

    def centred(x: Sparse) -> Sparse:
        return [None if value is None else (value - 50) / 50 for value in x]

    return (
        {f"log_return_{k}": changes(close, k, lambda now, then: math.log(now / then)) for k in (1, 2, 5, 10, 21, 63)}
        | {f"realized_vol_{n}": over(squares, n, lambda w: math.sqrt(mean(w))) for n in (5, 21, 63)}
        | {f"sma_distance_{n}": over(list(close), n, lambda w: math.log(w[-1] / mean(w))) for n in (20, 50, 200)}
        | {f"volume_ratio_{n}": over(list(volume), n, lambda w: math.log(w[-1] / mean(w))) for n in (20, 63)}
        | {f"weekday_{f}": on_circle(dates, datetime.date.weekday, 7, f) for f in ("sin", "cos")}
        | {f"month_{f}": on_circle(dates, lambda day: day.month - 1, 12, f) for f in ("sin", "cos")}
        | {
            "range": [math.log(high) - math.log(low) for _, high, low, _ in days],
            "close_in_range": [(c - low) / (high - low) for _, high, low, c in days],
            "gap": [None, *(math.log(now[0] / then[3]) for now, then in zip(days[1:], days[:-1], strict=True))],
            "rsi_14_centered": centred(rsi(close, 14)),
            "weekly_rsi_14_centered": centred(of_weeks_over(b, lambda x: rsi(x, 14))),
            "stochrsi_14_centered": centred(stochastic_rsi(close)),
            "adx_14_scaled": [None if value is None else value / 100 for value in adx(b, 14)],
        }
    )


def build() -> dict[str, Any]:
    """The golden file: the bars, and the last values of every indicator."""
    bars = synthetic_bars()
    values = {name: column[-N_KEPT:] for name, column in indicators(bars).items()}
    assert all(value is not None for column in values.values() for value in column)
    return {"made_by": "tools/golden_indicators.py", "bars": bars, "values": values}


def main() -> None:
    """Write the golden file, one column a line."""
    made = build()
    parts = [
        f' "{part}": {{\n' + ",\n".join(f'  "{k}": {json.dumps(v)}' for k, v in made[part].items()) + "\n }"
        for part in ("bars", "values")
    ]
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text("{\n" + f' "made_by": "{made["made_by"]}",\n' + ",\n".join(parts) + "\n}\n")
    print(f"wrote {TARGET}")


if __name__ == "__main__":
    main()
