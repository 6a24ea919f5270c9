"""Volatility or direction? What is left of a forecast's skill when the size of moves is taken out of it.

Whoever knows that tomorrow moves much knows that +1 % is near, and that −1 % is as near: such skill is volatility.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fintx.data import splits
from fintx.evaluate import metrics
from fintx.types import Floats


@dataclass(frozen=True)
class MirrorTest:
    """One forecast scored against its event and against the mirror image of it."""

    n: int
    base_rate: float
    opposite_rate: float
    auc: float | None
    """Of the event."""
    opposite_auc: float | None
    """The same outputs, scoring the opposite event. As high as `auc`: they know volatility, not direction."""
    one_sided: int
    """Rows where exactly one of the two events came."""
    direction_auc: float | None
    """Of "which side", on those rows alone; .5: no knowledge of direction."""
    direction_se: float | None
    """Its standard error (Hanley & McNeil 1982), each row counted as 1/h of one since labels overlap over h days."""


@dataclass(frozen=True)
class YearRow:
    """One calendar year of validation rows."""

    year: int
    n: int
    base_rate: float
    log_loss: float
    skill: float | None
    """1 − log loss / that of the training prior."""
    auc: float | None
    gain: float | None
    """Mean log loss saved against the rival, in nats; none without a rival."""


@dataclass(frozen=True, eq=False)
class CumulativeGain:
    """Log loss saved against a rival, added up over time."""

    dates: np.ndarray
    """(D,) datetime64[D], increasing and unique."""
    gain: Floats
    """(D,) nats saved up to and with the day: the sum over all rows so far. Rising: the forecast is ahead."""

    @property
    def total(self) -> float:
        """Nats saved at the end."""
        return float(self.gain[-1])

    @property
    def deepest_fall(self) -> float:
        """The largest loss of nats from a peak (from 0 on): how long a streak of the rival's can be."""
        path = np.concatenate([[0.0], self.gain])
        return float(np.max(np.maximum.accumulate(path) - path))

    @property
    def best_year_share(self) -> float | None:
        """Share of the total that the best calendar year brought; none where the total is not a gain.

        Near or above 1: one year made the lead.
        """
        if self.total <= 0:
            return None
        daily = np.diff(self.gain, prepend=0.0)
        years = self.dates.astype("datetime64[Y]").astype(int)
        return float(max(daily[years == year].sum() for year in np.unique(years)) / self.total)


def mirror_test(logits: Floats, labels: Floats, opposite: Floats, *, horizon: int) -> MirrorTest:
    """Score the same outputs against the event and against its mirror image.

    Args:
        logits: (S,).
        labels: (S,) 0 or 1.
        opposite: (S,) 0 or 1, of `tasks.mirror_labels`.
        horizon: h, days over which labels overlap.

    Raises:
        ValueError: no rows, different lengths, or values that are not finite or no classes.
    """
    _check(logits, labels)
    _check(logits, opposite)
    labels, opposite = np.asarray(labels, np.float64), np.asarray(opposite, np.float64)
    one = labels != opposite
    scored = metrics.auc(logits[one], labels[one]) if one.any() else None
    rate = float(labels[one].mean()) if one.any() else 0.0
    return MirrorTest(
        n=len(labels),
        base_rate=float(labels.mean()),
        opposite_rate=float(opposite.mean()),
        auc=metrics.auc(logits, labels),
        opposite_auc=metrics.auc(logits, opposite),
        one_sided=int(one.sum()),
        direction_auc=scored,
        direction_se=None if scored is None else splits.se_auc(rate, int(one.sum()) / horizon, auc=scored),
    )


def by_year(
    logits: Floats, labels: Floats, dates: np.ndarray, *, prior: float | Floats, baseline: Floats | None = None
) -> tuple[YearRow, ...]:
    """Skill, AUC and lead of every calendar year that has rows, oldest first.

    Args:
        dates: (S,) datetime64[D].
        prior: training base rate, or (S,) of each row's own fold.
        baseline: (S,) logits of what must be beaten.

    Raises:
        ValueError: as `mirror_test`; or a prior of 0 or 1.
    """
    _check(logits, labels)
    losses = metrics.per_sample_loss("probability", logits, labels)
    priors = np.broadcast_to(np.asarray(prior, np.float64), losses.shape)
    constant = np.empty(len(losses))
    for rate in np.unique(priors):
        constant[priors == rate] = metrics.prior_output("probability", float(rate))
    prior_losses = metrics.per_sample_loss("probability", constant, labels)
    saved = None if baseline is None else metrics.per_sample_loss("probability", baseline, labels) - losses
    rows = []
    for year, mine in _years(dates):
        loss, prior_loss = float(losses[mine].mean()), float(prior_losses[mine].mean())
        rows.append(
            YearRow(
                year=year,
                n=int(mine.sum()),
                base_rate=float(labels[mine].mean(dtype=np.float64)),
                log_loss=loss,
                skill=1 - loss / prior_loss if prior_loss > 0 else None,
                auc=metrics.auc(logits[mine], labels[mine]),
                gain=None if saved is None else float(saved[mine].mean()),
            )
        )
    return tuple(rows)


def within_year_auc(logits: Floats, labels: Floats, dates: np.ndarray) -> float | None:
    """AUC over the pairs of a positive and a negative of the same calendar year; none where no year has both.

    Years differ in volatility: a pooled AUC counts it as skill to tell a wild year from a calm one. Each year weighs by
    its pairs.
    """
    _check(logits, labels)
    wins, pairs = 0.0, 0
    for _, mine in _years(dates):
        scored = metrics.auc(logits[mine], labels[mine])
        if scored is not None:
            positives = int(np.sum(labels[mine] > 0.5))
            n = positives * (int(mine.sum()) - positives)
            wins, pairs = wins + scored * n, pairs + n
    return wins / pairs if pairs else None


def cumulative_gain(losses: Floats, rival_losses: Floats, dates: np.ndarray) -> CumulativeGain:
    """Add up what a forecast saves against a rival on the same rows, day by day.

    Args:
        losses: (S,) per row, in any order; of `metrics.per_sample_loss`.
        rival_losses: (S,) the rival's.
        dates: (S,) datetime64[D]; the rows of one day (a panel's assets) are summed.

    Raises:
        ValueError: no rows.
    """
    if len(losses) == 0:
        raise ValueError("no rows to compare")
    days, place = np.unique(dates.astype("datetime64[D]"), return_inverse=True)
    saved = np.asarray(rival_losses, np.float64) - np.asarray(losses, np.float64)
    return CumulativeGain(days, np.cumsum(np.bincount(place, weights=saved)))


def _years(dates: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Calendar years and their rows."""
    years = dates.astype("datetime64[Y]").astype(int) + 1970
    return [(int(year), years == year) for year in np.unique(years)]


def _check(logits: Floats, labels: Floats) -> None:
    metrics.per_sample_loss("probability", logits, labels)  # it refuses what can't be scored
