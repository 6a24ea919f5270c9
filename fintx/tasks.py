"""Tasks: what is predicted, one class each. The only module that looks ahead, from raw prices alone.

It lies below the config, so that `[task] kind` is checked against `TASKS`: a task is added here and nowhere else. Code
that uses labels asks what kind of prediction a task makes (`Task.predicts`), never for its name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import ClassVar, Literal, Protocol

import numpy as np

from fintx.types import Floats

Prediction = Literal["probability", "value"]
"""A model's output. probability: the logit of a label of 0 or 1. value: a number in the label's own unit."""


class Prices(Protocol):
    """What labels are cut from: an asset's daily bars, oldest first (`data.bars.Bars`)."""

    def __len__(self) -> int: ...
    @property
    def dates(self) -> np.ndarray: ...
    @property
    def high(self) -> Floats: ...
    @property
    def low(self) -> Floats: ...
    @property
    def close(self) -> Floats: ...


class Task(Protocol):
    """A frozen dataclass whose fields are the settings of [task] that it takes."""

    predicts: ClassVar[Prediction]

    @property
    def horizon(self) -> int:
        """Trading days ahead that a label looks, h."""

    @property
    def level(self) -> Threshold | None:
        """The price level whose reaching is the event; None if there is none. Touch forecasts, the mirror test and the
        backtest need one."""

    def cut_labels(self, bars: Prices) -> Floats:
        """(T − h,) labels of all bars but the last h, whose future is incomplete."""

    def describe(self) -> str:
        """The label, as one sentence."""


@dataclass(frozen=True)
class Threshold:
    """Whether a price reaches (1 + threshold) × today's close.

    price high:  max(high[t+1 … t+h]) ≥ (1 + threshold) · close[t]
    price close: close[t+h] ≥ (1 + threshold) · close[t]
    """

    predicts: ClassVar[Prediction] = "probability"
    horizon: int
    price: Literal["high", "close"]
    threshold: float

    @property
    def level(self) -> Threshold | None:
        return self

    def cut_labels(self, bars: Prices) -> Floats:
        reached = _highest_ahead(bars.high, self.horizon) if self.price == "high" else bars.close[self.horizon :]
        return reached >= (1 + self.threshold) * bars.close[: -self.horizon]

    def cut_mirror_labels(self, bars: Prices) -> Floats:
        """The mirrored event, for thresholds of either sign: a move of the same size in the other direction.

        price high:  min(low[t+1 … t+h]) ≤ (1 − threshold) · close[t]
        price close: close[t+h] ≤ (1 − threshold) · close[t]
        """
        reached = -_highest_ahead(-bars.low, self.horizon) if self.price == "high" else bars.close[self.horizon :]
        return reached <= (1 - self.threshold) * bars.close[: -self.horizon]

    def describe(self) -> str:
        level = f"≥ today's close {100 * self.threshold:+.4g} %"
        if self.price == "close":
            return f"1 if the close of {_last_day(self.horizon)} is {level}, else 0."
        days = "the next trading day" if self.horizon == 1 else f"the next {self.horizon} trading days"
        return f"1 if the highest high of {days} is {level}, else 0."


@dataclass(frozen=True)
class Direction:
    """Whether the price rises: close[t+h] > close[t]."""

    predicts: ClassVar[Prediction] = "probability"
    level: ClassVar[None] = None
    horizon: int

    def cut_labels(self, bars: Prices) -> Floats:
        return bars.close[self.horizon :] > bars.close[: -self.horizon]

    def describe(self) -> str:
        return f"1 if the close of {_last_day(self.horizon)} is above today's close, else 0."


@dataclass(frozen=True)
class Regression:
    """The log return: ln(close[t+h] / close[t])."""

    predicts: ClassVar[Prediction] = "value"
    level: ClassVar[None] = None
    horizon: int

    def cut_labels(self, bars: Prices) -> Floats:
        return np.log(bars.close[self.horizon :] / bars.close[: -self.horizon])

    def describe(self) -> str:
        return f"The log return from today's close to the close of {_last_day(self.horizon)}."


TASKS: dict[str, type[Task]] = {"threshold": Threshold, "direction": Direction, "regression": Regression}
"""`[task] kind` → its `Task`."""


def settings(kind: str) -> tuple[str, ...]:
    """The settings of [task] that a task takes; all are required."""
    return tuple(field.name for field in fields(TASKS[kind]))  # type: ignore[arg-type]  # a protocol can't require a dataclass


def labels(task: Task, bars: Prices) -> Floats:
    """(T,) float64 label of each bar, from its close and the raw prices of the next h; NaN where those are missing."""
    return _padded(task.cut_labels, task.horizon, bars)


def mirror_labels(level: Threshold, bars: Prices) -> Floats:
    """(T,) float64 label of the mirrored event; NaN where the future is incomplete."""
    return _padded(level.cut_mirror_labels, level.horizon, bars)


def label_ends(task: Task, bars: Prices) -> np.ndarray:
    """(T,) datetime64[D]: the last day that each label looks at; NaT where the future is incomplete."""
    last = np.full(len(bars), np.datetime64("NaT"), "datetime64[D]")
    last[: max(len(bars) - task.horizon, 0)] = bars.dates[task.horizon :]
    return last


def _padded(cut: Callable[[Prices], Floats], horizon: int, bars: Prices) -> Floats:
    labels = np.full(len(bars), np.nan)
    if len(bars) > horizon:
        labels[:-horizon] = cut(bars)
    return labels


def _highest_ahead(high: Floats, h: int) -> Floats:
    """max(high[t+1 … t+h]) for every t whose future is complete."""
    return np.lib.stride_tricks.sliding_window_view(high[1:], h).max(axis=1)


def _last_day(h: int) -> str:
    if h == 1:
        return "the next trading day"
    suffix = "th" if 10 <= h % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(h % 10, "th")
    return f"the {h}{suffix} trading day from now"
