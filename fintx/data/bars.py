"""What are bars? A checked daily price history of one symbol, and the rules that it keeps."""

from __future__ import annotations

import datetime
import hashlib
from dataclasses import dataclass, replace

import numpy as np

from fintx.errors import FintxError
from fintx.types import Floats

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


def make_bars(
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


def bar_problems(bars: Bars) -> list[Problem]:
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


def refuse_bars(bars: Bars, found: list[Problem], *, where: str, lines: np.ndarray | None = None, mend: str) -> BadBars:
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


_NAMED = 40
"""Dates listed per kind of repair; the count is always given."""


@dataclass(frozen=True)
class Repaired:
    """Mended bars, and what was done to them."""

    bars: Bars
    repairs: tuple[str, ...]
    """One line per kind of repair, with its dates."""


def repair_bars(bars: Bars, *, calendar: np.ndarray | None, where: str) -> Repaired:
    """Mend bars: order, duplicates, foreign days, single missing days, and prices outside the day's range.

    Rows are sorted by date and equal duplicates dropped. With a calendar (the asset's trading days) the bars are left-
    joined on it: other days are dropped, and a missing day is filled with the bar before it (flat at its close, volume
    0) if the days around it are there. Open and close are clipped into [low, high].

    Args:
        calendar: datetime64[D] trading days; none: days are taken as they are.

    Raises:
        BadBars: two missing days in a row, duplicates that differ, prices that are missing or not above 0, high below
            low: nothing that could be mended without inventing prices.
    """
    notes: list[str] = []
    undated = [problem for problem in bar_problems(bars) if np.isnat(bars.dates[problem.row])]
    if undated:
        raise refuse_bars(bars, undated, where=where, mend="not even --repair can mend these; correct the file")
    bars = _sorted_unique(bars, notes, where)
    if calendar is not None:
        bars = _on_calendar(bars, calendar.astype("datetime64[D]"), notes, where)
    bars = _clipped(bars, notes)
    left = bar_problems(bars)
    if left:
        raise refuse_bars(bars, left, where=where, mend="not even --repair can mend these; correct the file")
    return Repaired(bars, tuple(notes))


def _note(notes: list[str], words: str, dates: np.ndarray) -> None:
    if len(dates):
        named = " ".join(str(date) for date in dates[:_NAMED])
        more = f" … and {len(dates) - _NAMED} more" if len(dates) > _NAMED else ""
        notes.append(f"{words}: {len(dates)} ({named}{more})")


def _columns(bars: Bars) -> list[Floats]:
    adjusted = [] if bars.adj_close is None else [bars.adj_close]
    return [*(getattr(bars, name) for name in (*PRICES, "volume")), *adjusted]


def _sorted_unique(bars: Bars, notes: list[str], where: str) -> Bars:
    order = np.argsort(bars.dates, kind="stable")
    moved = bars.dates[order] != bars.dates
    _note(notes, "rows put into the order of their dates", bars.dates[moved])
    bars = bars.take(order)
    twice = np.zeros(len(bars), bool)
    twice[1:] = bars.dates[1:] == bars.dates[:-1]
    same = np.zeros(len(bars), bool)
    same[1:] = np.all([column[1:] == column[:-1] for column in _columns(bars)], axis=0)
    if (twice & ~same).any():
        conflicting = [problem for problem in bar_problems(bars) if (twice & ~same)[problem.row]]
        raise refuse_bars(
            bars, conflicting, where=where, mend="these repeat a date with other prices; delete the wrong one"
        )
    _note(notes, "repeated rows dropped", bars.dates[twice])
    return bars.take(np.flatnonzero(~twice))


def _on_calendar(bars: Bars, calendar: np.ndarray, notes: list[str], where: str) -> Bars:
    before, after = bars.dates < calendar[0], bars.dates > calendar[-1]
    foreign = ~np.isin(bars.dates, calendar) & ~before & ~after
    if (foreign | before | after).all():
        raise BadBars(f"{where}: shares no day with the calendar; choose another --calendar")
    _note(notes, "days on which the asset did not trade dropped", bars.dates[foreign])
    _note(notes, "days outside the calendar's range dropped", bars.dates[before | after])
    bars = bars.take(np.flatnonzero(~(foreign | before | after)))
    wanted = calendar[(calendar >= bars.dates[0]) & (calendar <= bars.dates[-1])]
    missing = wanted[~np.isin(wanted, bars.dates)]
    days = np.union1d(bars.dates, missing)
    source = np.searchsorted(bars.dates, days, side="right") - 1
    filled = np.isin(days, missing)
    beside = np.concatenate([[False], filled, [False]])
    gap = days[filled & (beside[:-2] | beside[2:])]
    if len(gap):
        raise BadBars(
            f"{where}: has no bars on {len(gap)} trading days that lie side by side, the first {gap[0]}; "
            "only single missing days are filled; get a complete file"
        )
    _note(notes, "single missing days filled with the bar before, flat at its close", missing)
    close = bars.close[source]
    return make_bars(
        bars.symbol,
        days,
        **{name: np.where(filled, close, getattr(bars, name)[source]) for name in PRICES},
        volume=np.where(filled, 0.0, bars.volume[source]),
        adj_close=None if bars.adj_close is None else bars.adj_close[source],
    )


def _clipped(bars: Bars, notes: list[str]) -> Bars:
    clipped = {}
    for name in ("open", "close"):
        column = getattr(bars, name)
        inside = np.clip(column, bars.low, bars.high)
        ordered = bars.low <= bars.high
        clipped[name] = np.where(ordered & np.isfinite(column), inside, column)
        _note(notes, f"{name} clipped into the day's range", bars.dates[clipped[name] != column])
    return make_bars(
        bars.symbol, bars.dates, open=clipped["open"], high=bars.high, low=bars.low, close=clipped["close"],
        volume=bars.volume, adj_close=bars.adj_close,
    )  # fmt: skip
