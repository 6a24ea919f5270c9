"""File formats: the dates, prices and volumes of CSV and Parquet files, whose columns are named in many ways."""

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

from fintx.data.bars import Bars, make_bars
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
    lines: np.ndarray | None = None
    """(T,) line of each row in the file; None where the source has no lines."""

    def take(self, rows: np.ndarray) -> PriceColumns:
        """The same columns at the given rows alone."""
        columns = {name: column[rows] for name, column in self.columns.items()}
        return PriceColumns(self.dates[rows], columns, None if self.lines is None else self.lines[rows])

    def to_bars(self, symbol: str) -> Bars:
        """Bars, unchecked; volume is 0 where the source has none."""
        return make_bars(symbol, self.dates, **{"volume": np.zeros(len(self.dates))} | self.columns)


def read(path: Path) -> PriceColumns:
    """Read a CSV or Parquet file.

    Raises:
        FintxError: it is missing, is neither, or lacks a column; says which columns were wanted and found.
    """
    if not path.is_file():
        reason = "is a folder" if path.is_dir() else "is not there"
        raise FintxError(f"{path}: {reason}; wanted a CSV or Parquet file of daily bars")
    if path.suffix.lower() in (".parquet", ".pq"):
        return _read_parquet(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise FintxError(f"{path}: is no UTF-8 text (byte {error.start}); wanted a CSV file of daily bars") from None
    except OSError as error:
        raise FintxError(f"{path}: can't be read: {error.strerror}") from None
    if "\0" in text:
        raise FintxError(f"{path}: holds binary data; wanted a CSV file of daily bars (Parquet files end in .parquet)")
    return parse_csv(text, where=str(path))


def from_frame(frame: Any, *, where: str) -> PriceColumns:
    """Read a pandas frame as yfinance gives it: a date index, columns one level or (price, symbol)."""
    names = [str(column[0] if isinstance(column, tuple) else column) for column in frame.columns]
    matched = _match(names, where=where, needs_date=False)
    index = frame.index
    naive = index.tz_localize(None) if getattr(index, "tz", None) is not None else index
    columns = {name: frame.iloc[:, names.index(column)].to_numpy(np.float64) for name, column in matched.items()}
    return PriceColumns(naive.to_numpy().astype("datetime64[D]"), columns)


def parse_csv(text: str, *, where: str) -> PriceColumns:
    """Read a CSV text.

    Raises:
        FintxError: it is no CSV, empty, or lacks a column.
    """
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    reader = csv.reader(io.StringIO(text), delimiter=delimiter)
    try:
        rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise FintxError(f"{where}: is no CSV file: {error}") from None
    if not rows:
        raise FintxError(f"{where}: is empty; wanted a header line and daily bars")
    header, body = [cell.strip() for cell in rows[0][1]], rows[1:]
    # The CSV that yfinance writes has three header lines: Price …, Ticker …, Date ….
    if header[0] == "Price" and len(rows) > 2 and rows[1][1][0].strip() == "Ticker":
        header, body = ["Date", *header[1:]], rows[3:]
    place = {name: header.index(column) for name, column in _match(header, where=where).items()}
    cells = {name: [row[i] if i < len(row) else "" for _, row in body] for name, i in place.items()}
    dates = _dates(cells.pop("dates"))
    # Where semicolons part the columns a comma may be the decimal point: such numbers are refused, not guessed.
    columns = {name: np.array([_number(cell, commas=delimiter == ",") for cell in cells[name]]) for name in cells}
    return PriceColumns(dates, columns, np.array([line for line, _ in body], int))


def _match(names: Sequence[str], *, where: str, needs_date: bool = True) -> dict[str, str]:
    """fintx's column name → the file's."""
    by_spelling: dict[str, list[str]] = {}
    for name in names:
        by_spelling.setdefault(re.sub(r"[^a-z0-9]", "", name.lower()), []).append(name)
    matched = {}
    for column, spellings in _SPELLINGS.items():
        candidates = next((by_spelling[spelling] for spelling in spellings if spelling in by_spelling), [])
        if len(candidates) > 1:
            raise FintxError(
                f"{where}: has {len(candidates)} columns {candidates[0]} (several symbols in one file?); "
                "wanted one Date, Open, High, Low, Close: save each symbol in a file of its own"
            )
        if candidates:
            matched[column] = candidates[0]
    missing = [name.removesuffix("s") for name in _REQUIRED if name not in matched and (needs_date or name != "dates")]
    if missing:
        raise FintxError(
            f"{where}: has no column {', '.join(missing)} (found: {', '.join(map(str, names)) or 'none'}); "
            "wanted Date, Open, High, Low, Close and, if known, Adj Close, Volume"
        )
    return matched


def _dates(texts: Sequence[str]) -> np.ndarray:
    """Dates of a column: 2024-01-31, 20240131 or, where the column shows which number is the month, 1/31/2024."""
    slashed = [match.groups() if (match := _SLASHED.fullmatch(text.strip())) else None for text in texts]
    if not any(slashed):
        return np.array([_date(text) for text in texts], "datetime64[D]")
    largest = [max(int(parts[place]) for parts in slashed if parts) for place in (0, 1)]
    if min(largest) > 12 or max(largest) <= 12:  # neither number can be the month, or both can: no date can be read
        return np.full(len(texts), np.datetime64("NaT"), "datetime64[D]")
    month = int(np.argmin(largest))
    iso = [f"{p[2]}-{p[month]:0>2}-{p[1 - month]:0>2}" if p else "" for p in slashed]
    return np.array([_date(text) for text in iso], "datetime64[D]")


def _date(text: str) -> np.datetime64:
    """The date a bar was made on, in its exchange's own time: the day that is written, whatever the zone."""
    match = _DATE.fullmatch(text.strip())
    try:
        return np.datetime64("-".join(match.groups())) if match else np.datetime64("NaT")
    except ValueError:
        return np.datetime64("NaT")


def _number(text: str, *, commas: bool) -> float:
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
    matched = _match(table.column_names, where=str(path))
    dates = _parquet_dates(table[matched["dates"]], f"{path}: column {matched.pop('dates')}")
    columns = {}
    for name, title in matched.items():
        column = table[title]
        if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
            raise FintxError(f"{path}: column {title} holds {column.type}; wanted numbers")
        columns[name] = column.cast(pa.float64()).fill_null(float("nan")).to_numpy()
    return PriceColumns(dates, columns)


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
