"""How wide must an interval be to hold the outcome as often as promised? Conformal intervals, and what they held.

Split: one width, from the errors of the calibration rows; it holds its level if the future is like them. Adaptive: the
width follows the misses, so that coverage comes back after the market changes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fintx.types import Floats

STEP = 0.01
"""γ of the adaptive intervals: how far a miss moves the level; Gibbs & Candès use .005 … .05."""


@dataclass(frozen=True, eq=False)
class Intervals:
    """Intervals for the judged rows, and how often they held."""

    method: str
    """split, adaptive."""
    level: float
    """Promised coverage, 1 − α."""
    low: Floats
    high: Floats
    """(S',) in the target's unit; ±∞ where the adaptive level has reached 1."""
    covered: np.ndarray
    """(S',) bool."""

    @property
    def coverage(self) -> float:
        """Realised share."""
        return float(self.covered.mean())

    @property
    def median_width(self) -> float:
        """Median of high − low."""
        return float(np.median(self.high - self.low))


def split_intervals(
    predicted: Floats, targets: Floats, held_predicted: Floats, held_targets: Floats, *, level: float = 0.9
) -> Intervals:
    """Split conformal: predicted ± the ⌈(n + 1)(1 − α)⌉-th smallest absolute error of the calibration rows.

    Vovk, Gammerman & Shafer 2005; Lei et al. 2018, algorithm 2. Coverage is at least the level for exchangeable rows,
    which days of a market are not: read the realised one.

    Args:
        predicted: (S,) calibration rows; with `targets` they give the width.
        held_predicted: (S',) later rows to be judged.
        level: 1 − α.

    Raises:
        ValueError: no rows, or a level outside (0, 1).
    """
    _check(predicted, held_predicted, level)
    width = _quantile(np.sort(np.abs(targets - predicted)), 1 - level)
    return _intervals("split", level, held_predicted, np.full(len(held_predicted), width), held_targets)


def adaptive_intervals(
    predicted: Floats,
    targets: Floats,
    held_predicted: Floats,
    held_targets: Floats,
    *,
    horizon: int,
    level: float = 0.9,
    step: float = STEP,
    window: int = 500,
) -> Intervals:
    """Adaptive conformal inference (Gibbs & Candès 2021, eq. 2): α_{t+1} = α_t + γ (α − missed_t).

    The width is the conformal quantile at α_t of the newest `window` absolute errors. A target of horizon h is known h
    rows later: a miss moves α, and an error joins the window, that much later. Long-run coverage tends to the level
    whatever the series does (their proposition 4.1 bounds the gap by (max(α₁, 1 − α₁) + γ) / (γ T)).

    Args:
        predicted: (S,) calibration rows in time order, of one asset, as `targets`.
        held_predicted: (S',) the rows that follow.

    Raises:
        ValueError: as `split_intervals`.
    """
    _check(predicted, held_predicted, level)
    alpha = target_alpha = 1 - level
    known = np.abs(targets - predicted)
    errors = np.concatenate([known, np.abs(held_targets - held_predicted)])
    widths = np.empty(len(held_predicted))
    for t in range(len(held_predicted)):
        realised = t - horizon  # of the judged rows, the newest whose target is known at t
        if realised >= 0:
            alpha += step * (target_alpha - float(errors[len(known) + realised] > widths[realised]))
        # At first not even the last h − 1 calibration rows have targets: they may end on the day before.
        seen = max(len(known) + realised + 1, 1)
        widths[t] = _quantile(np.sort(errors[max(seen - window, 0) : seen]), alpha)
    return _intervals("adaptive", level, held_predicted, widths, held_targets)


def _quantile(errors: Floats, alpha: float) -> float:
    """The conformal (1 − α) quantile of increasing errors: ∞ for α ≤ 0 or too few of them, 0 for α ≥ 1."""
    rank = int(np.ceil((len(errors) + 1) * (1 - alpha) - 1e-9))
    if rank > len(errors):
        return float("inf")
    return float(errors[rank - 1]) if rank >= 1 else 0.0


def _intervals(method: str, level: float, predicted: Floats, widths: Floats, targets: Floats) -> Intervals:
    middle = np.asarray(predicted, np.float64)
    return Intervals(method, level, middle - widths, middle + widths, np.abs(targets - middle) <= widths)


def _check(predicted: Floats, held: Floats, level: float) -> None:
    if len(predicted) == 0 or len(held) == 0 or not 0 < level < 1:
        raise ValueError(
            f"wanted calibration and judged rows and a level within (0, 1); got {len(predicted)}, {len(held)}, {level}"
        )
