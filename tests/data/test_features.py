"""Features: none sees the future, stationary ones ignore price levels, values equal an independent implementation."""

from __future__ import annotations

import datetime
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fintx.data import features, sources
from fintx.data.bars import Bars
from fintx.data.features import FEATURES, SETS, Feature, UnknownFeature
from fintx.types import Floats

EVERY = [*FEATURES, "VIX:log_return_1", "VIX:weekly_rsi_14"]
STATIONARY = [*SETS["stationary"], *SETS["stationary_vix"], "gap"]
MAX_WARM_UP = 300
TODAY = datetime.date(2026, 11, 1)

PRICES = ("open", "high", "low", "close")
OF_THE_ASSET = [name for name in FEATURES if "VIX" not in FEATURES[name].needs]

Context = dict[str, Bars]


def one(name: str, bars: Bars, context: Context) -> Floats:
    return features.compute((name,), bars, context)[:, 0]


def until(bars: Bars, day: np.datetime64) -> Bars:
    return bars.take(np.flatnonzero(bars.dates <= day))


def other_future(bars: Bars, day: np.datetime64, rng: np.random.Generator) -> Bars:
    """The same bars up to and with the day; behind it prices, volumes and holidays of another world."""
    later = bars.dates > day
    factor = np.where(later, np.exp(rng.normal(0.3, 0.2, len(bars))), 1.0)
    prices = {column: getattr(bars, column) * factor for column in PRICES}
    moved = replace(bars, **prices, volume=bars.volume * np.where(later, rng.integers(2, 9, len(bars)), 1))
    return moved.take(np.flatnonzero(~later | (rng.random(len(bars)) < 0.7)))


def assert_causal(name: str, bars: Bars, context: Context, *, n_dates: int, seed: int) -> None:
    """At n_dates random days, and a few of the warm-up: no value up to that day moves, bit for bit, when the future of
    the asset and of its context is cut off, when the asset's or the context's alone is, or when another one follows."""
    rng = np.random.default_rng(seed)
    whole = one(name, bars, context)
    assert np.isfinite(whole[MAX_WARM_UP:]).all()
    early, late = rng.integers(1, MAX_WARM_UP, n_dates // 4), rng.integers(MAX_WARM_UP, len(bars) - 1, n_dates)
    for row in (*early, *late):
        day = bars.dates[row]
        cut, cut_context = until(bars, day), {s: until(b, day) for s, b in context.items()}
        others = {s: other_future(b, day, rng) for s, b in context.items()}
        for words, values in {
            "cut off after": one(name, cut, cut_context),
            "the asset cut off after": one(name, cut, context),
            "the context cut off after": one(name, bars, cut_context)[: row + 1],
            "with another future from": one(name, other_future(bars, day, rng), others)[: row + 1],
        }.items():
            np.testing.assert_array_equal(values, whole[: row + 1], err_msg=f"{name} {words} {day}")


@pytest.mark.parametrize("name", EVERY)
def test_no_value_moves_without_the_future_or_with_another(name, synthetic):
    assert_causal(name, *synthetic, n_dates=24, seed=EVERY.index(name))


@pytest.mark.parametrize("name", OF_THE_ASSET)
def test_the_same_on_the_embedded_index(name):
    assert_causal(name, sources.embedded(), {}, n_dates=8, seed=EVERY.index(name))


@pytest.mark.parametrize("name", EVERY)
def test_the_same_on_spy_and_vix(name, spy_and_vix):
    assert_causal(name, *spy_and_vix, n_dates=8, seed=EVERY.index(name))


@pytest.mark.parametrize("name", SETS)
def test_a_set_is_its_features_side_by_side(name, synthetic):
    """So what holds of each feature alone holds of every set."""
    bars, context = synthetic
    together = features.compute(SETS[name], bars, context)
    apart = [one(feature, bars, context) for feature in SETS[name]]
    np.testing.assert_array_equal(together, np.stack(apart, axis=1))


@pytest.mark.parametrize("name", EVERY)
def test_computing_a_feature_leaves_the_bars_as_they_were(name, synthetic):
    bars, context = synthetic
    before = {(b.symbol, c): getattr(b, c).copy() for b in (bars, context["VIX"]) for c in (*PRICES, "volume")}
    values = one(name, bars, context)
    values[:] = -1.0
    for (symbol, column), original in before.items():
        now = bars if symbol == bars.symbol else context[symbol]
        np.testing.assert_array_equal(getattr(now, column), original)


def _centred_mean(bars: Bars, _: Floats) -> Floats:
    return np.convolve(bars.close, np.ones(5) / 5, mode="same")


def _this_week(bars: Bars, _: Floats) -> Floats:
    """The close of each day's own week: on Monday it knows Friday."""
    week = (bars.dates.astype(int) + 3) // 7
    last = np.flatnonzero(np.append(week[1:] != week[:-1], True))
    return bars.close[last[np.searchsorted(last, np.arange(len(week)))]]


def _whole_sample_z(bars: Bars, _: Floats) -> Floats:
    return (bars.close - bars.close.mean()) / bars.close.std()


def _vix_of_the_next_day(_: Bars, vix: Floats) -> Floats:
    return np.append(vix[1:], vix[-1])


def _days_to_the_next_bar(bars: Bars, _: Floats) -> Floats:
    """No price of the future, but its holidays."""
    return np.append(np.diff(bars.dates).astype(float), 1.0)


def _backward_filled(bars: Bars, _: Floats) -> Floats:
    """Leaks in the warm-up alone: its rows hold the first value known."""
    values = features.rolling_mean(bars.close, 50)
    return np.where(np.isnan(values), values[49] if len(values) > 49 else bars.close[-1], values)


LEAKS = [_centred_mean, _this_week, _whole_sample_z, _vix_of_the_next_day, _days_to_the_next_bar, _backward_filled]


@pytest.mark.parametrize("leak", LEAKS)
def test_a_planted_leak_is_caught(leak, synthetic, monkeypatch):
    monkeypatch.setitem(FEATURES, "leak", Feature("a leak", leak, needs=("VIX",)))
    with pytest.raises(AssertionError, match="leak (cut off|the asset cut|the context cut|with another)"):
        assert_causal("leak", *synthetic, n_dates=24, seed=0)


def _gaps_after_warm_up(values: Floats) -> int:
    finite = np.flatnonzero(~np.isnan(values))
    return len(values) if len(finite) == 0 else int(np.isnan(values[finite[0] :]).sum())


@pytest.mark.parametrize("name", EVERY)
def test_nothing_is_missing_but_a_warm_up(name, synthetic):
    values = one(name, *synthetic)
    assert _gaps_after_warm_up(values) == 0
    warm_up = FEATURES[name.rpartition(":")[2]].warm_up
    # Holidays shorten the weeks that a weekly feature waits for, and the context here begins earlier.
    assert np.isnan(values).sum() <= warm_up
    assert "weekly" in name or ":" in name or np.isnan(values).sum() == warm_up
    assert not np.isinf(values).any()


def standing_still(bars: Bars, context: Context, price: float, vix: float) -> tuple[Bars, Context]:
    """No range, no change, no volume: every quotient is 0/0 there."""
    flat = replace(bars, **{c: np.full(len(bars), price) for c in PRICES}, volume=np.zeros(len(bars)))
    return flat, {"VIX": replace(context["VIX"], close=np.full(len(context["VIX"]), vix))}


@pytest.mark.parametrize("name", EVERY)
def test_a_market_that_stands_still_gives_finite_values(name, synthetic):
    values = one(name, *standing_still(*synthetic, 40.0, 15.0))
    assert np.isfinite(values[MAX_WARM_UP:]).all()
    assert not np.isinf(values).any()


@pytest.mark.parametrize(
    "name", ["vix_zscore_20", "bollinger_b_20", "macd_in_atr", "close_in_range", "volume_ratio_20"]
)
def test_a_quotient_of_rounding_errors_is_no_signal(name, synthetic):
    """40.1 and 15.3 have no exact mean in binary: their SD is 1e-15, and (x − mean) / SD of order one."""
    exact, rounded = (one(name, *standing_still(*synthetic, *at)) for at in ((40.0, 15.0), (40.1, 15.3)))
    np.testing.assert_allclose(rounded, exact, atol=1e-10)


@pytest.mark.parametrize("name", EVERY)
def test_a_halt_after_trading_gives_finite_values(name, synthetic):
    """Running sums have rounding errors left from before."""
    bars, context = synthetic
    halted = np.arange(len(bars)) > 400
    prices = {c: np.where(halted, bars.close[400], getattr(bars, c)) for c in PRICES}
    values = one(name, replace(bars, **prices, volume=np.where(halted, 0.0, bars.volume)), context)
    assert np.isfinite(values[MAX_WARM_UP:]).all()
    assert name not in STATIONARY or np.abs(values[MAX_WARM_UP:]).max() < 20


@pytest.mark.parametrize("n_bars", [1, 2, 20, 64])
def test_a_history_shorter_than_the_warm_up_is_all_nan_and_no_crash(n_bars, synthetic):
    bars, context = synthetic
    short = bars.take(np.arange(n_bars))
    names = tuple(EVERY)
    values = features.compute(names, short, {"VIX": until(context["VIX"], short.dates[-1])})
    assert values.shape == (n_bars, len(names))
    assert np.isnan(values[:, names.index("sma_200")]).all()


def test_context_that_begins_after_the_asset_ends_is_all_nan(synthetic):
    bars, context = synthetic
    values = features.compute(("vix_close", "VIX:log_return_1", "VIX:rsi_14"), bars, {"VIX": context["VIX"].take([])})
    assert np.isnan(values).all()


# --- what a feature is ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [7.0, 1e-6, 1e6])
@pytest.mark.parametrize("name", STATIONARY)
def test_stationary_features_know_no_price_or_volume_level(name, factor, synthetic):
    bars, context = synthetic
    scaled = replace(bars, **{c: factor * getattr(bars, c) for c in PRICES}, volume=3 * bars.volume)
    # Rounding alone: recursions of about a hundred steps on numbers of order one to a hundred.
    np.testing.assert_allclose(one(name, scaled, context), one(name, bars, context), rtol=1e-9, atol=1e-10)


def forgets(name: str, bars: Bars, context: Context) -> bool:
    """Whether 250 weeks on it is the same number had the history begun 500 bars later."""
    later = one(
        name, bars.take(np.arange(500, len(bars))), {s: b.take(np.arange(500, len(b))) for s, b in context.items()}
    )
    settled = MAX_WARM_UP + 1250  # the slowest is the weekly RSI, by 13/14 a week: (13/14)^250 < 1e-8
    return np.allclose(later[settled:], one(name, bars, context)[500 + settled :], rtol=1e-7, atol=1e-7)


@pytest.fixture(scope="module")
def long_walk(help) -> tuple[Bars, Context]:
    bars = help.walk(n=2600)
    return bars, {"VIX": replace(help.walk("VIX", seed=1, n=2600), dates=bars.dates)}


@pytest.mark.parametrize("name", STATIONARY)
def test_stationary_features_forget_where_the_history_begins(name, long_walk):
    assert forgets(name, *long_walk)


@pytest.mark.parametrize("name", ["obv"])
def test_a_sum_since_the_first_bar_does_not_and_is_not_stationary(name, long_walk):
    assert not forgets(name, *long_walk)
    assert name not in STATIONARY


def test_the_price_levels_do_know_it(synthetic):
    bars, context = synthetic
    scaled = replace(bars, close=7 * bars.close)
    assert one("sma_50", scaled, context)[-1] == pytest.approx(7 * one("sma_50", bars, context)[-1])


@pytest.mark.parametrize(("name", "size"), [("a20", 20), ("a25", 25), ("vix8", 8)])
def test_the_sets_of_the_earlier_study_have_their_sizes(name, size):
    assert len(set(SETS[name])) == len(SETS[name]) == size


def test_every_set_holds_features_alone():
    assert {name for names in SETS.values() for name in names} <= set(FEATURES)


@pytest.mark.parametrize("name", FEATURES)
def test_every_feature_is_described(name):
    assert FEATURES[name].description.strip()


def test_stationary_brings_its_vix_part_only_where_vix_is():
    assert features.resolve(("stationary",), context=()) == SETS["stationary"]
    with_vix = features.resolve(("stationary", "VIX:log_return_1"), context=("VIX",))
    assert with_vix == (*SETS["stationary"], *SETS["stationary_vix"], "VIX:log_return_1")


def test_resolve_keeps_the_order_given():
    assert features.resolve(("rsi_14", "vix8", "close"), context=("VIX",)) == ("rsi_14", *SETS["vix8"], "close")


@pytest.mark.parametrize(
    ("names", "context", "words"),
    [
        (("rsi_41",), (), '"rsi_41" is no feature or set; did you mean rsi_14'),
        (("stationnary",), (), "did you mean stationary"),
        (("qqqqqq",), (), '"qqqqqq" is no feature or set; sets are stationary'),
        (("vix_log",), (), r'"vix_log" needs VIX: bring it in and set data.context = \["VIX"\]'),
        (("vix8",), ("GLD",), '"vix_close" needs VIX'),
        (("VIX:rsi_14",), (), r'"VIX:rsi_14" needs VIX in data.context \(there: none\)'),
        (("GLD:rsi_14",), ("VIX",), r'"GLD:rsi_14" needs GLD in data.context \(there: VIX\)'),
        (("VIX:vix_log",), ("VIX",), '"VIX:vix_log" does not exist: .* say "vix_log"'),
        (("VIX:a20",), ("VIX",), '"VIX:a20" does not exist: SYM: goes before a single feature'),
        (("VIX:rsi_41",), ("VIX",), '"VIX:rsi_41" is no feature or set; did you mean rsi_14'),
        ((":rsi_14",), ("VIX",), '":rsi_14" needs SYM: in data.context'),
        (("a20", "rsi_14"), (), "rsi_14 named twice"),
        (("a20", "a25"), (), "named twice"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else "",
)
def test_resolve_refuses(names, context, words):
    with pytest.raises(UnknownFeature, match=words):
        features.resolve(names, context=context)


def test_gap_is_refused_where_opens_are_the_close_before():
    assert not features.has_gaps(sources.embedded())
    with pytest.raises(UnknownFeature, match='"gap" means nothing'):
        features.resolve(("gap",), context=(), gaps=False)
    assert features.resolve(("gap",), context=(), gaps=True) == ("gap",)


def test_gap_of_a_context_symbol_is_refused_likewise():
    assert features.resolve(("GSPC:gap", "gap"), context=("GSPC",), gaps=True) == ("GSPC:gap", "gap")
    with pytest.raises(UnknownFeature, match='"GSPC:gap" means nothing'):
        features.resolve(("GSPC:gap",), context=("GSPC",), gaps=True, gapless_context=("GSPC",))


@pytest.mark.parametrize(("start", "gaps"), [("1999-01-01", False), ("2005-01-01", False), ("2008-01-01", True)])
def test_years_with_gaps_do_not_hide_years_without(start, gaps):
    """The embedded index from 2005 on has no opens of its own on 13 % of days, but on 96 % of those of 2005."""
    assert features.has_gaps(sources.embedded().between(datetime.date.fromisoformat(start), None)) == gaps


@pytest.mark.parametrize("symbol", ["SPY", "VIX", "AAPL", "COST", "CVX", "DE", "DUK"])
def test_prices_in_eighths_are_no_missing_opens(symbol, shared_data):
    """Before 2001 a stock opened at the close before on up to half of a year's days, by the size of a tick."""
    assert features.has_gaps(sources.read_file(shared_data / f"{symbol}.csv", symbol, today=TODAY))


@pytest.mark.parametrize("symbol", ["GSPC", "DIS"])
def test_stale_opens_are_seen(symbol, shared_data):
    assert not features.has_gaps(sources.read_file(shared_data / f"{symbol}.csv", symbol, today=TODAY))


def test_stationary_takes_gap_along_where_the_source_has_it():
    with_gaps = features.resolve(("stationary",), context=(), gaps=True)
    assert set(with_gaps) - set(features.resolve(("stationary",), context=(), gaps=False)) == {"gap"}


def test_a_context_feature_is_that_feature_of_the_context_joined_as_of_each_day(synthetic):
    bars, context = synthetic
    vix = context["VIX"]
    joined = one("VIX:log_return_1", bars, context)
    for row in (50, 333, 700):
        newest = np.flatnonzero(vix.dates <= bars.dates[row])[-1]
        assert joined[row] == np.log(vix.close[newest] / vix.close[newest - 1])


def test_as_of_takes_the_newest_value_but_no_stale_one():
    days = np.array(["2024-01-05", "2024-01-08", "2024-01-10", "2024-01-11"], "datetime64[D]")
    source = np.array(["2024-01-05", "2024-01-09"], "datetime64[D]")
    assert features.as_of(days, source, np.array([1.0, 2.0])).tolist() == [1.0, 1.0, 2.0, 2.0]
    late = source + 30
    np.testing.assert_array_equal(
        features.as_of(late + features.MAX_AGE_DAYS, source + 30, np.array([1.0, 2.0]))[1:], [2.0]
    )
    assert np.isnan(features.as_of(source[1:] + features.MAX_AGE_DAYS + 1, source, np.array([1.0, 2.0]))).all()
    assert np.isnan(features.as_of(source[:1] - 1, source, np.array([1.0, 2.0]))).all()


def test_a_weekly_value_is_of_the_last_week_that_is_over_also_across_holidays():
    """Week of Jan 1: Tue–Fri (Monday is a holiday); week of Jan 8: none at all; week of Jan 15: from Tuesday."""
    days = np.array(
        ["2023-12-28", "2023-12-29", "2024-01-02", "2024-01-05", "2024-01-16", "2024-01-19"], "datetime64[D]"
    )
    close = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    np.testing.assert_array_equal(features.weekly(days, close, lambda x: x), [np.nan, np.nan, 2.0, 2.0, 4.0, 4.0])


# --- golden numbers ---------------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = json.loads((ROOT / "tests" / "golden" / "indicators.json").read_text())


@pytest.fixture(scope="module")
def golden_bars() -> tuple[Bars, Context]:
    golden = GOLDEN["bars"]
    dates = np.array(golden["dates"], "datetime64[D]")
    columns = {name: np.array(golden[name], np.float64) for name in ("open", "high", "low", "close", "volume")}
    bars = Bars("GOLD", dates, **columns, adj_close=None, version="")
    return bars, {"VIX": replace(bars, symbol="VIX", close=np.array(golden["vix"]))}


@pytest.mark.parametrize("name", GOLDEN["values"])
def test_indicators_equal_an_independent_implementation(name, golden_bars):
    """tools/golden_indicators.py writes them from their definitions, in plain Python.

    Both compute in float64, but begin some recursions differently: what is left of that after 400 bars is below
    (13/14)^370 ≈ 1e-12 for the slowest (ADX), relative to values of order 100.
    """
    expected = np.array(GOLDEN["values"][name])
    values = one(name, *golden_bars)[-len(expected) :]
    np.testing.assert_allclose(values, expected, rtol=1e-9, atol=1e-10)


def test_the_golden_file_covers_every_feature():
    """A new feature comes with its independent implementation; columns of the bars need none."""
    assert GOLDEN["values"].keys() == FEATURES.keys() - {*PRICES, "volume"}


def test_the_golden_file_is_what_its_tool_writes():
    import importlib.util

    spec = importlib.util.spec_from_file_location("golden_indicators", ROOT / "tools" / "golden_indicators.py")
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    built = tool.build()
    assert built["bars"] == GOLDEN["bars"]
    assert built["values"].keys() == GOLDEN["values"].keys()
    for name, values in built["values"].items():
        assert values == pytest.approx(GOLDEN["values"][name], rel=1e-12), name  # other libm, other last digit
