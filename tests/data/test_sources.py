"""Sources: each ends as the same checked bars, broken rows are reported by line, kept bars are read back unchanged."""

from __future__ import annotations

import datetime
import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fintx.data import bars as bars_module
from fintx.data import snapshots, sources
from fintx.data.bars import PRICES, BadBars, Bars
from fintx.data.sources import DataNotFound
from fintx.errors import FintxError


def assert_equal(a: Bars, b: Bars) -> None:
    assert (a.symbol, a.version) == (b.symbol, b.version)
    for name in ("dates", *PRICES, "volume"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    assert (a.adj_close is None) == (b.adj_close is None)
    if a.adj_close is not None:
        np.testing.assert_array_equal(a.adj_close, b.adj_close)


# --- the embedded history ---------------------------------------------------------------------------------------------


def test_the_embedded_bars_are_those_that_arch_gives():
    code = """
        import hashlib, json, warnings
        warnings.simplefilter("ignore")
        import arch.data.sp500 as source
        frame = source.load()
        print(json.dumps({"columns": list(frame.columns), "dates": [str(day)[:10] for day in frame.index],
                          "values": frame.to_numpy(float).tolist()}))
    """  # in a process of its own: importing arch takes seconds and warns
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    theirs = json.loads(out.stdout)
    bars = sources.embedded()
    assert bars.dates.astype(str).tolist() == theirs["dates"]
    names = {
        "Open": "open",
        "High": "high",
        "Low": "low",
        "Close": "close",
        "Adj Close": "adj_close",
        "Volume": "volume",
    }
    for i, given_ in enumerate(theirs["columns"]):
        np.testing.assert_array_equal(getattr(bars, names[given_]), np.array(theirs["values"])[:, i])
    assert set(theirs["columns"]) == set(names)


def test_the_embedded_bars_keep_the_rules_and_write_nothing(tmp_path):
    bars = sources.load("SPX", root=tmp_path / "data")
    assert (len(bars), str(bars.dates[0]), str(bars.dates[-1])) == (5031, "1999-01-04", "2018-12-31")
    assert bars_module.bar_problems(bars) == []
    assert not (tmp_path / "data").exists()
    assert_equal(sources.load("SPX", root=tmp_path, version=bars.version[:8]), bars)


def test_importing_fintx_sources_does_not_import_arch_or_pandas():
    code = "import sys, fintx.data.sources as s; s.embedded(); print({'arch', 'pandas', 'jax'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


# --- import and load --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_what_is_imported_is_read_back_to_the_last_digit(kind, help, tmp_path):
    bars = help.walk("AAA", 60)
    file = tmp_path / f"x.{kind}"
    if kind == "csv":
        file.write_text(help.csv_text(bars))
    else:
        columns = {name: getattr(bars, name) for name in (*PRICES, "volume", "adj_close")}
        pd.DataFrame(columns, index=pd.DatetimeIndex(bars.dates, name="Date")).to_parquet(file)
    imported = sources.import_file(file, "AAA", root=tmp_path / "data", today=help.today)
    assert imported.is_new and imported.notes == () and imported.entry.version == bars.version
    assert imported.entry.source == f"file x.{kind}"
    assert_equal(sources.load("AAA", root=tmp_path / "data"), bars)
    assert_equal(sources.read_file(file, "AAA", today=help.today), bars)


def test_the_real_files_keep_every_rule(shared_data, help):
    for symbol, first, rows in (("SPY", "1993-01-29", 8396), ("VIX", "1990-01-02", 9206), ("AAPL", "1990-01-02", 7828)):
        bars = sources.read_file(shared_data / f"{symbol}.csv", symbol, today=help.today)
        assert (str(bars.dates[0]), len(bars)) == (first, rows)


def test_a_second_import_is_a_no_op_and_changed_bytes_are_a_new_version(help, tmp_path):
    bars = help.walk("AAA", 60)
    help.keep(tmp_path, bars)
    (first,) = snapshots.all_snapshots(tmp_path, "raw")
    content = (tmp_path / first.path).read_bytes()
    again = sources.import_file(tmp_path / "AAA.csv", "AAA", root=tmp_path, today=help.today)
    assert (again.is_new, again.entry) == (False, first)
    changed = bars_module.make_bars(
        "AAA", bars.dates, **{n: getattr(bars, n) for n in PRICES}, volume=bars.volume + 1, adj_close=bars.adj_close
    )
    help.keep(tmp_path, changed)
    assert len(snapshots.all_snapshots(tmp_path, "raw")) == 2
    assert (tmp_path / first.path).read_bytes() == content
    assert_equal(sources.load("AAA", root=tmp_path), changed)
    assert_equal(sources.load("AAA", root=tmp_path, version=first.version), bars)
    assert_equal(sources.load("AAA", root=tmp_path, version=first.version[:9]), bars)


def test_other_spellings_of_the_same_bars_are_the_same_version(help, tmp_path):
    bars = help.walk("AAA", 60)
    (tmp_path / "b.csv").write_text(help.csv_text(bars).replace("Date,", "date,").replace("\n", "\r\n"))
    help.keep(tmp_path, bars)
    assert not sources.import_file(tmp_path / "b.csv", "AAA", root=tmp_path, today=help.today).is_new


def test_missing_data_are_reported_with_the_command_that_brings_them_in(help, tmp_path):
    help.keep(tmp_path, help.walk("AAA", 60))
    with pytest.raises(
        DataNotFound, match=r"no bars of SPY in .*there: AAA, SPX.*just data import FILE.csv --symbol SPY"
    ):
        sources.load("SPY", root=tmp_path)
    with pytest.raises(DataNotFound, match="AAA: version ffff is not in .*; import it again"):
        sources.load("AAA", root=tmp_path, version="ffff")


@pytest.mark.parametrize("damage", ["missing", "truncated", "other bars"])
def test_a_damaged_snapshot_is_never_loaded(damage, help, tmp_path):
    help.keep(tmp_path, help.walk("AAA", 60), help.walk("BBB", 60))
    path, other = (tmp_path / entry.path for entry in snapshots.all_snapshots(tmp_path, "raw"))
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(other.read_bytes() if damage == "other bars" else path.read_bytes()[:-9])
    with pytest.raises(FintxError, match="run: just verify"):
        sources.load("AAA", root=tmp_path)


def test_a_missing_snapshot_comes_back_with_the_same_file(help, tmp_path):
    bars = help.walk("AAA", 60)
    help.keep(tmp_path, bars)
    (tmp_path / snapshots.all_snapshots(tmp_path, "raw")[0].path).unlink()
    help.keep(tmp_path, bars)
    assert_equal(sources.load("AAA", root=tmp_path), bars)


HOSTILE = ["../../x", "a/b", "", ".", "..", "-rf", "A" * 33, "A\n", "A B", "ＳＰＹ", "a\\b", "\0", "$(x)", "~"]


@pytest.mark.parametrize("symbol", HOSTILE, ids=repr)
def test_a_hostile_symbol_is_refused_before_anything_is_read_or_written(symbol, help, tmp_path):
    (tmp_path / "x.csv").write_text(help.csv_text(help.walk("AAA", 60)))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FintxError, match="wanted 1–32 letters, digits"):
        sources.import_file(tmp_path / "x.csv", symbol, root=tmp_path / "data", today=help.today)
    with pytest.raises(FintxError, match="wanted 1–32 letters, digits"):
        sources.load(symbol, root=tmp_path / "data")
    with pytest.raises(FintxError, match="wanted 1–32 letters, digits"):
        sources.import_yahoo(
            symbol, root=tmp_path / "data", today=help.today, progress=print, download=lambda s, start: 1 / 0,
            wait=lambda s: pytest.fail("asked Yahoo"),
        )  # fmt: skip
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_whose_name_is_no_text_can_be_imported(help, tmp_path):
    path = tmp_path / os.fsdecode(b"\xff x.csv")
    try:
        path.write_text(help.csv_text(help.walk("AAA", 60)))
    except OSError:
        pytest.skip("this file system takes no such name")
    imported = sources.import_file(path, "AAA", root=tmp_path / "data", today=help.today)
    assert imported.entry.source == "file ? x.csv"


# --- rules ------------------------------------------------------------------------------------------------------------


def test_broken_rows_are_reported_by_line_with_their_values(help, tmp_path):
    lines = help.csv_text(help.walk("AAA", 60)).splitlines()
    lines[9] = lines[9].split(",")[0] + ",10,9,8,8.5,8.5,100"
    lines[40] = lines[40].split(",")[0] + ",10,11,9,,10,100"
    (tmp_path / "x.csv").write_text("\n".join(lines))
    with pytest.raises(BadBars) as raised:
        sources.import_file(tmp_path / "x.csv", "AAA", root=tmp_path / "data", today=help.today)
    first, *rows = str(raised.value).splitlines()
    assert first.endswith(
        "x.csv: 2 of 60 rows break a rule; correct them, or import with --repair (and --calendar SYMBOL for its "
        "trading days)"
    )
    day = [line.split(",")[0] for line in lines]
    assert rows == [
        f"  line 10, {day[9]}: high is below open or close (open 10, high 9, low 8, close 8.5)",
        f"  line 41, {day[40]}: close is missing or not a number",
    ]
    assert not (tmp_path / "data").exists()


def test_twenty_rows_are_shown_and_the_rest_counted(help, tmp_path):
    bars = help.walk("AAA", 60)
    (tmp_path / "x.csv").write_text(help.csv_text(replace(bars, low=bars.high * 2)))
    with pytest.raises(BadBars, match="60 of 60 rows break a rule") as raised:
        sources.read_file(tmp_path / "x.csv", "AAA", today=help.today)
    assert str(raised.value).splitlines()[-1] == "  … and 40 more"


COLUMNS = ("Date", "Open", "High", "Low", "Close", "Adj Close", "Volume")
WRONG = {
    "Date": ["", "yesterday", "2010-02-30", "repeat", "after the next", "2999-01-01"],
    "Open": ["", "x", "nan", "inf", "-3", "0", "above high", "below low"],
    "High": ["", "x", "nan", "-inf", "-3", "0", "below low"],
    "Low": ["", "x", "nan", "inf", "-3", "0", "above high"],
    "Close": ["", "x", "nan", "inf", "-3", "0", "above high", "below low"],
    "Adj Close": ["", "x", "nan", "inf", "-3", "0"],
    "Volume": ["", "x", "nan", "inf", "-3"],
}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cell=st.sampled_from([(column, wrong) for column in COLUMNS for wrong in WRONG[column]]), row=st.integers(1, 38)
)  # fmt: skip
def test_any_single_wrong_cell_is_reported(cell, row, help, tmp_path):
    column, wrong = cell
    lines = [line.split(",") for line in help.csv_text(help.walk("AAA", 40)).splitlines()]
    this = lines[row + 1]
    words = {
        "repeat": lines[row][0],
        "after the next": str(np.datetime64(lines[row + 2][0]) + 1),
        "above high": str(float(this[2]) * 1.5),
        "below low": str(float(this[3]) / 1.5),
    }
    this[COLUMNS.index(column)] = words.get(wrong, wrong)
    (tmp_path / "x.csv").write_text("\n".join(",".join(line) for line in lines))
    with pytest.raises(BadBars) as raised:
        sources.read_file(tmp_path / "x.csv", "AAA", today=help.today)
    # A date that is too late is reported where the next row goes back.
    line = row + 3 if wrong in ("after the next", "2999-01-01") else row + 2
    assert f"\n  line {line}, " in str(raised.value)


def test_a_partial_bar_of_today_is_dropped_and_reported(help, tmp_path):
    bars = help.walk("AAA", 60)
    (tmp_path / "x.csv").write_text(help.csv_text(bars))
    today = bars.dates[-1].astype(datetime.date)
    imported = sources.import_file(tmp_path / "x.csv", "AAA", root=tmp_path, today=today)
    assert imported.notes == (f"1 bar(s) dated {today} or later dropped: that day is not over",)
    loaded = sources.load("AAA", root=tmp_path)
    np.testing.assert_array_equal(loaded.dates, bars.dates[:-1])
    yesterday = bars_module.make_bars(
        "AAA", bars.dates[:-1], **{n: getattr(bars, n)[:-1] for n in (*PRICES, "volume", "adj_close")}
    )  # fmt: skip
    assert loaded.version == yesterday.version  # as if the file had ended there
    later = sources.import_file(tmp_path / "x.csv", "AAA", root=tmp_path, today=today + datetime.timedelta(1))
    assert later.notes == () and later.entry.rows == 60


def test_todays_bar_of_a_file_that_begins_with_the_newest_is_dropped_too(help, tmp_path):
    bars = help.walk("AAA", 60)
    lines = help.csv_text(bars).splitlines()
    (tmp_path / "x.csv").write_text("\n".join([lines[0], *reversed(lines[1:])]))
    today = bars.dates[-1].astype(datetime.date)
    imported = sources.import_file(tmp_path / "x.csv", "AAA", root=tmp_path, repair=True, today=today)
    assert imported.entry.last_date == str(bars.dates[-2])
    with pytest.raises(BadBars, match="\n  line 4, "):
        sources.read_file(tmp_path / "x.csv", "AAA", today=today)


@pytest.mark.parametrize("text", ["Date,Open,High,Low,Close\n", "Date,Open,High,Low,Close\n2026-12-24,1,1,1,1\n"])
def test_a_file_without_a_complete_bar_is_refused(text, help, tmp_path):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(FintxError, match="x.csv: holds no complete bar; wanted daily rows before 2026-11-01"):
        sources.import_file(tmp_path / "x.csv", "AAA", root=tmp_path, today=help.today)


def test_a_source_without_volume_says_so(help, tmp_path):
    (tmp_path / "x.csv").write_text("Date,Open,High,Low,Close\n2024-01-02,1,1,1,1\n2024-01-03,1,1,1,1\n")
    imported = sources.import_file(tmp_path / "x.csv", "AAA", root=tmp_path, today=help.today)
    assert imported.notes == ("the source has no volume; it is kept as 0",)
    bars = sources.load("AAA", root=tmp_path)
    assert bars.volume.tolist() == [0.0, 0.0] and bars.adj_close is None


def test_the_version_is_of_every_value_and_of_nothing_else(help):
    bars = help.walk("AAA", 60)
    columns = {name: getattr(bars, name) for name in (*PRICES, "volume", "adj_close")}
    for name, column in columns.items():
        moved = column.copy()
        moved[30] = np.nextafter(moved[30], np.inf)
        assert bars_module.make_bars("AAA", bars.dates, **columns | {name: moved}).version != bars.version
    assert bars_module.make_bars("AAA", bars.dates + 1, **columns).version != bars.version
    assert bars_module.make_bars("AAA", bars.dates, **columns | {"adj_close": None}).version != bars.version
    assert bars_module.make_bars("BBB", bars.dates, **columns).version == bars.version


def test_between_is_inclusive_and_keeps_the_version(help):
    bars = help.walk("AAA", 60)
    some = bars.between(bars.dates[5].astype(datetime.date), bars.dates[9].astype(datetime.date))
    np.testing.assert_array_equal(some.dates, bars.dates[5:10])
    np.testing.assert_array_equal(some.adj_close, bars.adj_close[5:10])
    assert some.version == bars.version and len(bars.between(None, None)) == 60


# --- Yahoo ------------------------------------------------------------------------------------------------------------


def yahoo_frame(bars: Bars) -> pd.DataFrame:
    """As yfinance.Ticker.history(auto_adjust=False, actions=False) gives it."""
    index = pd.DatetimeIndex(bars.dates, name="Date").tz_localize("America/New_York")
    columns = {name.title(): getattr(bars, name) for name in PRICES}
    return pd.DataFrame(
        columns | {"Adj Close": bars.adj_close, "Volume": bars.volume.astype(np.int64)}, index=index
    )  # fmt: skip


def test_bars_of_yahoo_are_kept_under_the_plain_name(help, tmp_path):
    bars, asked, lines = help.walk("VIX", 60), [], []

    def download(symbol, start):
        asked.append((symbol, start))
        return yahoo_frame(bars)

    imported = sources.import_yahoo(
        "^VIX", root=tmp_path, start="2010-01-01", today=help.today, progress=lines.append, download=download
    )
    assert asked == [("^VIX", "2010-01-01")] and lines == ["Yahoo ^VIX: try 1 of 4 …"]
    assert (imported.entry.name, imported.entry.source, imported.is_new) == ("VIX.OHLCV.daily", "Yahoo ^VIX", True)
    assert_equal(sources.load("VIX", root=tmp_path), bars)


def test_a_download_during_the_session_keeps_no_partial_bar(help, tmp_path):
    bars = help.walk("AAA", 60)
    imported = sources.import_yahoo(
        "AAA", root=tmp_path, today=bars.dates[-1].astype(datetime.date), progress=print,
        download=lambda symbol, start: yahoo_frame(bars),
    )  # fmt: skip
    assert imported.entry.rows == 59 and "that day is not over" in imported.notes[0]


def test_a_download_that_fails_twice_is_tried_again_after_longer_and_longer_waits(help, tmp_path):
    bars, waited = help.walk("AAA", 60), []
    answers = iter([ConnectionError("cut off"), None, yahoo_frame(bars)])

    def download(symbol, start):
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    sources.import_yahoo(
        "AAA", root=tmp_path, today=help.today, progress=print, download=download, wait=waited.append
    )  # fmt: skip
    assert waited == [2.0, 4.0]
    assert_equal(sources.load("AAA", root=tmp_path), bars)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [(OSError("no route\nto host"), "no route"), (pd.DataFrame(), "it sent no bars"), (TimeoutError(), "TimeoutError")],
    ids=["offline", "unknown symbol", "timeout"],
)
def test_a_download_that_never_comes_is_one_clear_line(answer, reason, help, tmp_path):
    lines: list[str] = []

    def download(symbol, start):
        if isinstance(answer, Exception):
            raise answer
        return answer

    with pytest.raises(FintxError) as raised:
        sources.import_yahoo(
            "AAA", root=tmp_path, today=help.today, progress=lines.append, download=download, wait=lambda s: None
        )  # fmt: skip
    assert str(raised.value) == (
        f"Yahoo AAA: no bars after 4 tries ({reason}); check the network and the symbol, or import a CSV file: "
        "just data import FILE.csv --symbol NAME"
    )
    assert lines == [f"Yahoo AAA: try {k} of 4 …" for k in (1, 2, 3, 4)]
    assert list(tmp_path.iterdir()) == []


def test_broken_bars_of_yahoo_are_refused(help, tmp_path):
    frame = yahoo_frame(help.walk("AAA", 60))
    frame.iloc[5, 1] = np.nan
    with pytest.raises(
        BadBars, match="Yahoo AAA: 1 of 60 rows break a rule; save them as CSV .*\n  row 6, .*: high is"
    ):
        sources.import_yahoo("AAA", root=tmp_path, today=help.today, progress=print, download=lambda s, t: frame)


@pytest.mark.skipif(importlib.util.find_spec("yfinance") is None, reason="the extra `yahoo` is not installed")
def test_yfinance_without_a_network_ends_in_that_line(tmp_path):
    """The real library, behind a proxy that nobody answers; in a process of its own, for it warns and caches."""
    code = """
        import datetime, sys
        from pathlib import Path
        from fintx.data import sources
        from fintx.errors import FintxError
        import yfinance
        yfinance.set_tz_cache_location(sys.argv[1])
        try:
            sources.import_yahoo("SPY", root=Path(sys.argv[2]), today=datetime.date(2026, 11, 1), progress=print,
                                 wait=lambda s: None)
        except FintxError as error:
            print("error:", error)
"""
    dead = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")
    quiet = {key: value for key, value in os.environ.items() if key.upper() != "NO_PROXY"} | dead
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "cache"), str(tmp_path / "data")],
        capture_output=True, text=True, env=quiet, timeout=120,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    last = out.stdout.splitlines()[-1]
    assert last.startswith("error: Yahoo SPY: no bars after 4 tries (") and "check the network" in last
    assert "it sent no bars" not in last  # the cause is given
    assert not (tmp_path / "data").exists()


def test_without_yfinance_the_extra_is_named(help, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "yfinance", None)
    with pytest.raises(FintxError, match="Yahoo needs the extra `yahoo`: give the command as uv run --extra yahoo"):
        sources.import_yahoo("SPY", root=tmp_path, today=help.today, progress=print)
