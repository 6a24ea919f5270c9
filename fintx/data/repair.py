"""How are dirty bars mended? Only in ways that invent nothing but a day, and every change is put into words."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fintx.data.bars import PRICES, BadBars, Bars, make, problems, refuse
from fintx.types import Floats

_NAMED = 40
"""Dates listed per kind of repair; the count is always given."""


@dataclass(frozen=True)
class Repaired:
    """Mended bars, and what was done to them."""

    bars: Bars
    repairs: tuple[str, ...]
    """One line per kind of repair, with its dates."""


def repair(bars: Bars, *, calendar: np.ndarray | None, where: str) -> Repaired:
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
    undated = [problem for problem in problems(bars) if np.isnat(bars.dates[problem.row])]
    if undated:
        raise refuse(bars, undated, where=where, mend="not even --repair can mend these; correct the file")
    bars = _sorted_unique(bars, notes, where)
    if calendar is not None:
        bars = _on_calendar(bars, calendar.astype("datetime64[D]"), notes, where)
    bars = _clipped(bars, notes)
    left = problems(bars)
    if left:
        raise refuse(bars, left, where=where, mend="not even --repair can mend these; correct the file")
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
        conflicting = [problem for problem in problems(bars) if (twice & ~same)[problem.row]]
        raise refuse(bars, conflicting, where=where, mend="these repeat a date with other prices; delete the wrong one")
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
    return make(
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
    return make(
        bars.symbol, bars.dates, open=clipped["open"], high=bars.high, low=bars.low, close=clipped["close"],
        volume=bars.volume, adj_close=bars.adj_close,
    )  # fmt: skip
