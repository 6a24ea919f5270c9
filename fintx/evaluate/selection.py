"""Which of the models that were trained again is best, which beat the baseline, and which can't be told apart?

The candidates are the best of a search, so the rows that judge them have chosen them already. Fresh seeds take the luck
of a seed away; that of the rows is counted in by a test over every trial of the search.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from fintx.evaluate import significance
from fintx.evaluate.significance import (
    LEVEL,
    REPS,
    Estimate,
    Resamples,
    standard_errors,
)
from fintx.types import Floats

N_BLOCKS = 16
"""Of `overfitting_probability`: 12,870 splits (the authors' choice)."""


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


def overfitting_probability(series: Floats, *, n_blocks: int = N_BLOCKS) -> float:
    """How often the best of a search is below the middle on days that didn't choose it.

    The probability of backtest overfitting, by combinatorially symmetric cross-validation.

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
    return float(np.mean((twice < 0) + 0.5 * (twice == 0)))


def luck_of_the_best(series: Floats, resamples: Resamples) -> float:
    """How much better than their average the best of M equal models looks on these days, by chance alone.

    The bootstrap's noise of the means, centred at equality; what models share cancels, and those that are alike count
    as the few that they are. A seed's own luck is not in it.

    Args:
        series: (D, M) losses.
    """
    noise = resamples.weights @ (series - series.mean(axis=0))
    return float((noise.mean(axis=1) - noise.min(axis=1)).mean())


@dataclass(frozen=True)
class Verdict:
    """On one candidate, by its mean loss over fresh seeds."""

    loss: Estimate
    gain: Estimate
    """Over the baseline: loss saved per row."""
    behind: Estimate | None
    """Loss per row above that of the best candidate, seed by seed; none for the best."""
    set_p_value: float
    """Of the model confidence set."""
    best: bool
    indistinguishable: bool
    """From the best."""
    confirmed: bool
    """Ahead of the baseline with confidence: by its own interval, and by Hansen's test over all that was tried."""

    @property
    def words(self) -> str:
        """The result in words."""
        place = ["best"] if self.best else ["indistinguishable from the best"] if self.indistinguishable else []
        return ", ".join([*place, "confirmed" if self.confirmed else "not confirmed"])


@dataclass(frozen=True)
class Judgement:
    """On all candidates."""

    verdicts: tuple[Verdict, ...]
    superior_p_value: float
    """Of "none of all that was tried beats the baseline"."""
    n_models: int
    """How many that are: the candidates, and the search's other trials."""
    resamples: Resamples
    """For more estimates on the same draws."""


def judge(fresh: Floats, baseline: Floats, others: Floats, *, horizon: int, reps: int = REPS) -> Judgement:
    """Compare candidates with each other and with a baseline, on the same days.

    A candidate is told from the best only if the model confidence set leaves it out, and its own interval too. The set
    knows the error of the days alone; the interval (at LEVEL / (K − 1), Bonferroni's) that of the seeds as well.

    Args:
        fresh: (K, N, D) losses by day of K candidates, each with the same N seeds.
        baseline: (D,) losses of the best baseline.
        others: (D, M) losses of the search's other trials, as the search trained them.
        horizon: h, days that labels overlap.
        reps: bootstrap resamples.
    """
    losses = fresh.mean(axis=1).T  # (D, K)
    per_seed = fresh.mean(axis=2)  # (K, N)
    n_days, n_candidates = losses.shape
    gains = baseline[:, None] - losses
    resamples = significance.resample(n_days, significance.block_length(gains, horizon=horizon), reps=reps)
    spa = superiority(baseline, np.column_stack([losses, others]), resamples)
    kept = confidence_set(losses, block=resamples.block, reps=reps)
    best = int(losses.mean(axis=0).argmin())
    found = []
    for i in range(n_candidates):
        gain = significance.estimate(gains[:, i], resamples, seeds=baseline.mean() - per_seed[i])
        apart, seeds = losses[:, i] - losses[:, best], per_seed[i] - per_seed[best]
        strict = significance.estimate(apart, resamples, seeds=seeds, level=LEVEL / max(n_candidates - 1, 1))
        verdict = Verdict(
            loss=significance.estimate(losses[:, i], resamples, seeds=per_seed[i]),
            gain=gain,
            behind=None if i == best else significance.estimate(apart, resamples, seeds=seeds),
            set_p_value=kept.p_values[i],
            best=i == best,
            indistinguishable=kept.included[i] or not strict.positive,
            confirmed=gain.positive and i in spa.better,
        )
        found.append(verdict)
    return Judgement(tuple(found), spa.p_value, spa.n_models, resamples)
