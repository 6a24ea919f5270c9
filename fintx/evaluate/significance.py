"""Significance: losses per row and day, the bootstrap over days, estimates with intervals, and power before training.

Statistics work on a `series` of losses, (D, M): one row per day in time order, one column per model, made by `by_day`
from losses per row. A panel's assets share their days, so days are resampled and not rows. Labels overlap over the
horizon and volatility clusters, so days are resampled in blocks (the stationary bootstrap of Politis & Romano 1994).

A gain is a mean loss saved per row: positive is better. Of arch only the tests of `selection` are used, since it takes
three seconds to load and every study ends with a bootstrap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from fintx.evaluate import metrics
from fintx.tasks import Prediction
from fintx.types import Floats, Ints

LEVEL = 0.05
"""Of every test; intervals and sets have 1 − LEVEL."""
REPS = 2000
"""Bootstrap resamples: a p-value of .05 is known to ± .005."""
_SHORTEST_BLOCK = 5
"""Days: a week, where a series looks independent."""
_MIN_DAYS_FOR_LENGTH = 20
"""Days below which no block length can be estimated."""

# --- losses -----------------------------------------------------------------------------------------------------------

_ROW_LOSSES: dict[str, Callable[[Floats, Floats], Floats]] = {
    "brier": lambda logits, targets: np.square(metrics.sigmoid(logits) - targets),
    "mae": lambda predicted, targets: np.abs(predicted - targets),
}
"""Of the metrics that are means over rows, those that `metrics.per_sample_loss` isn't."""


def skill_loss(metric: str) -> str:
    """The loss that skill is a share of: the study's metric where that is a mean over rows, else log loss."""
    return "log_loss" if metric in metrics.RANKINGS else metric


def row_losses(predicts: Prediction, metric: str, outputs: Floats, targets: Floats) -> Floats:
    """(S,) float64, whose mean is the metric; of a ranking 1 − `metrics.row_shares`.

    Args:
        metric: one of `metrics.MINIMIZE`.
        outputs: (S,) logits, or predicted values.
        targets: (S,) 0 or 1, or values.

    Returns:
        NaN for all rows where a ranking is undefined: one class alone.

    Raises:
        ValueError: as `metrics.per_sample_loss`.
    """
    losses = metrics.per_sample_loss(predicts, outputs, targets)
    outputs, targets = np.asarray(outputs, np.float64), np.asarray(targets, np.float64)
    if metric in metrics.RANKINGS:
        shares = metrics.row_shares(metric, outputs, targets)
        return np.full(len(targets), np.nan) if shares is None else 1 - shares
    return _ROW_LOSSES[metric](outputs, targets) if metric in _ROW_LOSSES else losses


def by_day(losses: Floats, dates: np.ndarray, *, chosen: np.ndarray | None = None) -> Floats:
    """Losses per row as a series of days, whose mean over days is the mean over rows.

    Days may hold different numbers of rows n_d (panels). The mean is then a ratio Σ S_d / Σ n_d; the series is its
    linearisation, μ + (S_d − n_d μ) · D / Σ n_d, so that resampling it has the ratio's error.

    Args:
        losses: (S,) or (S, M).
        dates: (S,) datetime64[D], in any order.
        chosen: (S,) bool: the mean is over these rows alone. Other days stay in the series with weight 0, so that
            blocks keep their place in time.

    Returns:
        (D,) or (D, M) float64.

    Raises:
        ValueError: no row is chosen.
    """
    columns = losses[:, None] if losses.ndim == 1 else losses
    days, place = np.unique(dates, return_inverse=True)
    weights = np.ones(len(dates)) if chosen is None else chosen.astype(np.float64)
    if not weights.any():
        raise ValueError("a mean over no rows")
    counts = np.bincount(place, weights=weights, minlength=len(days))
    mean = weights @ columns / weights.sum()
    sums = np.zeros((len(days), columns.shape[1]))
    np.add.at(sums, place, weights[:, None] * columns)
    series = mean + (sums - counts[:, None] * mean) * (len(days) / weights.sum())
    return series[:, 0] if losses.ndim == 1 else series


def leakage_warning(scores: Mapping[str, float | int | None]) -> str | None:
    """Why a result is too good to be true, in a line; None where it is believable.

    Args:
        scores: of `metrics.evaluate`.
    """
    # Beyond what has been achieved on market data.
    for metric, name, limit in (("auc", "AUC", 0.95), ("correlation", "correlation", 0.8)):
        value = scores.get(metric)
        if value is not None and value > limit:
            return (
                f"{name} {value:.3f} is too good to be true for market data (above {limit}): look for inputs or bars "
                "that know the future before you believe it"
            )
    return None


def tercile_indices(values: Floats) -> Ints:
    """(S,) 0, 1 or 2: the lowest, middle and highest third of the values; −1 for NaN."""
    is_known, thirds = np.isfinite(values), np.full(len(values), -1)
    if is_known.any():
        edges = np.quantile(values[is_known], (1 / 3, 2 / 3))
        thirds[is_known] = np.searchsorted(edges, values[is_known], side="right")
    return thirds


# --- the bootstrap ----------------------------------------------------------------------------------------------------


def block_length(series: Floats, *, horizon: int) -> int:
    """Mean length of blocks in days, by Politis & White (2004; corrected 2009); at least the horizon, and 5.

    Args:
        series: (D,) or (D, M): of several columns, the median of their lengths. Give differences of losses: what two
            models share cancels there.
    """
    shortest = max(_SHORTEST_BLOCK, horizon)
    columns = series[:, None] if series.ndim == 1 else series
    columns = columns[:, np.ptp(columns, axis=0) > 0]
    if len(columns) < _MIN_DAYS_FOR_LENGTH or columns.shape[1] == 0:
        return shortest
    return max(shortest, math.ceil(np.median([_best_length(column) for column in columns.T])))


def _best_length(series: Floats) -> float:
    """Mean block length of the least error of the mean's variance, with Patton's choice of the lags that count.

    Politis & White 2004, https://doi.org/10.1081/ETC-120028836, with the constant of Patton, Politis & White 2009.
    """
    n = len(series)
    deviations = series - series.mean()
    n_quiet = max(5, int(math.log10(n)))
    max_lag = math.ceil(math.sqrt(n)) + n_quiet
    products = np.array([deviations[lag:] @ deviations[: n - lag] for lag in range(max_lag + 1)])
    energy = np.cumsum(np.square(deviations))
    norms = np.sqrt(energy[n - 2 - max_lag : n - 1][::-1] * (energy[-1] - energy[: max_lag + 1]))
    is_quiet = np.abs(products) < norms * 2 * math.sqrt(math.log10(n) / n)
    starts = np.flatnonzero(np.lib.stride_tricks.sliding_window_view(is_quiet[:max_lag], n_quiet).all(axis=1))
    m = min(2 * max(int(starts[0]), 1), max_lag) if len(starts) else max_lag
    lags = np.arange(1, m + 1)
    weights = np.minimum(1, 2 * (1 - lags / m))  # flat in the middle, then falling: Politis & Romano 1995
    slope, variance = 2 * weights @ (lags * products[1 : m + 1]), products[0] + 2 * weights @ products[1 : m + 1]
    longest = math.ceil(min(3 * math.sqrt(n), n / 3))
    return min(abs(slope / variance) ** (2 / 3) * n ** (1 / 3), longest) if variance != 0 else longest


@dataclass(frozen=True, eq=False)
class Resamples:
    """Draws of days, the same for every series, so that differences stay paired."""

    weights: Floats
    """(R, D): how often a day was drawn, over D. weights @ series are resampled means."""
    block: int
    """Mean length of a block, days."""


def resample(n_days: int, block: int, *, reps: int = REPS, seed: int = 0) -> Resamples:
    """Draw days by the stationary bootstrap: at each day a new block starts with probability 1 / block."""
    rng = np.random.default_rng(seed)
    weights, day = np.empty((reps, n_days)), np.arange(n_days)
    for weight in weights:
        starts = np.where(rng.random(n_days) < 1 / block, day, 0)
        block_start = np.maximum.accumulate(starts)  # the first block starts at 0
        drawn = (rng.integers(n_days, size=n_days)[block_start] + day - block_start) % n_days
        weight[:] = np.bincount(drawn, minlength=n_days)
    return Resamples(weights / n_days, block)


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval of 1 − LEVEL."""

    mean: float
    low: float
    high: float
    se: float

    @property
    def positive(self) -> bool:
        """Above zero with confidence."""
        return self.low > 0

    @property
    def negative(self) -> bool:
        """Below zero with confidence."""
        return self.high < 0


def standard_errors(series: Floats, resamples: Resamples) -> Floats:
    """(M,) of the means of a (D, M) series."""
    centred = series - series.mean(axis=0)
    return np.sqrt(np.square(resamples.weights @ centred).mean(axis=0))


def estimate(series: Floats, resamples: Resamples, *, seeds: Floats | None = None, level: float = LEVEL) -> Estimate:
    """Mean of a series with a t interval: the error of the days, and of the seeds where there are several.

    The days' variance is the bootstrap's, with D / block − 1 degrees of freedom; the seeds' is s² / N with N − 1. They
    add, and their degrees of freedom by Satterthwaite's rule.

    Args:
        series: (D,), of the mean over seeds.
        seeds: (N,) means of each seed alone, drawn at random as the next would be; None: seeds add no error.
    """
    from scipy.special import stdtrit

    mean = float(series.mean())
    parts = [(float(standard_errors(series[:, None], resamples)[0]) ** 2, max(len(series) / resamples.block - 1, 1.0))]
    if seeds is not None and len(seeds) > 1:
        parts.append((float(np.var(seeds, ddof=1)) / len(seeds), len(seeds) - 1.0))
    variance = sum(part for part, _ in parts)
    if variance == 0:
        return Estimate(mean, mean, mean, 0.0)
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts)
    se = math.sqrt(variance)
    reach = float(stdtrit(freedom, 1 - level / 2)) * se
    return Estimate(mean, mean - reach, mean + reach, se)


# --- power ------------------------------------------------------------------------------------------------------------

POWER = 0.8
"""Chance to detect a difference that exists."""
LOGIT_GAP = 0.5
"""Assumed SD of the difference between two good forecasters' logits, from which their paired losses differ.

Measured between the baselines that use volatility, on the validation rows of SPY + VIX from 2005, "the high exceeds
+1 % within h days": .18 to .85 over 63 pairs, the median .50 (docs/guide/metrics.md).
"""
_SKILL_SD = 1.0
"""Assumed SD of a useful forecaster's logits about the base rate's (AUC ≈ .75)."""


@dataclass(frozen=True)
class Power:
    """What the validation rows of a study can show, in nats of mean log loss; for two forecasters on the same rows."""

    n: int
    n_effective: float
    base_rate: float
    paired_se: float
    """Standard error of the mean paired difference."""
    detectable: float
    """Smallest true difference that a two-sided 5 % test detects in 80 % of studies."""
    n_trials: int
    luck: float
    """Expected maximum of n_trials equal trials, in SDs of one trial's own noise."""
    luck_nats: float
    """By how much the best of equal trials looks better than it is: luck × paired SE / √2."""


def paired_power(base_rate: float, n: int, n_effective: float, *, n_trials: int) -> Power:
    """The power of a paired comparison before any model is trained.

    Of two forecasters whose logits differ by Δ ~ N(0, LOGIT_GAP²), both calibrated to first order, a row's losses
    differ by (p − y) Δ, with variance E[p(1 − p)] · LOGIT_GAP². p is spread as a useful forecaster's is. Trials that
    are equal but for noise share the rows; each one's own part of the paired variance is half of it, hence the √2.

    Args:
        base_rate: of the validation rows.
        n_effective: number of rows by average uniqueness: overlapping labels count once.

    Raises:
        ValueError: a base rate of 0 or 1, or no rows.
    """
    if not 0 < base_rate < 1 or n_effective <= 0:
        raise ValueError(f"power needs a base rate within (0, 1) and rows; got {base_rate} and {n_effective} rows")
    # E[p(1 − p)] by Gauss–Hermite quadrature.
    nodes, weights = np.polynomial.hermite_e.hermegauss(41)
    p = 1 / (1 + np.exp(-(np.log(base_rate / (1 - base_rate)) + _SKILL_SD * nodes)))
    variance = float(np.sum(weights * p * (1 - p)) / weights.sum())
    paired_se = float(np.sqrt(variance * LOGIT_GAP**2 / n_effective))
    luck = expected_maximum(n_trials)
    return Power(
        n=n,
        n_effective=n_effective,
        base_rate=base_rate,
        paired_se=paired_se,
        detectable=smallest_detectable(paired_se),
        n_trials=n_trials,
        luck=luck,
        luck_nats=luck * paired_se / np.sqrt(2.0),
    )


def smallest_detectable(se: float) -> float:
    """(z_{1 − LEVEL/2} + z_{POWER}) · SE: 2.80 SE at 5 % and 80 % (the far tail's share is below 1e-6)."""
    from scipy.special import ndtri

    return float((ndtri(1 - LEVEL / 2) + ndtri(POWER)) * se)


def expected_maximum(n: int) -> float:
    """Mean of the largest of n independent standard normals: what choosing the best of n equal trials gains, in SDs.

    E = ∫ x n φ(x) Φ(x)ⁿ⁻¹ dx, by the trapezoidal rule; exact to 1e-9 up to a million.

    Raises:
        ValueError: n below 1.
    """
    from scipy.special import log_ndtr

    if n < 1:
        raise ValueError(f"the expected maximum needs at least one trial, got {n}")
    x: Floats = np.linspace(-12.0, 12.0, 24_001)
    log_density = np.log(n) - 0.5 * x**2 - 0.5 * np.log(2 * np.pi) + (n - 1) * log_ndtr(x)
    return float(np.trapezoid(x * np.exp(log_density), x))
