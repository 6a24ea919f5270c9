"""Is a difference more than noise? Losses per row, resampled by blocks of days; a search's luck is counted in.

Everything here works on a `series` of losses, (D, M): one row per day in time order, one column per model, made by
`by_day` from losses per row. A panel's assets share their days, so days are resampled and not rows. Labels overlap over
the horizon and markets have moods, so days are resampled in blocks (the stationary bootstrap of Politis & Romano 1994).

A gain is a mean loss saved per row: positive is better. Hansen's SPA and the model confidence set are arch's, imported
where they are used: arch takes three seconds to load, and every study ends with a bootstrap.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
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
"""Days. A week's worth, where a series looks independent."""
_FEWEST_FOR_LENGTH = 20
"""Days below which no block length can be estimated."""
N_BLOCKS = 16
"""Of `overfitting`: 12,870 splits (the authors' choice)."""

# --- losses -----------------------------------------------------------------------------------------------------------


def skill_loss(metric: str) -> str:
    """The loss that skill is a share of: the study's metric where that is a mean over rows, else log loss."""
    return "log_loss" if metric in metrics.RANKINGS else metric


def row_losses(predicts: Prediction, metric: str, outputs: Floats, targets: Floats) -> Floats:
    """(S,) float64, whose mean is the metric; 1 − it for a ranking, whose rows are linearised as `by_day`'s means are.

    Args:
        metric: one of `metrics.MINIMIZE`.
        outputs: (S,) logits, or predicted log returns.
        targets: (S,) 0 or 1, or log returns.

    Returns:
        NaN for all rows where a ranking is undefined: one class alone.

    Raises:
        ValueError: as `metrics.per_sample_loss`.
    """
    whole = metrics.per_sample_loss(predicts, outputs, targets)
    if metric in ("log_loss", "mse"):
        return whole
    outputs, targets = np.asarray(outputs, np.float64), np.asarray(targets, np.float64)
    if metric in metrics.RANKINGS:
        shares = metrics.row_shares(metric, outputs, targets)
        return np.full(len(targets), np.nan) if shares is None else 1 - shares
    return np.square(metrics.sigmoid(outputs) - targets) if metric == "brier" else np.abs(outputs - targets)


def by_day(losses: Floats, dates: np.ndarray, *, chosen: np.ndarray | None = None) -> Floats:
    """Losses per row as a series of days, whose mean over days is the mean over rows.

    Days may hold different numbers of rows n_d (panels). The mean is then a ratio Σ S_d / Σ n_d; the series is its
    linearisation, μ + (S_d − n_d μ) · D / Σ n_d, so that resampling it has the ratio's error.

    Args:
        losses: (S,) or (S, M).
        dates: (S,) datetime64[D], in any order.
        chosen: (S,) bool: the mean is over these rows alone. Other days stay in the series, without a say, so that
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


# --- the bootstrap ----------------------------------------------------------------------------------------------------


def block_length(series: Floats, *, horizon: int) -> int:
    """Mean length of blocks in days, by Politis & White (2004; corrected 2009); at least the horizon, and 5.

    Args:
        series: (D,) or (D, M): of several columns, the median of their lengths. Give it differences of losses: what
            two models share cancels there.
    """
    shortest = max(_SHORTEST_BLOCK, horizon)
    columns = series[:, None] if series.ndim == 1 else series
    columns = columns[:, np.ptp(columns, axis=0) > 0]
    if len(columns) < _FEWEST_FOR_LENGTH or columns.shape[1] == 0:
        return shortest
    return max(shortest, math.ceil(np.median([_best_length(column) for column in columns.T])))


def _best_length(series: Floats) -> float:
    """Mean block length of the least error of the mean's variance, with Patton's choice of the lags that count.

    Politis & White 2004, https://doi.org/10.1081/ETC-120028836, with the constant of Patton, Politis & White 2009.
    """
    n = len(series)
    deviations = series - series.mean()
    n_quiet = max(5, int(math.log10(n)))
    most = math.ceil(math.sqrt(n)) + n_quiet
    products = np.array([deviations[lag:] @ deviations[: n - lag] for lag in range(most + 1)])
    energy = np.cumsum(np.square(deviations))
    norms = np.sqrt(energy[n - 2 - most : n - 1][::-1] * (energy[-1] - energy[: most + 1]))
    is_quiet = np.abs(products) < norms * 2 * math.sqrt(math.log10(n) / n)
    begins = np.flatnonzero(np.lib.stride_tricks.sliding_window_view(is_quiet[:most], n_quiet).all(axis=1))
    m = min(2 * max(int(begins[0]), 1), most) if len(begins) else most
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
    """Draw days by the stationary bootstrap: at each day a new block begins with probability 1 / block."""
    rng = np.random.default_rng(seed)
    weights, day = np.empty((reps, n_days)), np.arange(n_days)
    for weight in weights:
        starts = np.where(rng.random(n_days) < 1 / block, day, 0)
        since = np.maximum.accumulate(starts)  # the first block begins at 0
        drawn = (rng.integers(n_days, size=n_days)[since] + day - since) % n_days
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
        seeds: (N,) means of each seed alone, drawn at random as the next would be; none: no question of seeds.
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


# --- many models ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Superiority:
    """Does any of many models beat a benchmark?"""

    p_value: float
    """Of "none does", with all models counted."""
    better: tuple[int, ...]
    """Columns that do."""
    n_models: int


def superiority(benchmark: Floats, models: Floats, resamples: Resamples, *, level: float = LEVEL) -> Superiority:
    """Hansen's test for superior predictive ability (2005), its consistent p-value.

    arch 8.0 does not divide by standard errors, whatever its `studentize` says: it is given studentised differences.
    A model equal to the benchmark has none, and nothing to say.

    Args:
        benchmark: (D,) losses.
        models: (D, M) losses of all models that were tried.
    """
    from arch.bootstrap import SPA

    gains = benchmark[:, None] - models
    errors = standard_errors(gains, resamples) * math.sqrt(len(gains))
    told = np.flatnonzero(errors > 0)
    if len(told) == 0:
        return Superiority(1.0, (), models.shape[1])
    studentised = gains[:, told] / errors[told]
    reps = len(resamples.weights)
    test = SPA(np.zeros(len(gains)), -studentised, block_size=resamples.block, reps=reps, seed=0)
    test.compute()
    better = tuple(int(told[i]) for i in test.better_models(level))
    return Superiority(float(test.pvalues["consistent"]), better, models.shape[1])


@dataclass(frozen=True)
class ConfidenceSet:
    """Which models can't be told from the best?"""

    p_values: tuple[float, ...]
    """Per model: the smallest level at which it is out; 1 for the last one standing."""
    included: tuple[bool, ...]


def confidence_set(
    series: Floats, *, block: int, reps: int = REPS, level: float = LEVEL, seed: int = 0
) -> ConfidenceSet:
    """The model confidence set (Hansen, Lunde & Nason 2011), by the range statistic; equal columns count once.

    Args:
        series: (D, M) losses.
    """
    from arch.bootstrap import MCS

    distinct, place = np.unique(series, axis=1, return_inverse=True)
    p_values = np.ones(distinct.shape[1])
    if len(p_values) > 1:
        test = MCS(distinct, size=level, reps=reps, block_size=block, method="R", seed=seed)
        test.compute()
        p_values[test.pvalues.index.to_numpy(dtype=int)] = test.pvalues["Pvalue"].to_numpy()
    every = p_values[place.ravel()]
    return ConfidenceSet(tuple(map(float, every)), tuple(bool(p > level) for p in every))


# --- a search's luck --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Overfitting:
    """How often is the best of a search below the middle on days that didn't choose it?"""

    probability: float
    n_models: int
    n_splits: int


def overfitting(series: Floats, *, n_blocks: int = N_BLOCKS) -> Overfitting:
    """Probability of backtest overfitting by combinatorially symmetric cross-validation.

    Bailey, Borwein, López de Prado & Zhu (2017): the days are cut into blocks; of every half of the blocks the model
    with the least loss is taken, and its relative rank ω on the other half noted. The probability is the share of
    halves with ln(ω / (1 − ω)) < 0; where it is 0, the very middle, a half counts half, so that a choice by lot among
    few models is at 50 % too. Ties take their mean rank.

    Args:
        series: (D, M) losses of all trials of a search; M ≥ 2.
        n_blocks: even, at most D.
    """
    days, n_models = series.shape
    blocks = np.array_split(series, n_blocks)
    sums = np.array([block.sum(axis=0) for block in blocks])
    counts = np.array([len(block) for block in blocks], np.float64)
    halves = np.zeros((math.comb(n_blocks, n_blocks // 2), n_blocks))
    for half, chosen in zip(halves, itertools.combinations(range(n_blocks), n_blocks // 2), strict=True):
        half[list(chosen)] = 1
    inside = halves @ sums / (halves @ counts)[:, None]
    outside = (1 - halves) @ sums / ((1 - halves) @ counts)[:, None]
    picked = np.take_along_axis(outside, inside.argmin(axis=1)[:, None], axis=1)
    rank = (outside > picked).sum(axis=1) + ((outside == picked).sum(axis=1) + 1) / 2  # the best: n_models
    twice = 2 * rank - (n_models + 1)  # a whole number: no rounding decides what the middle is
    return Overfitting(float(np.mean((twice < 0) + 0.5 * (twice == 0))), n_models, len(halves))


def luck_of_the_best(series: Floats, resamples: Resamples) -> float:
    """How much better than their average the best of M equal models looks on these days, by chance alone.

    The bootstrap's noise of the means, centred at equality; what models share cancels, and those that are alike count
    as the few that they are. A seed's own luck is not in it.

    Args:
        series: (D, M) losses.
    """
    noise = resamples.weights @ (series - series.mean(axis=0))
    return float((noise.mean(axis=1) - noise.min(axis=1)).mean())


_BELIEVABLE = {"auc": 0.95, "correlation": 0.8}
"""Market data have never been predicted better."""


def too_good(scored: Mapping[str, float | int | None]) -> str | None:
    """Why a result is too good to be true, in a line; none: it is believable.

    Args:
        scored: metrics, as `metrics.evaluate` gives them.
    """
    for metric, most in _BELIEVABLE.items():
        value = scored.get(metric)
        if value is not None and value > most:
            words = metric.upper() if metric == "auc" else metric
            return (
                f"{words} {value:.3f} is too good to be true for market data (above {most}): look for inputs or bars "
                "that know the future before you believe it"
            )
    return None


def terciles(values: Floats) -> Ints:
    """(S,) 0, 1 or 2: the lowest, middle and highest third of the values; −1 where there is none (NaN)."""
    known = np.isfinite(values)
    found = np.full(len(values), -1)
    if known.any():
        found[known] = np.searchsorted(np.quantile(values[known], (1 / 3, 2 / 3)), values[known], side="right")
    return found
