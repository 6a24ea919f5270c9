"""What is predicted? Targets cut from the future of raw prices: the only module that looks ahead."""

from __future__ import annotations

import numpy as np

from fintx.config import TaskConfig
from fintx.data.bars import Bars
from fintx.types import Floats


def cut(task: TaskConfig, bars: Bars) -> Floats:
    """The label of each bar t, from the close of t and the raw prices of t + 1 … t + h.

    threshold, price high:  max(high[t+1 … t+h]) ≥ (1 + threshold) · close[t]
    threshold, price close: close[t+h] ≥ (1 + threshold) · close[t]
    direction:              close[t+h] > close[t]
    regression:             ln(close[t+h] / close[t])

    Returns:
        (T,) float64: 1 or 0, or a log return; NaN where the future is incomplete.
    """
    h, close = task.horizon, bars.close
    labels = np.full(len(bars), np.nan)
    if len(bars) <= h:
        return labels
    now, end = close[:-h], close[h:]
    if task.kind == "regression":
        labels[:-h] = np.log(end / now)
    elif task.kind == "direction":
        labels[:-h] = end > now
    else:
        assert task.threshold is not None
        reached = _highest_ahead(bars.high, h) if task.price == "high" else end
        labels[:-h] = reached >= (1 + task.threshold) * now
    return labels


def opposite(task: TaskConfig, bars: Bars) -> Floats:
    """The label's mirror image, for threshold tasks of either sign: the move of the same size to the other side.

    price high:  min(low[t+1 … t+h]) ≤ (1 − threshold) · close[t]
    price close: close[t+h] ≤ (1 − threshold) · close[t]

    Returns:
        (T,) float64: 1 or 0; NaN where the future is incomplete, and everywhere for tasks of another kind.
    """
    h, close = task.horizon, bars.close
    mirrored = np.full(len(bars), np.nan)
    if len(bars) <= h or task.kind != "threshold":
        return mirrored
    assert task.threshold is not None
    reached = -_highest_ahead(-bars.low, h) if task.price == "high" else close[h:]
    mirrored[:-h] = reached <= (1 - task.threshold) * close[:-h]
    return mirrored


def ends(task: TaskConfig, bars: Bars) -> np.ndarray:
    """(T,) datetime64[D]: the last day that each label looks at; NaT where the future is incomplete."""
    last = np.full(len(bars), np.datetime64("NaT"), "datetime64[D]")
    last[: max(len(bars) - task.horizon, 0)] = bars.dates[task.horizon :]
    return last


def describe(task: TaskConfig) -> str:
    """The label in one sentence."""
    days = "the next trading day" if task.horizon == 1 else f"the next {task.horizon} trading days"
    end = "the next trading day" if task.horizon == 1 else f"the {_ordinal(task.horizon)} trading day from now"
    if task.kind == "regression":
        return f"The log return from today's close to the close of {end}."
    if task.kind == "direction":
        return f"1 if the close of {end} is above today's close, else 0."
    assert task.threshold is not None
    level = f"≥ today's close {100 * task.threshold:+.4g} %"
    if task.price == "high":
        return f"1 if the highest high of {days} is {level}, else 0."
    return f"1 if the close of {end} is {level}, else 0."


def _highest_ahead(high: Floats, h: int) -> Floats:
    """max(high[t+1 … t+h]) for every t whose future is complete."""
    return np.lib.stride_tricks.sliding_window_view(high[1:], h).max(axis=1)


def _ordinal(n: int) -> str:
    suffix = "th" if 10 <= n % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{suffix}"
