"""Volatility or direction: the mirror test, results by calendar year, and the gain over a baseline through time.

A forecaster that knows tomorrow's volatility finds +1 % likely, and −1 % as likely. Such skill is not knowledge of
direction. Logits are (S,), labels (S,) of 0 or 1, dates (S,) datetime64[D].
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
    """AUC of the predicted event."""
    opposite_auc: float | None
    """The same outputs, scored against the opposite event. As high as `auc`: they know volatility, not direction."""
    one_sided: int
    """Rows where exactly one of the two events came."""
    direction_auc: float | None
    """Of which one, on those rows alone; .5: no knowledge of direction."""
    direction_se: float | None
    """Its standard error (Hanley & McNeil 1982), each row counted as 1/h of one since labels overlap over h days."""

    @property
    def knows_direction(self) -> bool:
        """Whether `direction_auc` is above .5 by a one-sided test at 5 %."""
        if self.direction_auc is None or self.direction_se is None:
            return False
        return self.direction_auc - 1.645 * self.direction_se > 0.5


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
    """Mean log loss saved against the baseline, in nats; None without a baseline."""


@dataclass(frozen=True, eq=False)
class CumulativeGain:
    """Log loss saved against a baseline, added up over time."""

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
        """The largest loss of nats from a peak, starting at 0."""
        path = np.concatenate([[0.0], self.gain])
        return float(np.max(np.maximum.accumulate(path) - path))

    @property
    def best_year_share(self) -> float | None:
        """Share of the total that the best calendar year contributed; None where the total is not a gain.

        Near or above 1: the gain is one year's.
        """
        if self.total <= 0:
            return None
        daily = np.diff(self.gain, prepend=0.0)
        return float(max(daily[rows].sum() for _, rows in _years(self.dates)) / self.total)


def mirror_test(logits: Floats, labels: Floats, opposite: Floats, *, horizon: int) -> MirrorTest:
    """Score the same outputs against the event and against its mirror image.

    Args:
        opposite: (S,) 0 or 1, of `tasks.mirror_labels`.
        horizon: h, days over which labels overlap.

    Raises:
        ValueError: no rows, different lengths, or values that are not finite or no classes.
    """
    for event in (labels, opposite):
        metrics.per_sample_loss("probability", logits, event)  # refuses what can't be scored
    labels, opposite = np.asarray(labels, np.float64), np.asarray(opposite, np.float64)
    is_one_sided = labels != opposite
    one_sided, direction_auc, direction_se = int(is_one_sided.sum()), None, None
    if one_sided:
        sides = labels[is_one_sided]
        direction_auc = metrics.auc(logits[is_one_sided], sides)
        if direction_auc is not None:
            direction_se = splits.se_auc(float(sides.mean()), one_sided / horizon, auc=direction_auc)
    return MirrorTest(
        n=len(labels),
        base_rate=float(labels.mean()),
        opposite_rate=float(opposite.mean()),
        auc=metrics.auc(logits, labels),
        opposite_auc=metrics.auc(logits, opposite),
        one_sided=one_sided,
        direction_auc=direction_auc,
        direction_se=direction_se,
    )


def by_year(
    logits: Floats, labels: Floats, dates: np.ndarray, *, prior: float | Floats, baseline: Floats | None = None
) -> tuple[YearRow, ...]:
    """Skill, AUC and gain of every calendar year that has rows, oldest first.

    Args:
        prior: training base rate, or (S,) of each row's own fold.
        baseline: (S,) logits.

    Raises:
        ValueError: as `mirror_test`; or a prior of 0 or 1.
    """
    losses = metrics.per_sample_loss("probability", logits, labels)
    priors, prior_logits = np.broadcast_to(np.asarray(prior, np.float64), losses.shape), np.empty(len(losses))
    for rate in np.unique(priors):
        prior_logits[priors == rate] = metrics.prior_output("probability", float(rate))
    prior_losses = metrics.per_sample_loss("probability", prior_logits, labels)
    gains = None if baseline is None else metrics.per_sample_loss("probability", baseline, labels) - losses
    table = []
    for year, rows in _years(dates):
        loss, prior_loss = float(losses[rows].mean()), float(prior_losses[rows].mean())
        table.append(
            YearRow(
                year=year,
                n=int(rows.sum()),
                base_rate=float(labels[rows].mean(dtype=np.float64)),
                log_loss=loss,
                skill=1 - loss / prior_loss if prior_loss > 0 else None,
                auc=metrics.auc(logits[rows], labels[rows]),
                gain=None if gains is None else float(gains[rows].mean()),
            )
        )
    return tuple(table)


def within_year_auc(logits: Floats, labels: Floats, dates: np.ndarray) -> float | None:
    """AUC over the pairs of a positive and a negative of the same calendar year; None where no year has both.

    Years differ in volatility: a pooled AUC counts it as skill to tell a volatile year from a calm one. Each year is
    weighted by its pairs.
    """
    wins, pairs = 0.0, 0
    for _, rows in _years(dates):
        year_auc = metrics.auc(logits[rows], labels[rows])
        if year_auc is not None:
            positives = int(np.sum(labels[rows] > 0.5))
            year_pairs = positives * (int(rows.sum()) - positives)
            wins, pairs = wins + year_auc * year_pairs, pairs + year_pairs
    return wins / pairs if pairs else None


def cumulative_gain(losses: Floats, baseline_losses: Floats, dates: np.ndarray) -> CumulativeGain:
    """Add up what a forecast saves against a baseline on the same rows, day by day.

    Args:
        losses: (S,) per row, in any order, S > 0; of `metrics.per_sample_loss`.
        dates: the rows of one day (a panel's assets) are summed.
    """
    days, place = np.unique(dates.astype("datetime64[D]"), return_inverse=True)
    gains = np.asarray(baseline_losses, np.float64) - np.asarray(losses, np.float64)
    return CumulativeGain(days, np.cumsum(np.bincount(place, weights=gains)))


def _years(dates: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Calendar years, and which dates are in each."""
    years = dates.astype("datetime64[Y]").astype(int) + 1970
    return [(int(year), years == year) for year in np.unique(years)]
