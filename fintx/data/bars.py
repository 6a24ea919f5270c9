"""What are bars? A checked daily price history of one symbol, and the rules that it keeps."""

from __future__ import annotations

import datetime
import hashlib
from dataclasses import dataclass, replace

import numpy as np

from fintx.types import FintxError, Floats

PRICES = ("open", "high", "low", "close")
_SHOWN = 20


class BadBars(FintxError):
    """Bars that break a rule, with the rows that do."""


@dataclass(frozen=True, eq=False)
class Bars:
    """Daily bars of one symbol, oldest first; they keep every rule of `problems`."""

    symbol: str
    dates: np.ndarray
    """(T,) datetime64[D], increasing."""
    open: Floats
    high: Floats
    low: Floats
    close: Floats
    """(T,) float64 each, in the quote currency, as traded (splits adjusted by the vendor, dividends not)."""
    volume: Floats
    """(T,) float64 shares; 0 where the source has none."""
    adj_close: Floats | None
    """(T,) float64 close adjusted for dividends; none where unknown. Each later dividend rebases it."""
    version: str
    """sha256 of the content."""

    def __len__(self) -> int:
        return len(self.dates)

    def between(self, start: datetime.date | None, end: datetime.date | None) -> Bars:
        """The bars from start to end, both inclusive; none: no bound. The version stays that of the whole."""
        keep = np.ones(len(self), bool)
        if start is not None:
            keep &= self.dates >= np.datetime64(start)
        if end is not None:
            keep &= self.dates <= np.datetime64(end)
        return self.take(np.flatnonzero(keep))

    def take(self, rows: np.ndarray) -> Bars:
        """The bars of the given rows."""
        columns = {name: getattr(self, name)[rows] for name in ("dates", *PRICES, "volume")}
        return replace(self, **columns, adj_close=None if self.adj_close is None else self.adj_close[rows])


@dataclass(frozen=True)
class Problem:
    """A row that breaks a rule."""

    row: int
    """Index into the table, from 0."""
    words: str


def make(
    symbol: str,
    dates: np.ndarray,
    *,
    open: Floats,
    high: Floats,
    low: Floats,
    close: Floats,
    volume: Floats,
    adj_close: Floats | None = None,
) -> Bars:
    """Bars from columns, with their content's version; the rules are not checked here."""
    columns = {"open": open, "high": high, "low": low, "close": close, "volume": volume}
    held = {name: np.ascontiguousarray(column, np.float64) for name, column in columns.items()}
    days = np.ascontiguousarray(dates.astype("datetime64[D]"))
    adjusted = None if adj_close is None else np.ascontiguousarray(adj_close, np.float64)
    digest = hashlib.sha256(b"fintx bars 1")
    for array in (days.astype("<i8"), *held.values(), *([] if adjusted is None else [adjusted])):
        digest.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
    return Bars(symbol=symbol, dates=days, **held, adj_close=adjusted, version=digest.hexdigest())


def problems(bars: Bars) -> list[Problem]:
    """Every row that breaks a rule: dates increasing and unique; prices finite and above 0;
    High ≥ max(Open, Close) ≥ min(Open, Close) ≥ Low; volume finite and not negative."""
    found: list[Problem] = []

    def add(mask: np.ndarray, words: str, *columns: str) -> None:
        for row in np.flatnonzero(mask):
            values = ", ".join(f"{name} {getattr(bars, name)[row]:g}" for name in columns)
            found.append(Problem(int(row), f"{words} ({values})" if values else words))

    bad_date = np.isnat(bars.dates)
    add(bad_date, "has no date")
    backwards = np.zeros(len(bars), bool)
    backwards[1:] = bars.dates[1:] <= bars.dates[:-1]
    add(backwards & ~bad_date, "does not come after the row before")
    usable = np.ones(len(bars), bool)
    for name in PRICES:
        column = getattr(bars, name)
        add(~np.isfinite(column), f"{name} is missing or not a number")
        add(np.isfinite(column) & (column <= 0), f"{name} is not above 0", name)
        usable &= np.isfinite(column) & (column > 0)
    add(~np.isfinite(bars.volume) | (bars.volume < 0), "volume is missing or negative", "volume")
    if bars.adj_close is not None:
        add(~np.isfinite(bars.adj_close) | (bars.adj_close <= 0), "adj_close is missing or not above 0")
    body_high, body_low = np.maximum(bars.open, bars.close), np.minimum(bars.open, bars.close)
    add(usable & (bars.high < body_high), "high is below open or close", *PRICES)
    add(usable & (bars.low > body_low), "low is above open or close", *PRICES)
    return sorted(found, key=lambda problem: problem.row)


def refuse(bars: Bars, found: list[Problem], *, where: str, lines: np.ndarray | None = None, mend: str) -> BadBars:
    """The error that lists rows which break a rule.

    Args:
        where: file or source.
        lines: (T,) line of each row in the file; none: rows are counted from 1.
    """
    shown = [
        f"  {'row' if lines is None else 'line'} {problem.row + 1 if lines is None else lines[problem.row]}, "
        f"{bars.dates[problem.row]}: {problem.words}"
        for problem in found[:_SHOWN]
    ]
    if len(found) > _SHOWN:
        shown.append(f"  … and {len(found) - _SHOWN} more")
    n_rows = len({problem.row for problem in found})
    return BadBars("\n".join([f"{where}: {n_rows} of {len(bars)} rows break a rule; {mend}", *shown]))
