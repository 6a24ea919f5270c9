"""Bars for the data tests: a seeded random walk on weekdays with holidays, and real SPY and VIX where they are kept."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from fintx.data import bars as bars_module
from fintx.data import sources
from fintx.data.bars import Bars

TODAY = datetime.date(2026, 11, 1)


def walk(symbol: str = "AAA", n: int = 800, *, seed: int = 0, first: str = "2010-01-04") -> Bars:
    """n bars that keep every rule; one weekday in fifty is a holiday, so weeks are ragged."""
    rng = np.random.default_rng([seed, *symbol.encode()])
    days = np.arange(np.datetime64(first), np.datetime64(first) + 2 * n + 30)
    weekdays = days[(days.astype(int) + 3) % 7 < 5]
    dates = weekdays[rng.random(len(weekdays)) > 0.02][:n]
    volatility = 0.012 * np.exp(0.5 * np.sin(np.arange(n) / 40))
    close = 50 * np.exp(np.cumsum(rng.normal(0.0002, volatility)))
    open_ = np.r_[50.0, close[:-1]] * np.exp(rng.normal(0, 0.3 * volatility))
    high = np.maximum(open_, close) * np.exp(np.abs(rng.normal(0, 0.4 * volatility)))
    low = np.minimum(open_, close) * np.exp(-np.abs(rng.normal(0, 0.4 * volatility)))
    volume = np.round(1e6 * np.exp(rng.normal(0, 0.4, n)))
    return bars_module.make_bars(
        symbol, dates, open=open_, high=high, low=low, close=close, volume=volume, adj_close=0.9 * close
    )


def csv_text(bars: Bars) -> str:
    """As Yahoo spells it, every digit kept."""
    adjusted = bars.close if bars.adj_close is None else bars.adj_close
    columns = (bars.dates.astype(str), bars.open, bars.high, bars.low, bars.close, adjusted, bars.volume)
    rows = [",".join(str(cell) for cell in row) for row in zip(*columns, strict=True)]
    return "\n".join(["Date,Open,High,Low,Close,Adj Close,Volume", *rows, ""])


def keep(root: Path, *many: Bars) -> Path:
    """Import bars into the data folder `root`, by way of a CSV file; returns root."""
    root.mkdir(parents=True, exist_ok=True)
    for bars in many:
        file = root / f"{bars.symbol}.csv"
        file.write_text(csv_text(bars))
        sources.import_file(file, bars.symbol, root=root, today=TODAY)
    return root


@dataclass(frozen=True)
class Help:
    """The functions above, for test modules (which can't import a conftest)."""

    walk: Callable[..., Bars] = walk
    csv_text: Callable[[Bars], str] = csv_text
    keep: Callable[..., Path] = keep
    today: datetime.date = TODAY


@pytest.fixture(scope="session")
def help() -> Help:
    return Help()


@pytest.fixture(scope="session")
def synthetic() -> tuple[Bars, dict[str, Bars]]:
    """An asset, and a VIX of other days and another walk."""
    return walk(), {"VIX": walk("VIX", 900, seed=1, first="2009-11-02")}


@pytest.fixture(scope="session")
def spy_and_vix(shared_data: Path) -> tuple[Bars, dict[str, Bars]]:
    """The last twelve years or so of SPY, and VIX."""
    spy = sources.read_file(shared_data / "SPY.csv", "SPY", today=TODAY)
    vix = sources.read_file(shared_data / "VIX.csv", "VIX", today=TODAY)
    return spy.take(np.arange(len(spy) - 3000, len(spy))), {"VIX": vix}
