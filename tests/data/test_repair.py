"""Repair: it invents nothing but a single day, lists what it did with dates, and refuses what it can't fix."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fintx.data import bars as bars_module
from fintx.data import sources
from fintx.data.bars import PRICES, BadBars, Bars, Repaired, repair_bars

CBOE_FILLED = ["1997-01-31", "1997-11-26", "1999-12-31"]


@pytest.fixture
def bars(help) -> Bars:
    return help.walk(n=30)


def repair(bars: Bars, calendar: np.ndarray | None = None) -> Repaired:
    return repair_bars(bars, calendar=calendar, where="x.csv")


def without(bars: Bars, *rows: int) -> Bars:
    return bars.take(np.delete(np.arange(len(bars)), rows))


def assert_equal(a: Bars, b: Bars) -> None:
    for name in ("dates", *PRICES, "volume", "adj_close"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


def test_clean_bars_are_left_as_they_are(bars):
    repaired = repair(bars, bars.dates)
    assert repaired.repairs == ()
    assert repaired.bars.version == bars.version
    assert_equal(repaired.bars, bars)


def test_a_single_missing_day_is_filled_flat_at_the_close_before(bars):
    repaired = repair(without(bars, 7), bars.dates)
    assert repaired.repairs == (
        f"single missing days filled with the bar before, flat at its close: 1 ({bars.dates[7]})",
    )
    for name in PRICES:
        assert getattr(repaired.bars, name)[7] == bars.close[6]
    assert (repaired.bars.volume[7], repaired.bars.adj_close[7]) == (0.0, bars.adj_close[6])
    assert_equal(without(repaired.bars, 7), without(bars, 7))


def test_two_missing_days_in_a_row_are_refused(bars):
    with pytest.raises(
        BadBars, match=f"no bars on 2 trading days .*the first {bars.dates[7]}; only single missing days"
    ):
        repair(without(bars, 7, 8), bars.dates)


def test_two_single_missing_days_are_filled(bars):
    assert len(repair(without(bars, 7, 9), bars.dates).bars) == 30


def test_days_on_which_the_asset_did_not_trade_are_dropped(bars):
    repaired = repair(bars, np.delete(bars.dates, 12))
    assert repaired.repairs == (f"days on which the asset did not trade dropped: 1 ({bars.dates[12]})",)
    assert_equal(repaired.bars, without(bars, 12))


def test_days_outside_the_calendar_are_dropped_and_none_is_made_there(bars):
    repaired = repair(bars, bars.dates[5:20])
    assert_equal(repaired.bars, bars.take(np.arange(5, 20)))
    assert "days outside the calendar's range dropped: 15" in repaired.repairs[0]
    assert_equal(repair(bars.take(np.arange(5, 20)), bars.dates).bars, bars.take(np.arange(5, 20)))


def test_a_calendar_of_another_time_is_refused(bars):
    with pytest.raises(BadBars, match="shares no day with the calendar"):
        repair(bars, bars.dates + 20_000)


def test_rows_are_put_in_order_and_equal_repeats_dropped(bars):
    order = np.r_[np.arange(30)[::-1], 4]
    repaired = repair(bars.take(order))
    assert_equal(repaired.bars, bars)
    assert [words.partition(":")[0] for words in repaired.repairs] == [
        "rows put into the order of their dates", "repeated rows dropped",
    ]  # fmt: skip


def test_a_day_with_two_prices_is_refused(bars):
    twice = bars.take(np.r_[np.arange(30), 4])
    twice = replace(twice, volume=np.r_[bars.volume, 1.0])
    with pytest.raises(BadBars, match="repeat a date with other prices; delete the wrong one"):
        repair(twice)


def test_open_and_close_are_clipped_into_the_range(bars):
    broken = replace(bars, open=bars.open.copy(), close=bars.close.copy())
    broken.open[3], broken.close[5] = 2 * bars.high[3], bars.low[5] / 2
    repaired = repair(broken)
    assert repaired.bars.open[3] == bars.high[3] and repaired.bars.close[5] == bars.low[5]
    assert repaired.repairs == (
        f"open clipped into the day's range: 1 ({bars.dates[3]})",
        f"close clipped into the day's range: 1 ({bars.dates[5]})",
    )


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("close", np.nan, "close is missing or not a number"),
        ("high", np.inf, "high is missing or not a number"),
        ("low", -1.0, "low is not above 0"),
        ("high", 0.01, "high is below open or close"),
        ("volume", np.nan, "volume is missing or negative"),
        ("adj_close", 0.0, "adj_close is missing or not above 0"),
    ],
)
def test_prices_are_never_invented(bars, column, value, words):
    values = getattr(bars, column).copy()
    values[11] = value
    with pytest.raises(BadBars, match=words) as raised:
        repair(replace(bars, **{column: values}), bars.dates)
    assert str(bars.dates[11]) in str(raised.value) and "not even --repair" in str(raised.value)


@pytest.mark.parametrize("with_calendar", [True, False])
def test_a_row_without_a_date_is_refused_and_not_dropped(bars, with_calendar):
    dates = bars.dates.copy()
    dates[11] = np.datetime64("NaT")
    with pytest.raises(BadBars, match="row 12, NaT: has no date"):
        repair(replace(bars, dates=dates), bars.dates if with_calendar else None)


@given(data=st.data())
def test_what_is_repaired_keeps_every_rule_and_a_second_repair_changes_nothing(data, help):
    bars = help.walk(n=30)
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    rows = rng.permutation(np.r_[np.arange(30), rng.integers(0, 30, 3)])
    broken = bars.take(rows[np.isin(rows, data.draw(st.sets(st.integers(0, 29), max_size=3)), invert=True)])
    open_ = np.where(broken.dates == bars.dates[data.draw(st.integers(0, 29))], 1e6, broken.open)
    broken = replace(broken, open=open_)
    calendar = data.draw(st.sampled_from([None, bars.dates, bars.dates[::2], bars.dates[3:25]]))
    try:
        repaired = repair(broken, calendar)
    except BadBars:
        return  # two days missing in a row
    assert bars_module.bar_problems(repaired.bars) == []
    again = repair(repaired.bars, calendar)
    assert again.repairs == ()
    assert again.bars.version == repaired.bars.version


# --- the exchange's own VIX file --------------------------------------------------------------------------------------


def test_vix_as_the_exchange_publishes_it_is_refused_with_its_47_rows(shared_data, help):
    with pytest.raises(BadBars) as raised:
        sources.read_file(shared_data / "VIX_cboe.csv", "VIX", today=help.today)
    first, *rows = str(raised.value).splitlines()
    assert "VIX_cboe.csv: 47 of 9235 rows break a rule; correct them, or import with --repair" in first
    assert rows[0].startswith("  line 535, 1992-02-11: high is below open or close (open 19.24")
    text = (shared_data / "VIX_cboe.csv").read_text().splitlines()
    assert text[534].startswith("1992-02-11,19.24")
    assert rows[-1].startswith("  … and ")


def test_vix_is_repaired_with_spys_days(shared_data, help, tmp_path):
    """47 opens lie outside their range, 11 of them before SPY's first day."""
    sources.import_file(shared_data / "SPY.csv", "SPY", root=tmp_path, today=help.today)
    spy = sources.load("SPY", root=tmp_path)
    imported = sources.import_file(
        shared_data / "VIX_cboe.csv", "VIX", root=tmp_path, repair=True, calendar=spy.dates, today=help.today
    )  # fmt: skip
    vix = sources.load("VIX", root=tmp_path)
    np.testing.assert_array_equal(vix.dates, spy.dates)
    repairs = dict(line.split(": ", 1) for line in imported.entry.repairs)
    assert (
        repairs["single missing days filled with the bar before, flat at its close"] == f"3 ({' '.join(CBOE_FILLED)})"
    )
    assert repairs["days on which the asset did not trade dropped"].startswith("31 (2004-06-11 2022-05-30 ")
    assert repairs["open clipped into the day's range"].startswith("36 (")
    outside = int(repairs["days outside the calendar's range dropped"].split()[0])
    assert 9235 - 31 - outside + 3 == len(spy)


def test_without_a_calendar_all_47_opens_are_clipped_and_every_day_is_kept(shared_data, help, tmp_path):
    imported = sources.import_file(
        shared_data / "VIX_cboe.csv", "VIX", root=tmp_path, repair=True, today=help.today
    )  # fmt: skip
    (only,) = imported.entry.repairs
    assert only.startswith("open clipped into the day's range: 47 (1992-02-11 ")
    assert imported.entry.rows == 9235
