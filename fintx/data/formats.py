"""Which columns of a file are the date, the prices and the volume? CSV and Parquet in their usual spellings."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from fintx.errors import FintxError
from fintx.types import Floats

_SPELLINGS = {
    "dates": ("date", "datetime", "timestamp", "time", "day", "index", "unnamed0", "indexlevel0", ""),
    "open": ("open",),
    "high": ("high",),
    "low": ("low",),
    "close": ("close",),
    "adj_close": ("adjclose", "adjustedclose", "closeadj", "closeadjusted"),
    "volume": ("volume", "vol"),
}
_REQUIRED = ("dates", "open", "high", "low", "close")
_SLASHED = re.compile(r"(\d{1,2})/(\d{1,2})/(\d{4})")
_THOUSANDS = re.compile(r"\s*-?\d{1,3}(,\d{3})+(\.\d*)?\s*")
_DATE = re.compile(r"(\d{4})-?(\d{2})-?(\d{2})(?:[T ].*)?")


@dataclass(frozen=True)
class PriceColumns:
    """Columns under fintx's names, unchecked."""

    dates: np.ndarray
    """(T,) datetime64[D]; NaT where the text is no date."""
    columns: dict[str, Floats]
    """open, high, low, close, and volume and adj_close where the source has them; NaN where the text is no number."""
    lines: np.ndarray
    """(T,) line of each row in the file."""


def read(path: Path) -> PriceColumns:
    """Read a CSV or Parquet file.

    Raises:
        FintxError: it is missing, is neither, or lacks a column; says which columns were wanted and found.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is not there"
        raise FintxError(f"{path}: {what}; wanted a CSV or Parquet file of daily bars")
    if path.suffix.lower() in (".parquet", ".pq"):
        return _read_parquet(path)
    return _read_csv(path)


def from_frame(frame: Any, *, where: str) -> PriceColumns:
    """Read a pandas frame as yfinance gives it: a date index, columns one level or (price, symbol)."""
    names = [str(column[0] if isinstance(column, tuple) else column) for column in frame.columns]
    found = _match(names, where=where, needs_date=False)
    index = frame.index
    naive = index.tz_localize(None) if getattr(index, "tz", None) is not None else index
    dates = naive.to_numpy().astype("datetime64[D]")
    values = {name: frame.iloc[:, names.index(given)].to_numpy(np.float64) for name, given in found.items()}
    return PriceColumns(dates, values, np.arange(1, len(dates) + 1))


def _match(names: Sequence[str], *, where: str, needs_date: bool = True) -> dict[str, str]:
    """fintx's column name → the file's."""
    plain: dict[str, list[str]] = {}
    for name in names:
        plain.setdefault(re.sub(r"[^a-z0-9]", "", name.lower()), []).append(name)
    found = {}
    for wanted, spellings in _SPELLINGS.items():
        given = next((plain[spelling] for spelling in spellings if spelling in plain), [])
        if len(given) > 1:
            raise FintxError(
                f"{where}: has {len(given)} columns {given[0]} (several symbols in one file?); "
                "wanted one Date, Open, High, Low, Close: save each symbol in a file of its own"
            )
        if given:
            found[wanted] = given[0]
    missing = [name.removesuffix("s") for name in _REQUIRED if name not in found and (needs_date or name != "dates")]
    if missing:
        raise FintxError(
            f"{where}: has no column {', '.join(missing)} (found: {', '.join(map(str, names)) or 'none'}); "
            "wanted Date, Open, High, Low, Close and, if known, Adj Close, Volume"
        )
    return found


def _read_csv(path: Path) -> PriceColumns:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise FintxError(f"{path}: is no UTF-8 text (byte {error.start}); wanted a CSV file of daily bars") from None
    except OSError as error:
        raise FintxError(f"{path}: can't be read: {error.strerror}") from None
    if "\0" in text:
        raise FintxError(f"{path}: holds binary data; wanted a CSV file of daily bars (Parquet files end in .parquet)")
    return parse_csv(text, where=str(path))


def parse_csv(text: str, *, where: str) -> PriceColumns:
    """The table of a CSV text.

    Raises:
        FintxError: it is no CSV, empty, or lacks a column.
    """
    try:
        rows = [(number, row) for number, row in _numbered(text) if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise FintxError(f"{where}: is no CSV file: {error}") from None
    if not rows:
        raise FintxError(f"{where}: is empty; wanted a header line and daily bars")
    header, rows = _header(rows)
    found = _match(header, where=where)
    place = {name: header.index(given) for name, given in found.items()}
    cells = {name: [row[i] if i < len(row) else "" for _, row in rows] for name, i in place.items()}
    dates = _dates(cells.pop("dates"))
    # Where semicolons part the columns a comma may be the decimal point: such numbers are refused, not guessed.
    commas = _delimiter(text) == ","
    columns = {name: np.array([_number(cell, commas) for cell in column]) for name, column in cells.items()}
    return PriceColumns(dates, columns, np.array([number for number, _ in rows], int))


def _numbered(text: str) -> list[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text), delimiter=_delimiter(text))
    return [(reader.line_num, row) for row in reader]


def _delimiter(text: str) -> str:
    head = text.partition("\n")[0]
    return max(",;\t", key=head.count)


def _header(rows: list[tuple[int, list[str]]]) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header line, and the rows below it. yfinance's own CSV has three: Price …, Ticker …, Date …."""
    first = [cell.strip() for cell in rows[0][1]]
    if first[0] == "Price" and len(rows) > 2 and rows[1][1][0].strip() == "Ticker":
        return ["Date", *first[1:]], rows[3:]
    return first, rows[1:]


def _dates(texts: Sequence[str]) -> np.ndarray:
    """Dates of a column: 2024-01-31, 20240131 or, where the column shows which number is the month, 1/31/2024."""
    slashed = [match.groups() if (match := _SLASHED.fullmatch(text.strip())) else None for text in texts]
    if not any(slashed):
        return np.array([_date(text) for text in texts], "datetime64[D]")
    months = [max((int(parts[place]) for parts in slashed if parts), default=0) for place in (0, 1)]
    if min(months) > 12 or max(months) <= 12:  # no month there, or no telling which: no date can be read
        return np.full(len(texts), np.datetime64("NaT"), "datetime64[D]")
    month = int(np.argmin(months))
    iso = [f"{p[2]}-{p[month]:0>2}-{p[1 - month]:0>2}" if p else "" for p in slashed]
    return np.array([_date(text) for text in iso], "datetime64[D]")


def _date(text: str) -> np.datetime64:
    """The date a bar was made on, in its exchange's own time: the day that is written, whatever the zone."""
    match = _DATE.fullmatch(text.strip())
    try:
        return np.datetime64("-".join(match.groups())) if match else np.datetime64("NaT")
    except ValueError:
        return np.datetime64("NaT")


def _number(text: str, commas: bool) -> float:
    """NaN where the text is no number; with `commas` 1,234,500.5 is one."""
    if commas and _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    try:
        return float("nan" if "_" in text else text)
    except ValueError:
        return float("nan")


def _read_parquet(path: Path) -> PriceColumns:
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        reason = str(error).partition("\n")[0]
        raise FintxError(f"{path}: is no readable Parquet file ({reason})") from None
    found = _match(table.column_names, where=str(path))
    columns = {}
    for name, given in found.items():
        if name == "dates":
            continue
        column = table[given]
        if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
            raise FintxError(f"{path}: column {given} holds {column.type}; wanted numbers")
        columns[name] = column.cast(pa.float64()).fill_null(float("nan")).to_numpy()
    dates = _parquet_dates(table[found["dates"]], f"{path}: column {found['dates']}")
    return PriceColumns(dates, columns, np.arange(1, table.num_rows + 1))


def _parquet_dates(column: pa.ChunkedArray, where: str) -> np.ndarray:
    if pa.types.is_timestamp(column.type):
        # A zone means instants: the day is the one on the exchange's clock, so shift to local time before cutting.
        local = pa.compute.local_timestamp(column) if column.type.tz else column
        return local.to_numpy().astype("datetime64[D]")
    if pa.types.is_date(column.type):
        return column.cast(pa.date32()).to_numpy().astype("datetime64[D]")
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return _dates([text or "" for text in column.to_pylist()])
    raise FintxError(f"{where} holds {column.type}; wanted dates, timestamps or text like 2024-01-31")
