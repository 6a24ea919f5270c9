"""Calibration: reliability, recalibration, precision at thresholds, and conformal intervals.

Functions of probabilities take (S,) logits, which is what models and baselines put out, and (S,) labels of 0 or 1. The
expected calibration error is in `metrics`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fintx.evaluate import metrics
from fintx.types import Floats, Ints

# --- reliability ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Proportion:
    """k of n, with its Wilson interval."""

    value: float | None
    """None where n is 0."""
    low: float
    high: float
    k: int
    n: int


@dataclass(frozen=True)
class ReliabilityBin:
    """Rows of neighbouring probabilities."""

    mean: float
    """Mean predicted probability."""
    low: float
    high: float
    """Smallest and largest predicted probability."""
    observed: Proportion
    """Share of positives."""


@dataclass(frozen=True)
class BrierParts:
    """Murphy 1973, with what bins hide: brier = reliability − resolution + uncertainty + within.

    reliability: Σ n_b (mean p − observed)² / n; 0 for calibrated forecasts.
    resolution: Σ n_b (observed − base rate)² / n; how far apart the bins' outcomes are.
    uncertainty: base rate · (1 − base rate); the outcome's own variance.
    within: spread of p inside the bins less twice its covariance with the outcome (Stephenson, Coelho & Jolliffe 2008).
    """

    brier: float
    reliability: float
    resolution: float
    uncertainty: float
    within: float


def wilson(k: int, n: int, *, level: float = 0.95) -> Proportion:
    """A proportion with its score interval (Wilson 1927), which stays within 0 … 1 and is accurate for small n too.

    Raises:
        ValueError: k outside 0 … n, or a level outside (0, 1).
    """
    from scipy.special import ndtri

    if not 0 <= k <= n or not 0 < level < 1:
        raise ValueError(f"a proportion needs 0 ≤ k ≤ n and 0 < level < 1, got k = {k}, n = {n}, level = {level}")
    if n == 0:
        return Proportion(None, 0.0, 1.0, 0, 0)
    z, p = float(ndtri(0.5 + level / 2)), k / n
    middle, reach = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # At k = 0 and k = n an end is exactly 0 or 1, which rounding must not miss.
    low = 0.0 if k == 0 else float((middle - reach) / scale)
    high = 1.0 if k == n else float((middle + reach) / scale)
    return Proportion(p, low, high, k, n)


def reliability(logits: Floats, labels: Floats) -> tuple[ReliabilityBin, ...]:
    """The reliability curve, over the bins of `metrics.equal_mass_bins` from low to high; empty ones are left out.

    Wilson's interval assumes independent rows; labels that overlap over h days make it too narrow by up to √h.
    """
    p, bins, curve = metrics.sigmoid(logits), metrics.equal_mass_bins(logits), []
    for index in np.unique(bins):
        p_bin, labels_bin = p[bins == index], labels[bins == index]
        observed = wilson(int(np.sum(labels_bin > 0.5)), len(labels_bin))
        curve.append(ReliabilityBin(float(p_bin.mean()), float(p_bin.min()), float(p_bin.max()), observed))
    return tuple(curve)


def brier_parts(logits: Floats, labels: Floats, *, n_bins: int = metrics.CALIBRATION_BINS) -> BrierParts:
    """Murphy's decomposition of the Brier score over bins of equal mass; the four parts add up exactly."""
    p, y, bins = metrics.sigmoid(logits), np.asarray(labels, np.float64), metrics.equal_mass_bins(logits, n_bins)
    base_rate = y.mean()
    reliability_part = resolution = 0.0
    for index in np.unique(bins):
        mean, observed, weight = p[bins == index].mean(), y[bins == index].mean(), np.mean(bins == index)
        reliability_part += weight * (mean - observed) ** 2
        resolution += weight * (observed - base_rate) ** 2
    brier, uncertainty = float(np.square(p - y).mean()), float(base_rate * (1 - base_rate))
    return BrierParts(
        brier=brier,
        reliability=float(reliability_part),
        resolution=float(resolution),
        uncertainty=uncertainty,
        within=float(brier - reliability_part + resolution - uncertainty),
    )


# --- recalibration ----------------------------------------------------------------------------------------------------

Recalibrator = Callable[[Floats], Floats]
"""Logits → recalibrated logits, monotone."""

_ISOTONIC_CLIP = 1e-6
"""Distance from 0 and 1: isotonic steps reach both, whose log loss is infinite when they are wrong."""


@dataclass(frozen=True)
class RecalibrationScore:
    """A forecast as it is, or recalibrated, on rows that the recalibration was not fitted on."""

    method: str
    """none, temperature, isotonic."""
    log_loss: float
    brier: float
    calibration_error: float
    n: int


def fit_temperature(logits: Floats, labels: Floats) -> Recalibrator:
    """Recalibration to logits / T, T > 0 of the least log loss (Guo et al. 2017, section 4.2); 1: calibrated as it is.

    It keeps the order of forecasts, and the side of ½ that each is on. The loss is convex in 1/T. T stays within
    1/20 … 20: forecasts that are no better than their own reverse would ask for an infinite one.
    """
    from scipy.optimize import minimize_scalar

    logits = np.asarray(logits, np.float64)

    def loss(log_t: float) -> float:
        return float(metrics.per_sample_loss("probability", logits / np.exp(log_t), labels).mean())

    bound = np.log(20.0)
    minimum = minimize_scalar(loss, bounds=(-bound, bound), method="bounded", options={"xatol": 1e-6})
    return lambda new: np.asarray(new, np.float64) / float(np.exp(minimum.x))


def fit_isotonic(logits: Floats, labels: Floats) -> Recalibrator:
    """Recalibration by isotonic regression (Zadrozny & Elkan 2002): any increasing map; needs hundreds of rows."""
    from sklearn.isotonic import IsotonicRegression

    model = IsotonicRegression(y_min=_ISOTONIC_CLIP, y_max=1 - _ISOTONIC_CLIP, out_of_bounds="clip")
    model.fit(np.asarray(logits, np.float64), np.asarray(labels, np.float64))

    def recalibrate(new: Floats) -> Floats:
        p = model.predict(np.asarray(new, np.float64))
        return np.log(p) - np.log1p(-p)

    return recalibrate


RECALIBRATORS = {"temperature": fit_temperature, "isotonic": fit_isotonic}


def recalibrate_forward(logits: Floats, labels: Floats, groups: Ints) -> tuple[RecalibrationScore, ...]:
    """Fit every recalibration on the groups before each one, and score it on all groups but the first.

    Args:
        groups: (S,) fold of each row, in time order; or `halves` where there is one fold. Negative: not used.

    Returns:
        "none" first: the forecast as it is, on the same rows.

    Raises:
        ValueError: fewer than two groups.
    """
    order = np.unique(groups[groups >= 0])
    if len(order) < 2:
        raise ValueError("recalibration needs rows to fit and later ones to score: two folds, or halves of one")
    outputs = {"none": np.asarray(logits, np.float64)}
    for method, fit in RECALIBRATORS.items():
        outputs[method] = np.full(len(logits), np.nan)
        for group in order[1:]:
            before, now = (groups >= 0) & (groups < group), groups == group
            outputs[method][now] = fit(logits[before], labels[before])(logits[now])
    scored = groups > order[0]
    truth = labels[scored]
    return tuple(
        RecalibrationScore(
            method=method,
            log_loss=float(metrics.per_sample_loss("probability", values[scored], truth).mean()),
            brier=float(np.square(metrics.sigmoid(values[scored]) - truth).mean()),
            calibration_error=metrics.calibration_error(values[scored], truth),
            n=len(truth),
        )
        for method, values in outputs.items()
    )


def halves(dates: np.ndarray, *, horizon: int) -> Ints:
    """(S,) 0: the older half of the days; 1: the newer; −1: the h days between, whose labels look into the newer."""
    days = np.unique(dates)
    middle = len(days) // 2
    place = np.searchsorted(days, dates)
    return np.where(place >= middle, 1, np.where(place >= middle - horizon, -1, 0))


# --- decision thresholds ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ThresholdRow:
    """Predicting the event wherever p ≥ threshold."""

    decile: float
    """Share of rows below the threshold; .9: the tenth of the rows with the highest p is predicted positive."""
    threshold: float
    """Predicted probability from which the answer is yes."""
    predicted: int
    """Rows predicted positive; more than their share where many rows have the same p."""
    precision: Proportion
    recall: Proportion
    lift: float | None
    lift_low: float
    lift_high: float
    """Precision over the base rate of these rows, with the ends of precision's interval."""


@dataclass(frozen=True, eq=False)
class PrecisionRecall:
    """The precision–recall curve, a point per distinct output, from the highest one down to all rows."""

    recall: Floats
    precision: Floats
    """(K,)."""
    precision_low: Floats
    precision_high: Floats
    """(K,) Wilson."""
    base_rate: float
    """Precision of always predicting the event."""


def threshold_table(logits: Floats, labels: Floats) -> tuple[ThresholdRow, ...]:
    """Predicted positives, precision, recall and lift at each decile of the outputs.

    Thresholds are deciles of these very rows, so they describe and were not known beforehand. Intervals are Wilson's,
    of independent rows: labels that overlap over h days make them too narrow by up to √h.
    """
    ordered, positives = np.sort(logits), int(np.sum(labels > 0.5))
    base_rate = positives / len(labels)
    rows = []
    for decile in (k / 10 for k in range(1, 10)):
        # The smallest output with at least that share of the rows below it; rounding of .3 · n must not skip one.
        cut = ordered[min(int(np.ceil(decile * len(ordered) - 1e-9)), len(ordered) - 1)]
        is_predicted = logits >= cut
        hits = int(np.sum(labels[is_predicted] > 0.5))
        precision = wilson(hits, int(is_predicted.sum()))
        rows.append(
            ThresholdRow(
                decile=decile,
                threshold=float(metrics.sigmoid(cut)),
                predicted=precision.n,
                precision=precision,
                recall=wilson(hits, positives),
                lift=None if base_rate == 0 or precision.value is None else precision.value / base_rate,
                lift_low=precision.low / base_rate if base_rate else 0.0,
                lift_high=precision.high / base_rate if base_rate else float("inf"),
            )
        )
    return tuple(rows)


def precision_recall(logits: Floats, labels: Floats) -> PrecisionRecall:
    """Precision and recall with a threshold at every distinct output."""
    order = np.argsort(-logits, kind="stable")
    scores, is_positive = logits[order], labels[order] > 0.5
    ends = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))
    predicted, hits, positives = ends + 1, np.cumsum(is_positive)[ends], int(is_positive.sum())
    precision = [wilson(int(k), int(n)) for k, n in zip(hits, predicted, strict=True)]
    return PrecisionRecall(
        recall=hits / positives if positives else np.full(len(ends), np.nan),
        precision=hits / predicted,
        precision_low=np.array([proportion.low for proportion in precision]),
        precision_high=np.array([proportion.high for proportion in precision]),
        base_rate=positives / len(labels),
    )


# --- conformal intervals ----------------------------------------------------------------------------------------------

ADAPTIVE_STEP = 0.01
"""γ of the adaptive intervals: how far a miss moves the level; Gibbs & Candès use .005 … .05."""
_ADAPTIVE_WINDOW = 500
"""Newest absolute errors that an adaptive interval is the quantile of."""


@dataclass(frozen=True, eq=False)
class Intervals:
    """Intervals for later rows, and whether each held its target."""

    low: Floats
    high: Floats
    """(S',) in the target's unit; ±∞ where the adaptive level has reached 1."""
    covered: np.ndarray
    """(S',) bool."""


def split_intervals(
    predicted: Floats, targets: Floats, later_predicted: Floats, later_targets: Floats, *, level: float = 0.9
) -> Intervals:
    """Split conformal: predicted ± the ⌈(n + 1)(1 − α)⌉-th smallest absolute error of the calibration rows.

    Vovk, Gammerman & Shafer 2005; Lei et al. 2018, algorithm 2. Coverage is at least the level for exchangeable rows,
    which days of a market are not: look at the realised coverage.

    Args:
        predicted: (S,) calibration rows; with `targets` they give the width.
        later_predicted: (S',) later rows, which get the intervals.
        level: 1 − α.

    Raises:
        ValueError: no rows, or a level outside (0, 1).
    """
    errors = _absolute_errors(predicted, targets, later_predicted, level)
    width = _conformal_quantile(np.sort(errors), 1 - level)
    return _intervals(later_predicted, np.full(len(later_predicted), width), later_targets)


def adaptive_intervals(
    predicted: Floats,
    targets: Floats,
    later_predicted: Floats,
    later_targets: Floats,
    *,
    horizon: int,
    level: float = 0.9,
    step: float = ADAPTIVE_STEP,
) -> Intervals:
    """Adaptive conformal inference (Gibbs & Candès 2021, eq. 2): α_{t+1} = α_t + γ (α − missed_t).

    The width is the conformal quantile at α_t of the newest absolute errors. A target of horizon h is known h rows
    later: a miss moves α, and an error joins the window, that much later. Long-run coverage tends to the level
    whatever the series does (their proposition 4.1 bounds the gap by (max(α₁, 1 − α₁) + γ) / (γ T)).

    Args:
        predicted: (S,) calibration rows in time order, of one asset, as `targets`.
        later_predicted: (S',) the rows that follow.

    Raises:
        ValueError: as `split_intervals`.
    """
    calibration_errors = _absolute_errors(predicted, targets, later_predicted, level)
    errors = np.concatenate([calibration_errors, np.abs(later_targets - later_predicted)])
    alpha, widths = 1 - level, np.empty(len(later_predicted))
    for t in range(len(later_predicted)):
        realised = t - horizon  # of the later rows, the newest whose target is known at t
        if realised >= 0:
            missed = errors[len(calibration_errors) + realised] > widths[realised]
            alpha += step * (1 - level - float(missed))
        # At first not even the last h − 1 calibration rows have targets: they may end on the day before.
        n_known = max(len(calibration_errors) + realised + 1, 1)
        widths[t] = _conformal_quantile(np.sort(errors[max(n_known - _ADAPTIVE_WINDOW, 0) : n_known]), alpha)
    return _intervals(later_predicted, widths, later_targets)


def _absolute_errors(predicted: Floats, targets: Floats, later: Floats, level: float) -> Floats:
    if len(predicted) == 0 or len(later) == 0 or not 0 < level < 1:
        raise ValueError(
            "intervals need calibration and later rows, and a level within (0, 1); "
            f"got {len(predicted)} and {len(later)} rows, level {level}"
        )
    return np.abs(targets - predicted)


def _conformal_quantile(errors: Floats, alpha: float) -> float:
    """The (1 − α) quantile of increasing errors: ∞ for α ≤ 0 or too few of them, 0 for α ≥ 1."""
    rank = int(np.ceil((len(errors) + 1) * (1 - alpha) - 1e-9))
    if rank > len(errors):
        return float("inf")
    return float(errors[rank - 1]) if rank >= 1 else 0.0


def _intervals(predicted: Floats, widths: Floats, targets: Floats) -> Intervals:
    middle = np.asarray(predicted, np.float64)
    return Intervals(middle - widths, middle + widths, np.abs(targets - middle) <= widths)
