"""Selection: which of several models is best, which beat the baseline, and how much of a search's best result is luck.

The candidates of a confirmation are the best of a search, so the rows that judge them have also chosen them. Fresh
seeds remove the luck of a seed; the luck of the rows is counted in by a test over every trial of the search.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from fintx.evaluate import significance
from fintx.evaluate.significance import LEVEL, REPS, Estimate, Resamples, estimate
from fintx.types import Floats

N_BLOCKS = 16
"""Of `overfitting_probability`: 12,870 splits (the authors' choice)."""


# --- tests over many models -------------------------------------------------------------------------------------------


def superiority(benchmark: Floats, models: Floats, resamples: Resamples) -> tuple[float, tuple[int, ...]]:
    """Hansen's test for superior predictive ability (2005), its consistent p-value.

    arch 8.0 does not divide by standard errors, whatever its `studentize` says: it is given studentised differences.
    A model equal to the benchmark has no error and is left out.

    Args:
        benchmark: (D,) losses.
        models: (D, M) losses of all models that were tried.

    Returns:
        The p-value of "none beats the benchmark", with all models counted; and the columns of those that do.
    """
    from arch.bootstrap import SPA

    gains = benchmark[:, None] - models
    errors = significance.standard_errors(gains, resamples) * math.sqrt(len(gains))
    tested = np.flatnonzero(errors > 0)
    if len(tested) == 0:
        return 1.0, ()
    studentised, reps = gains[:, tested] / errors[tested], len(resamples.weights)
    test = SPA(np.zeros(len(gains)), -studentised, block_size=resamples.block, reps=reps, seed=0)
    test.compute()
    return float(test.pvalues["consistent"]), tuple(int(tested[i]) for i in test.better_models(LEVEL))


def confidence_set(series: Floats, *, block: int, reps: int = REPS) -> Floats:
    """The model confidence set (Hansen, Lunde & Nason 2011), by the range statistic; equal columns count once.

    Args:
        series: (D, M) losses.

    Returns:
        (M,) p-values: the smallest level at which each model is left out; 1 for the last one standing.
    """
    from arch.bootstrap import MCS

    distinct, place = np.unique(series, axis=1, return_inverse=True)
    p_values = np.ones(distinct.shape[1])
    if len(p_values) > 1:
        test = MCS(distinct, size=LEVEL, reps=reps, block_size=block, method="R", seed=0)
        test.compute()
        p_values[test.pvalues.index.to_numpy(dtype=int)] = test.pvalues["Pvalue"].to_numpy()
    return p_values[place.ravel()]


# --- a search's luck --------------------------------------------------------------------------------------------------


def overfitting_probability(series: Floats, *, n_blocks: int = N_BLOCKS) -> float:
    """How often the best of a search is below the median on days that did not choose it.

    The probability of backtest overfitting, by combinatorially symmetric cross-validation (Bailey, Borwein, López de
    Prado & Zhu 2017): the days are cut into blocks; of every half of the blocks the model with the least loss is taken,
    and its relative rank ω on the other half noted. The probability is the share of halves with ln(ω / (1 − ω)) < 0;
    where it is 0, the very middle, a half counts half, so that a random choice among few models is at 50 % too. Ties
    take their mean rank.

    Args:
        series: (D, M) losses of all trials of a search; M ≥ 2.
        n_blocks: even, at most D.
    """
    blocks = np.array_split(series, n_blocks)
    sums = np.array([block.sum(axis=0) for block in blocks])
    counts = np.array([len(block) for block in blocks], np.float64)
    halves = np.zeros((math.comb(n_blocks, n_blocks // 2), n_blocks))
    for half, chosen in zip(halves, itertools.combinations(range(n_blocks), n_blocks // 2), strict=True):
        half[list(chosen)] = 1
    inside = halves @ sums / (halves @ counts)[:, None]
    outside = (1 - halves) @ sums / ((1 - halves) @ counts)[:, None]
    picked = np.take_along_axis(outside, inside.argmin(axis=1)[:, None], axis=1)
    rank = (outside > picked).sum(axis=1) + ((outside == picked).sum(axis=1) + 1) / 2  # the best: M
    centred = 2 * rank - (series.shape[1] + 1)  # a whole number: no rounding decides what the middle is
    return float(np.mean((centred < 0) + 0.5 * (centred == 0)))


def luck_of_the_best(series: Floats, resamples: Resamples) -> float:
    """How much better than their average the best of M equal models looks on these days, by chance alone.

    The bootstrap's noise of the means, centred at equality: what models share cancels, and models that are alike count
    as few. A seed's own luck is not included.

    Args:
        series: (D, M) losses.
    """
    noise = resamples.weights @ (series - series.mean(axis=0))
    return float((noise.mean(axis=1) - noise.min(axis=1)).mean())


# --- the verdict on a confirmation's candidates -----------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """On one candidate, by its mean loss over fresh seeds."""

    loss: Estimate
    gain: Estimate
    """Over the baseline: loss saved per row."""
    behind: Estimate | None
    """Loss per row above that of the best candidate, seed by seed; None for the best."""
    best: bool
    indistinguishable: bool
    """Whether it can't be told from the best candidate."""
    confirmed: bool
    """Ahead of the baseline with confidence: by its own interval, and by Hansen's test over all that was tried."""

    @property
    def words(self) -> str:
        """The verdict in words."""
        place = ["best"] if self.best else ["indistinguishable from the best"] if self.indistinguishable else []
        return ", ".join([*place, "confirmed" if self.confirmed else "not confirmed"])


@dataclass(frozen=True)
class Judgement:
    """The verdicts on all candidates, and the test that they share."""

    verdicts: tuple[Verdict, ...]
    superior_p_value: float
    """Of "none of all trials beats the baseline"."""
    resamples: Resamples
    """For more estimates on the same draws."""


def judge(fresh: Floats, baseline: Floats, others: Floats, *, horizon: int, reps: int = REPS) -> Judgement:
    """Compare candidates with each other and with a baseline, on the same days.

    A candidate is told apart from the best only if the model confidence set leaves it out and its own interval does
    too. The set knows the error of the days alone; the interval (at LEVEL / (K − 1), Bonferroni's) that of the seeds
    as well.

    Args:
        fresh: (K, N, D) losses by day of K candidates, each with the same N seeds.
        baseline: (D,) losses of the best baseline.
        others: (D, M) losses of the search's other trials, as the search trained them.
        horizon: h, days that labels overlap.
        reps: bootstrap resamples.
    """
    losses = fresh.mean(axis=1).T  # (D, K)
    seed_losses = fresh.mean(axis=2)  # (K, N)
    n_days, n_candidates = losses.shape
    gains, models = baseline[:, None] - losses, np.column_stack([losses, others])
    resamples = significance.resample(n_days, significance.block_length(gains, horizon=horizon), reps=reps)
    superior_p_value, superior = superiority(baseline, models, resamples)
    set_p_values = confidence_set(losses, block=resamples.block, reps=reps)
    best = int(losses.mean(axis=0).argmin())
    verdicts = []
    for i in range(n_candidates):
        gain = estimate(gains[:, i], resamples, seeds=baseline.mean() - seed_losses[i])
        behind, seeds_behind = losses[:, i] - losses[:, best], seed_losses[i] - seed_losses[best]
        corrected = estimate(behind, resamples, seeds=seeds_behind, level=LEVEL / max(n_candidates - 1, 1))
        verdicts.append(
            Verdict(
                loss=estimate(losses[:, i], resamples, seeds=seed_losses[i]),
                gain=gain,
                behind=None if i == best else estimate(behind, resamples, seeds=seeds_behind),
                best=i == best,
                indistinguishable=bool(set_p_values[i] > LEVEL) or not corrected.positive,
                confirmed=gain.positive and i in superior,
            )
        )
    return Judgement(tuple(verdicts), superior_p_value, resamples)
