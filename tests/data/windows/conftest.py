"""Markets for the data tests: random walks on ragged calendars, the real files, and a way to prepare them."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from fintx.config import DataConfig, SplitConfig, TaskConfig
from fintx.data import bars as bars_module
from fintx.data import sources, windows
from fintx.data.bars import Bars
from fintx.data.windows import Prepared

TODAY = datetime.date(2026, 11, 24)


class Loader:
    """`sources.load` over a dict of bars: nothing is read from disk, nothing written."""

    def __init__(self, bars: Mapping[str, Bars]) -> None:
        self.bars = bars

    def __call__(self, symbol: str, *, root: Path, version: str | None = None) -> Bars:
        bars = self.bars[symbol]
        assert version is None or bars.version.startswith(version)
        return bars


@pytest.fixture(scope="session")
def serve() -> Callable[[Mapping[str, Bars]], object]:
    """`with serve(bars):` makes fintx load those bars, by symbol."""
    return lambda bars: mock.patch.object(sources, "load", Loader(bars))


@pytest.fixture(scope="session")
def prepare(serve) -> Callable[..., Prepared]:
    """`windows.build` over a dict of bars; symbols in upper case letters alone are assets, VIX is context."""

    def build(
        bars: Mapping[str, Bars],
        task: TaskConfig,
        split: SplitConfig,
        *,
        features: tuple[str, ...] = ("log_return_1", "log_return_5", "range"),
        context_length: int = 8,
        scaling: str = "standardize",
    ) -> Prepared:
        assets = tuple(symbol for symbol in bars if symbol != "VIX")
        context = ("VIX",) if "VIX" in bars else ()
        data = DataConfig(assets=assets, context=context, features=features, scaling=scaling)
        with serve(bars):
            return windows.build(data, task, split, context_length=context_length, root=Path("nowhere"))

    return build


@pytest.fixture(scope="session")
def make_bars() -> Callable[..., Bars]:
    """A random walk on weekdays; `missing` of them, drawn by the seed, are not traded."""

    def make(symbol: str, n: int, *, seed: int, first: str = "2000-01-03", missing: float = 0.0) -> Bars:
        rng = np.random.default_rng(seed)
        days = np.busday_offset(first, np.arange(n), roll="forward")
        days = days[rng.random(n) >= missing]
        close = 50 * np.exp(np.cumsum(rng.normal(scale=0.012, size=len(days))))
        open_ = close * np.exp(rng.normal(scale=0.004, size=len(days)))
        high = np.maximum(open_, close) * np.exp(np.abs(rng.normal(scale=0.004, size=len(days))))
        low = np.minimum(open_, close) * np.exp(-np.abs(rng.normal(scale=0.004, size=len(days))))
        volume = rng.integers(1_000, 9_000, len(days)).astype(float)
        return bars_module.make(symbol, days, open=open_, high=high, low=low, close=close, volume=volume)

    return make


@pytest.fixture(scope="session")
def real(shared_data: Path) -> Callable[..., dict[str, Bars]]:
    """Bars of the named files of real market data."""

    def read(*symbols: str) -> dict[str, Bars]:
        return {s: sources.read_file(shared_data / f"{s}.csv", s, today=TODAY) for s in symbols}

    return read
