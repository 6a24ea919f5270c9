"""Which of the models that were trained again is best, which beat the baseline, and which can't be told apart?

The candidates are the best of a search, so the rows that judge them have chosen them already. Fresh seeds take the luck
of a seed away; that of the rows is counted in by a test over every trial of the search.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fintx.evaluate import significance
from fintx.evaluate.significance import LEVEL, REPS, Estimate, Resamples
from fintx.types import Floats


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
    spa = significance.superiority(baseline, np.column_stack([losses, others]), resamples)
    kept = significance.confidence_set(losses, block=resamples.block, reps=reps)
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
