"""Sources of bars: the embedded index, CSV and Parquet files, Yahoo; each ends as the same checked `Bars`."""

from __future__ import annotations

import datetime
import functools
import gzip
import importlib.util
import logging
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fintx.config.schema import DataConfig
from fintx.data import formats, snapshots
from fintx.data.bars import Bars, Repaired, check_bars, make_bars, repair_bars
from fintx.data.formats import PriceColumns
from fintx.data.snapshots import Snapshot
from fintx.errors import FintxError

EMBEDDED = "SPX"
"""S&P 500 index, 1999–2018, that ships inside the `arch` package: needs no network and no import."""

_SYMBOL = re.compile(r"[A-Za-z0-9^][A-Za-z0-9^._=-]{0,31}")
_TRIES, _BACKOFF_S = 4, 2.0

Download = Callable[[str, str | None], Any]
"""(symbol, first date or None) → a frame as yfinance gives it."""


class DataNotFound(FintxError):
    """No bars of that symbol or version."""


@dataclass(frozen=True)
class Imported:
    """The outcome of an import."""

    entry: Snapshot
    is_new: bool
    notes: tuple[str, ...]
    """Dropped and repaired rows, one line each."""


def dataset_name(symbol: str) -> str:
    """SPY → SPY.OHLCV.daily.

    Raises:
        FintxError: not a symbol (letters, digits and ^ . _ = -, at most 32).
    """
    if _SYMBOL.fullmatch(symbol) is None:
        raise FintxError(f"--symbol {symbol[:40]!r}: wanted 1–32 letters, digits or ^ . _ = - such as SPY or BRK-B")
    return f"{symbol}.OHLCV.daily"


# --- loading ----------------------------------------------------------------------------------------------------------


def load_pinned(data: DataConfig, symbols: Iterable[str], root: Path) -> dict[str, Bars]:
    """Symbol → its bars, in the version that a config names, else the newest; raises as `load`."""
    return {symbol: load(symbol, root=root, version=data.versions.get(symbol)) for symbol in symbols}


def load(symbol: str, *, root: Path, version: str | None = None) -> Bars:
    """Bars that were imported before, or the embedded ones.

    Args:
        root: the data folder.
        version: a version or the beginning of one; None: the newest.

    Raises:
        DataNotFound: no such symbol or version, with the command that brings it in.
        FintxError: its file is missing or changed.
    """
    name, manifest = dataset_name(symbol), snapshots.all_snapshots(root, "raw")
    versions = [entry for entry in manifest if entry.name == name]
    matching = [entry for entry in versions if entry.version.startswith(version or "")]
    if matching:
        return _read_snapshot(root, matching[-1], symbol)
    if symbol == EMBEDDED and embedded().version.startswith(version or ""):
        return embedded()
    if version is not None:
        there = ", ".join(entry.version[:12] for entry in versions) or "none"
        raise DataNotFound(f"{symbol}: version {version[:12]} is not in {root} (there: {there}); import it again")
    symbols = sorted({entry.name.split(".OHLCV")[0] for entry in manifest} | {EMBEDDED})
    raise DataNotFound(
        f"data.assets/context: no bars of {symbol} in {root} (there: {', '.join(symbols)}); "
        f"bring them in: just data import FILE.csv --symbol {symbol}, or: just data yahoo {symbol}"
    )


def _read_snapshot(root: Path, entry: Snapshot, symbol: str) -> Bars:
    path = root / entry.path
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid):
        raise FintxError(f"{path}: a kept snapshot is missing or unreadable; run: just verify") from None
    columns = {name: table[name].to_numpy() for name in table.column_names if name != "date"}
    bars = make_bars(symbol, table["date"].to_numpy(), **columns)
    if bars.version != entry.version:
        raise FintxError(f"{path}: is not the snapshot that was kept (its content has changed); run: just verify")
    return bars


@functools.cache
def embedded() -> Bars:
    """The S&P 500 index of the `arch` package: 5,031 daily bars, 1999-01-04 … 2018-12-31."""
    spec = importlib.util.find_spec("arch")
    assert spec is not None and spec.origin is not None
    # The file is read directly: importing arch takes 3 s, and every `fintx plan` would wait for it.
    path = Path(spec.origin).parent / "data" / "sp500" / "sp500.csv.gz"
    table = formats.parse_csv(gzip.decompress(path.read_bytes()).decode(), where="arch sp500")
    return table.to_bars(EMBEDDED)


# --- imports ----------------------------------------------------------------------------------------------------------


def read_file(path: Path, symbol: str, *, today: datetime.date) -> Bars:
    """Checked bars of a CSV or Parquet file, not kept anywhere; a partial bar of today is dropped.

    Raises:
        FintxError: the file is missing or has no such columns.
        BadBars: rows break a rule.
    """
    dataset_name(symbol)
    table, _ = _complete_days(formats.read(path), today=today, where=str(path))
    return _checked_bars(table, symbol, where=str(path))


def import_file(
    path: Path, symbol: str, *, root: Path, repair: bool = False, calendar: np.ndarray | None = None,
    today: datetime.date,
) -> Imported:  # fmt: skip
    """Check a file and keep an immutable snapshot of it.

    Args:
        repair: fix what can be fixed (see `bars.repair_bars`); the manifest lists it.
        calendar: with repair: the asset's trading days, datetime64[D].

    Raises:
        FintxError: the file is missing, has no such columns, or can't be kept.
        BadBars: rows break a rule.
    """
    dataset_name(symbol)
    table, notes = _complete_days(formats.read(path), today=today, where=str(path))
    if repair:
        repaired = repair_bars(table.to_bars(symbol), calendar=calendar, where=str(path))
    else:
        repaired = Repaired(_checked_bars(table, symbol, where=str(path)), ())
    name = path.name.encode("utf-8", "replace").decode()  # a file's name may hold bytes that are no text
    return _keep(repaired, root=root, source=f"file {name}", notes=notes)


def import_yahoo(
    symbol: str, *, root: Path, start: str | None = None, today: datetime.date, progress: Callable[[str], None],
    download: Download | None = None, wait: Callable[[float], None] = time.sleep,
) -> Imported:  # fmt: skip
    """Download daily bars from Yahoo, unadjusted, with Adj Close beside them, and keep a snapshot.

    Args:
        symbol: Yahoo's, such as ^VIX, which is kept as VIX.
        start: first date, YYYY-MM-DD; None: all there is.
        progress: called with a line at each try.
        download: None: yfinance.

    Raises:
        FintxError: yfinance is not installed, Yahoo can't be reached after several tries, or the symbol is unknown.
        BadBars: rows break a rule.
    """
    name, where = symbol.lstrip("^"), f"Yahoo {symbol}"
    dataset_name(name)
    frame = _try_often(download or _yfinance(), symbol, start, progress, wait)
    table, notes = _complete_days(formats.from_frame(frame, where=where), today=today, where=where)
    bars = _checked_bars(table, name, where=where, advice="save them as CSV and import that with --repair")
    return _keep(Repaired(bars, ()), root=root, source=where, notes=notes)


def _complete_days(
    table: PriceColumns, *, today: datetime.date, where: str
) -> tuple[PriceColumns, tuple[str, ...]]:  # fmt: skip
    """The table less the bar of a day that is not over, and notes on what is left out or unknown.

    Such a bar is the file's newest row: the last, or the first of a file that begins with the newest. The date of any
    other row that lies ahead is a mistake, and stays for the rules to find.
    """
    notes = [] if "volume" in table.columns else ["the source has no volume; it is kept as 0"]
    ahead = table.dates >= np.datetime64(today)
    partial = np.logical_and.accumulate(ahead[::-1])[::-1]
    past = table.dates[~ahead]
    if len(past) > 1 and past[0] > past[-1]:
        partial |= np.logical_and.accumulate(ahead)
    if partial.any():
        first = table.dates[partial].min()
        notes.append(f"{partial.sum()} bar(s) dated {first} or later dropped: that day is not over")
        table = table.take(np.flatnonzero(~partial))
    if len(table.dates) == 0:
        raise FintxError(f"{where}: holds no complete bar; wanted daily rows before {today}")
    return table, tuple(notes)


def _checked_bars(
    table: PriceColumns, symbol: str, *, where: str,
    advice: str = "correct them, or import with --repair (and --calendar SYMBOL for its trading days)",
) -> Bars:  # fmt: skip
    bars = table.to_bars(symbol)
    check_bars(bars, where=where, advice=advice, lines=table.lines)
    return bars


def _keep(repaired: Repaired, *, root: Path, source: str, notes: tuple[str, ...]) -> Imported:
    bars, repairs = repaired.bars, repaired.repairs
    table = pa.table({"date": bars.dates} | bars.columns)
    entry, is_new = snapshots.store(
        root, "raw", dataset_name(bars.symbol), table, version=bars.version, source=source, repairs=repairs
    )
    return Imported(entry, is_new, (*notes, *repairs))


def _yfinance() -> Download:
    try:
        import yfinance
    except ImportError:
        raise FintxError(
            "Yahoo needs the extra `yahoo`: give the command as uv run --extra yahoo just data yahoo SYMBOL"
        ) from None

    yfinance.config.debug.hide_exceptions = False
    logging.getLogger("yfinance").setLevel(logging.CRITICAL)  # its errors are raised, and reported once, here

    def download(symbol: str, start: str | None) -> Any:
        span = {"period": "max"} if start is None else {"start": start}
        return yfinance.Ticker(symbol).history(interval="1d", auto_adjust=False, actions=False, **span)

    return download


def _try_often(
    download: Download, symbol: str, start: str | None, progress: Callable[[str], None], wait: Callable[[float], None]
) -> Any:
    """The frame, after as many tries as it takes, with longer and longer waits between them."""
    reason = ""
    for attempt in range(_TRIES):
        if attempt:
            wait(_BACKOFF_S * 2 ** (attempt - 1))
        progress(f"Yahoo {symbol}: try {attempt + 1} of {_TRIES} …")
        try:
            frame = download(symbol, start)
        except Exception as error:  # whatever a network library raises means the same: no bars
            reason = next(iter(str(error).splitlines()), type(error).__name__)
        else:
            if frame is not None and len(frame):
                return frame
            reason = "it sent no bars"
    raise FintxError(
        f"Yahoo {symbol}: no bars after {_TRIES} tries ({reason}); check the network and the symbol, "
        "or import a CSV file: just data import FILE.csv --symbol NAME"
    )
