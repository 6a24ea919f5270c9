"""File formats: bars in many spellings of columns and dates; what is ambiguous is refused, not guessed."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fintx.data import formats
from fintx.errors import FintxError

DATES = np.array(["2024-01-30", "2024-01-31", "2024-02-01"], "datetime64[D]")
EXPECTED = {
    "open": [10.0, 11.0, 12.5],
    "high": [11.0, 12.0, 13.0],
    "low": [9.0, 10.0, 11.0],
    "close": [10.5, 11.5, 12.0],
    "volume": [1000.0, 2000.0, 1500.0],
    "adj_close": [10.25, 11.25, 11.75],
}
BODY = """2024-01-30,10,11,9,10.5,10.25,1000
2024-01-31,11,12,10,11.5,11.25,2000
2024-02-01,12.5,13,11,12,11.75,1500
"""


def assert_read(table: formats.PriceColumns, *, columns=tuple(EXPECTED)) -> None:
    np.testing.assert_array_equal(table.dates, DATES)
    assert set(table.columns) == set(columns)
    for name in columns:
        assert table.columns[name].dtype == np.float64
        assert table.columns[name].tolist() == EXPECTED[name], name


def parse(text: str) -> formats.PriceColumns:
    return formats.parse_csv(text, where="x.csv")


@pytest.mark.parametrize(
    "header",
    [
        "Date,Open,High,Low,Close,Adj Close,Volume",
        "date,open,high,low,close,adj_close,volume",
        "DATETIME,OPEN,HIGH,LOW,CLOSE,ADJ CLOSE,VOLUME",
        "Timestamp,Open,High,Low,Close,Adjusted Close,Vol",
        '"Date","Open","High","Low","Close","Adj. Close","Volume"',
        ",Open,High,Low,Close,Adj Close,Volume",
        "Unnamed: 0,Open,High,Low,Close,AdjClose,Volume",
        " Date , Open , High , Low , Close , Close (adj) , Volume ",
        "\ufeffDate,Open,High,Low,Close,Adj Close,Volume",
    ],
    ids=["yahoo", "lower", "upper", "vol", "quoted", "pandas", "unnamed", "blanks", "byte order mark"],
)
def test_csv_headers(header, tmp_path):
    path = tmp_path / "x.csv"
    path.write_text(f"{header}\n{BODY}", encoding="utf-8")
    assert_read(formats.read(path))


@pytest.mark.parametrize(
    "first",
    [
        "2024-01-30 00:00:00",
        "2024-01-30T00:00:00",
        "2024-01-30 00:00:00-05:00",
        "2024-01-30 16:00:00+00:00",
        "20240130",
    ],
)
def test_dates_are_the_day_that_is_written(first):
    assert_read(parse("Date,Open,High,Low,Close,Adj Close,Volume\n" + BODY.replace("2024-01-30", first)))


def test_slashed_dates_whose_days_show_which_number_is_the_month():
    american = BODY.replace("2024-01-30", "1/30/2024").replace("2024-01-31", "01/31/2024")
    assert_read(parse("Date,Open,High,Low,Close,Adj Close,Volume\n" + american.replace("2024-02-01", "2/1/2024")))
    british = BODY.replace("2024-01-30", "30/1/2024").replace("2024-01-31", "31/01/2024")
    assert_read(parse("Date,Open,High,Low,Close,Adj Close,Volume\n" + british.replace("2024-02-01", "1/2/2024")))


@pytest.mark.parametrize("dates", [["1/2/2024", "3/4/2024"], ["13/13/2024", "1/2/2024"], ["30/1/2024", "1/30/2024"]])
def test_slashed_dates_that_could_be_either_are_no_dates(dates):
    text = "Date,Open,High,Low,Close\n" + "".join(f"{day},1,1,1,1\n" for day in dates)
    assert np.isnat(parse(text).dates).all()


@pytest.mark.parametrize("text", ["2024-02-30", "2024-13-01", "yesterday", "", "02-01-2024", "1706572800", "nan"])
def test_what_is_no_date_is_no_date(text):
    assert np.isnat(parse(f"Date,Open,High,Low,Close\n2024-01-30,1,1,1,1\n{text},1,1,1,1\n").dates).tolist() == [
        False,
        True,
    ]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_delimiters(delimiter):
    text = ("Date,Open,High,Low,Close,Adj Close,Volume\n" + BODY).replace(",", delimiter)
    assert_read(parse(text))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ('"1,234,500.5"', 1234500.5), ('"12,345"', 12345.0), (" 7 ", 7.0), ("1e3", 1000.0), ('"1,23"', None),
        ("1_000", None), ("", None), ("$5", None), ("null", None), ('"1,2345"', None),
    ],
)  # fmt: skip
def test_numbers(text, number):
    parsed = parse(f"Date,Open,High,Low,Close,Volume\n2024-01-30,1,1,1,1,{text}\n").columns["volume"][0]
    assert np.isnan(parsed) if number is None else parsed == number


def test_a_decimal_comma_is_refused_and_not_read_as_thousands():
    columns = parse("Date;Open;High;Low;Close\n2024-01-30;17,250;17,5;17,000;17,1\n").columns
    assert all(np.isnan(column).all() for column in columns.values())


def test_lines_are_those_of_the_file_past_blank_lines_and_quoted_breaks():
    text = 'Date,Open,High,Low,Close,Note\n2024-01-30,1,1,1,1,"two\nlines"\n\n2024-01-31,1,1,1,1,\n'
    table = parse(text)
    assert table.lines.tolist() == [3, 5]


def test_a_short_row_misses_its_last_cells_alone():
    table = parse("Date,Open,High,Low,Close,Volume\n2024-01-30,1,1,1,1,5\n2024-01-31,2,2,2\n")
    assert table.columns["low"].tolist() == [1.0, 2.0]
    assert np.isnan(table.columns["close"][1]) and np.isnan(table.columns["volume"][1])


def test_yfinances_own_csv_has_three_header_lines():
    head = (
        "Price,Open,High,Low,Close,Adj Close,Volume\nTicker,SPY,SPY,SPY,SPY,SPY,SPY\n"
        "Date,,,,,,\n"
    )  # fmt: skip
    table = parse(head + BODY)
    assert_read(table)
    assert table.lines.tolist() == [4, 5, 6]


def test_a_file_of_several_symbols_is_refused():
    head = "Price,Open,High,Low,Close,Close,Volume\nTicker,QQQ,QQQ,QQQ,QQQ,SPY,QQQ\nDate,,,,,,\n"
    with pytest.raises(FintxError, match=r"x.csv: has 2 columns Close \(several symbols in one file"):
        parse(head + BODY)


def test_what_pandas_writes_is_read_back(tmp_path):
    frame = pd.DataFrame({k: EXPECTED[k] for k in ("open", "high", "low", "close", "volume", "adj_close")}, index=DATES)
    frame.index.name = "Date"
    frame.to_csv(tmp_path / "named.csv")
    frame.rename_axis(None).to_csv(tmp_path / "unnamed.csv")
    frame.reset_index().to_csv(tmp_path / "numbered.csv")
    for name in ("named", "unnamed", "numbered"):
        assert_read(formats.read(tmp_path / f"{name}.csv"))


@pytest.mark.parametrize(
    "index",
    [
        pd.DatetimeIndex(DATES, name="Date"),
        pd.DatetimeIndex(DATES),
        pd.DatetimeIndex(DATES).tz_localize("America/New_York").rename("Date"),
        (pd.DatetimeIndex(DATES) + pd.Timedelta("20h")).tz_localize("America/New_York").rename("Date"),
        pd.DatetimeIndex(DATES).tz_localize("Asia/Tokyo").rename("Datetime"),
        pd.Index(DATES.astype(str), name="date"),
        pd.Index(DATES.tolist(), name="date"),
    ],
    ids=["named", "unnamed", "New York", "New York at 20:00", "Tokyo", "text", "python dates"],
)
def test_parquet_files_of_pandas(index, tmp_path):
    frame = pd.DataFrame({k: EXPECTED[k] for k in ("open", "high", "low", "close", "volume", "adj_close")}, index=index)
    frame.to_parquet(tmp_path / "x.parquet")
    assert_read(formats.read(tmp_path / "x.parquet"))


def arrow(**changes) -> pa.Table:
    columns = {"Date": pa.array(DATES)} | {k.title(): pa.array(EXPECTED[k]) for k in ("open", "high", "low", "close")}
    return pa.table(columns | changes)


def test_parquet_without_volume_and_with_whole_numbers_and_gaps(tmp_path):
    pq.write_table(arrow(High=pa.array([11, 12, None])), tmp_path / "x.pq")
    table = formats.read(tmp_path / "x.pq")
    assert table.columns["high"][:2].tolist() == [11.0, 12.0] and np.isnan(table.columns["high"][2])
    assert "volume" not in table.columns


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (arrow(High=pa.array(["a", "b", "c"])), "column High holds string; wanted numbers"),
        (arrow(Date=pa.array([1, 2, 3])), "column Date holds int64; wanted dates"),
        (arrow().drop_columns(["Low", "Date"]), r"has no column date, low \(found: Open, High, Close\)"),
    ],
    ids=["text", "numbers for dates", "missing"],
)
def test_parquet_files_that_are_refused(table, words, tmp_path):
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(FintxError, match=words):
        formats.read(tmp_path / "x.parquet")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.csv", b"Date,Open,High,Close\n", r"x.csv: has no column low \(found: Date, Open, High, Close\); wanted"),
        ("x.csv", b"", "is empty"),
        ("x.csv", b"\n\n", "is empty"),
        ("x.csv", b"\xff\xfe\x00D", "is no UTF-8 text"),
        ("x.csv", b"Date\0,Open\n", "holds binary data"),
        ("x.csv", b"PK\x03\x04 hello", "has no column"),
        ("x.parquet", b"PAR1 and then nothing", "is no readable Parquet file"),
        ("x.parquet", b"", "is no readable Parquet file"),
    ],
    ids=["column", "empty", "blank", "utf-16", "nul", "zip", "truncated", "empty parquet"],
)
def test_files_that_are_no_bars_are_refused_with_one_line(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FintxError, match=words) as raised:
        formats.read(tmp_path / name)
    assert "\n" not in str(raised.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(FintxError, match="none.csv: is not there; wanted a CSV or Parquet file"):
        formats.read(tmp_path / "none.csv")
    with pytest.raises(FintxError, match="is a folder"):
        formats.read(tmp_path)


def test_a_frame_as_yfinance_gives_it():
    index = pd.DatetimeIndex(DATES).tz_localize("America/New_York")
    names = {
        "open": "Open",
        "high": "High",
        "low": "Low",
        "close": "Close",
        "adj_close": "Adj Close",
        "volume": "Volume",
    }
    frame = pd.DataFrame({given: EXPECTED[name] for name, given in names.items()}, index=index)
    assert_read(formats.from_frame(frame, where="Yahoo"))
    frame.columns = pd.MultiIndex.from_product([frame.columns, ["SPY"]])
    assert_read(formats.from_frame(frame, where="Yahoo"))
    both = pd.concat([frame, frame], axis=1)
    with pytest.raises(FintxError, match="has 2 columns Open"):
        formats.from_frame(both, where="Yahoo")
