"""Bars: the checked daily price history of one symbol, the rules that it keeps, and the repair of bars that don't."""

from __future__ import annotations

import datetime
import hashlib
from dataclasses import dataclass, replace

import numpy as np

from fintx.errors import FintxError
from fintx.types import Floats

PRICES = ("open", "high", "low", "close")
_MAX_PROBLEMS_SHOWN = 20
_MAX_DATES_SHOWN = 40
"""Dates listed per kind of repair; the count is always given."""
_BEYOND_REPAIR = "not even --repair can fix these; correct the file"


class BadBars(FintxError):
    """Bars that break a rule, with the rows that do."""


@dataclass(frozen=True, eq=False)
class Bars:
    """Daily bars of one symbol, oldest first; they keep every rule of `bar_problems`."""

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
    version: str
    """sha256 of the content."""
    adj_close: Floats | None = None
    """(T,) float64 close adjusted for dividends; None where unknown. Each later dividend rebases it."""

    def __len__(self) -> int:
        return len(self.dates)

    @property
    def columns(self) -> dict[str, Floats]:
        """Name → prices, volume and, where known, adj_close."""
        names = (*PRICES, "volume", *(("adj_close",) if self.adj_close is not None else ()))
        return {name: getattr(self, name) for name in names}

    def between(self, start: datetime.date | None, end: datetime.date | None) -> Bars:
        """The bars from start to end, both inclusive; None: no bound. The version stays that of the whole."""
        keep = np.ones(len(self), bool)
        if start is not None:
            keep &= self.dates >= np.datetime64(start)
        if end is not None:
            keep &= self.dates <= np.datetime64(end)
        return self.take(np.flatnonzero(keep))

    def before(self, day: np.datetime64 | None) -> Bars:
        """The bars before a day; None: all."""
        return self if day is None else self.take(np.flatnonzero(self.dates < day))

    def take(self, rows: np.ndarray) -> Bars:
        """The bars of the given rows."""
        return replace(self, dates=self.dates[rows], **{name: array[rows] for name, array in self.columns.items()})


def make_bars(
    symbol: str, dates: np.ndarray, *, open: Floats, high: Floats, low: Floats, close: Floats, volume: Floats,
    adj_close: Floats | None = None,
) -> Bars:  # fmt: skip
    """Bars from columns, with the version of their content; the rules are not checked here."""
    given = {"open": open, "high": high, "low": low, "close": close, "volume": volume, "adj_close": adj_close}
    columns = {name: np.ascontiguousarray(column, np.float64) for name, column in given.items() if column is not None}
    days = np.ascontiguousarray(dates.astype("datetime64[D]"))
    digest = hashlib.sha256(b"fintx bars 1")
    for array in (days.astype("<i8"), *columns.values()):
        digest.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
    return Bars(symbol=symbol, dates=days, version=digest.hexdigest(), **columns)


# --- rules ------------------------------------------------------------------------------------------------------------


def bar_problems(bars: Bars) -> list[tuple[int, str]]:
    """(row, message) of every row that breaks a rule: dates increasing and unique; prices finite and above 0;
    High ≥ max(Open, Close) ≥ min(Open, Close) ≥ Low; volume finite and not negative."""
    problems: list[tuple[int, str]] = []

    def add(broken: np.ndarray, message: str, *shown: str) -> None:
        for row in np.flatnonzero(broken):
            values = ", ".join(f"{name} {getattr(bars, name)[row]:g}" for name in shown)
            problems.append((int(row), f"{message} ({values})" if values else message))

    add(np.isnat(bars.dates), "has no date")
    add(np.append(False, bars.dates[1:] <= bars.dates[:-1]), "does not come after the row before")
    usable = np.ones(len(bars), bool)
    for name in PRICES:
        column = getattr(bars, name)
        add(~np.isfinite(column), f"{name} is missing or not a number")
        add(np.isfinite(column) & (column <= 0), f"{name} is not above 0", name)
        usable &= np.isfinite(column) & (column > 0)
    add(~np.isfinite(bars.volume) | (bars.volume < 0), "volume is missing or negative", "volume")
    if bars.adj_close is not None:
        add(~np.isfinite(bars.adj_close) | (bars.adj_close <= 0), "adj_close is missing or not above 0")
    add(usable & (bars.high < np.maximum(bars.open, bars.close)), "high is below open or close", *PRICES)
    add(usable & (bars.low > np.minimum(bars.open, bars.close)), "low is above open or close", *PRICES)
    return sorted(problems, key=lambda problem: problem[0])


def check_bars(
    bars: Bars, *, where: str, advice: str, lines: np.ndarray | None = None, rows: np.ndarray | None = None
) -> None:
    """Refuse bars that break a rule.

    Args:
        where: file or source.
        advice: how to fix it.
        lines: (T,) line of each row in the file; None: rows are counted from 1.
        rows: (T,) bool, the rows to look at; None: all.

    Raises:
        BadBars: lists the rows that break one.
    """
    problems = [(row, message) for row, message in bar_problems(bars) if rows is None or rows[row]]
    if not problems:
        return
    place = [f"row {row + 1}" for row in range(len(bars))] if lines is None else [f"line {line}" for line in lines]
    shown = [f"  {place[row]}, {bars.dates[row]}: {message}" for row, message in problems[:_MAX_PROBLEMS_SHOWN]]
    if len(problems) > len(shown):
        shown.append(f"  … and {len(problems) - len(shown)} more")
    n_rows = len({row for row, _ in problems})
    raise BadBars("\n".join([f"{where}: {n_rows} of {len(bars)} rows break a rule; {advice}", *shown]))


# --- repair -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Repaired:
    """Bars that keep every rule, and what was done to them."""

    bars: Bars
    repairs: tuple[str, ...]
    """One line per kind of repair, with its dates."""


def repair_bars(bars: Bars, *, calendar: np.ndarray | None, where: str) -> Repaired:
    """Fix order, duplicates, foreign days, single missing days, and prices outside the day's range.

    Rows are sorted by date and equal duplicates dropped. With a calendar (the asset's trading days) the bars are left-
    joined on it: other days are dropped, and a missing day is filled with the bar before it (flat at its close, volume
    0) if the days around it are there. Open and close are clipped into [low, high].

    Args:
        calendar: datetime64[D] trading days, increasing; None: days are taken as they are.

    Raises:
        BadBars: two missing days in a row, duplicates that differ, prices that are missing or not above 0, high below
            low: nothing that could be fixed without inventing prices.
    """
    repairs: list[str] = []
    check_bars(bars, rows=np.isnat(bars.dates), where=where, advice=_BEYOND_REPAIR)
    bars = _sorted_unique(bars, repairs, where)
    if calendar is not None:
        bars = _on_calendar(bars, calendar.astype("datetime64[D]"), repairs, where)
    clipped = {}
    for name in ("open", "close"):
        column = getattr(bars, name)
        clippable = np.isfinite(column) & (bars.low <= bars.high)
        clipped[name] = np.where(clippable, np.clip(column, bars.low, bars.high), column)
        _note(repairs, f"{name} clipped into the day's range", bars.dates[clipped[name] != column])
    bars = make_bars(bars.symbol, bars.dates, **bars.columns | clipped)
    check_bars(bars, where=where, advice=_BEYOND_REPAIR)
    return Repaired(bars, tuple(repairs))


def _note(repairs: list[str], repair: str, dates: np.ndarray) -> None:
    if len(dates):
        shown = " ".join(map(str, dates[:_MAX_DATES_SHOWN]))
        more = f" … and {len(dates) - _MAX_DATES_SHOWN} more" if len(dates) > _MAX_DATES_SHOWN else ""
        repairs.append(f"{repair}: {len(dates)} ({shown}{more})")


def _sorted_unique(bars: Bars, repairs: list[str], where: str) -> Bars:
    order = np.argsort(bars.dates, kind="stable")
    _note(repairs, "rows put into the order of their dates", bars.dates[bars.dates[order] != bars.dates])
    bars = bars.take(order)
    repeated = np.append(False, bars.dates[1:] == bars.dates[:-1])
    equal = np.append(True, np.all([column[1:] == column[:-1] for column in bars.columns.values()], axis=0))
    advice = "these repeat a date with other prices; delete the wrong one"
    check_bars(bars, rows=repeated & ~equal, where=where, advice=advice)
    _note(repairs, "repeated rows dropped", bars.dates[repeated])
    return bars.take(np.flatnonzero(~repeated))


def _on_calendar(bars: Bars, calendar: np.ndarray, repairs: list[str], where: str) -> Bars:
    outside = (bars.dates < calendar[0]) | (bars.dates > calendar[-1])
    foreign = ~np.isin(bars.dates, calendar) & ~outside
    if (foreign | outside).all():
        raise BadBars(f"{where}: shares no day with the calendar; choose another --calendar")
    _note(repairs, "days on which the asset did not trade dropped", bars.dates[foreign])
    _note(repairs, "days outside the calendar's range dropped", bars.dates[outside])
    bars = bars.take(np.flatnonzero(~(foreign | outside)))
    days = calendar[(calendar >= bars.dates[0]) & (calendar <= bars.dates[-1])]
    missing = ~np.isin(days, bars.dates)
    adjacent = missing & (np.append(False, missing[:-1]) | np.append(missing[1:], False))
    if adjacent.any():
        raise BadBars(
            f"{where}: has no bars on {adjacent.sum()} trading days that lie side by side, the first "
            f"{days[adjacent][0]}; only single missing days are filled; get a complete file"
        )
    _note(repairs, "single missing days filled with the bar before, flat at its close", days[missing])
    bar_before = np.searchsorted(bars.dates, days, side="right") - 1  # of a day that is there: its own
    columns = {name: column[bar_before] for name, column in bars.columns.items()}
    prices = {name: np.where(missing, columns["close"], columns[name]) for name in PRICES}
    return make_bars(bars.symbol, days, **columns | prices | {"volume": np.where(missing, 0.0, columns["volume"])})
