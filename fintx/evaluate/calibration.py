"""Do probabilities mean what they say? Reliability, Murphy's decomposition, and scaling judged on rows it never saw.

The expected calibration error stands in `metrics`. Everything takes logits, which is what models and baselines put out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fintx.evaluate import metrics
from fintx.types import Floats, Ints

BINS = metrics.CALIBRATION_BINS
_CLIP = 1e-6
"""Probabilities that a scaling may say: isotonic steps reach 0 and 1, whose log loss is infinite when they err."""


@dataclass(frozen=True)
class Share:
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
    """Mean probability said."""
    low: float
    high: float
    """Smallest and largest probability said."""
    observed: Share
    """Share of positives."""


@dataclass(frozen=True)
class BrierParts:
    """Murphy 1973, with what bins hide: brier = reliability − resolution + uncertainty + within.

    reliability: Σ n_b (mean p − observed)² / n; 0 for calibrated forecasts.
    resolution: Σ n_b (observed − base rate)² / n; how far the bins part days that differ.
    uncertainty: base rate · (1 − base rate); the day's own chance.
    within: spread of p inside the bins less twice its covariance with the outcome (Stephenson, Coelho & Jolliffe 2008).
    """

    brier: float
    reliability: float
    resolution: float
    uncertainty: float
    within: float


@dataclass(frozen=True)
class RecalibrationScore:
    """A forecast before and after a scaling, on rows that the scaling never saw."""

    method: str
    """none, temperature, isotonic."""
    log_loss: float
    brier: float
    calibration_error: float
    n: int


Scaling = Callable[[Floats], Floats]
"""Logits to scaled logits, monotone."""


def wilson(k: int, n: int, *, level: float = 0.95) -> Share:
    """A share with its score interval (Wilson 1927), which stays in 0 … 1 and holds its level for small n and rare k.

    Raises:
        ValueError: k outside 0 … n, or a level outside (0, 1).
    """
    from scipy.special import ndtri

    if not 0 <= k <= n or not 0 < level < 1:
        raise ValueError(f"wanted 0 ≤ k ≤ n and 0 < level < 1, got k = {k}, n = {n}, level = {level}")
    if n == 0:
        return Share(None, 0.0, 1.0, 0, 0)
    z, p = float(ndtri(0.5 + level / 2)), k / n
    middle, width = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # At k = 0 and k = n an end is exactly 0 or 1, which rounding must not miss.
    low = 0.0 if k == 0 else float((middle - width) / scale)
    high = 1.0 if k == n else float((middle + width) / scale)
    return Share(p, low, high, k, n)


def reliability(logits: Floats, labels: Floats, *, bins: int = BINS, level: float = 0.95) -> tuple[ReliabilityBin, ...]:
    """The reliability curve: bins of equal mass from low to high probability; bins without rows are left out.

    Rows with equal logits share a bin, as in `metrics.calibration_error`. Wilson's interval takes rows for independent;
    labels that overlap over h days make it too narrow by up to √h.

    Args:
        logits: (S,).
        labels: (S,) 0 or 1.
    """
    p = metrics.sigmoid(logits)
    found = []
    place = _bins(logits, bins)
    for which in np.unique(place):
        said, came = p[place == which], labels[place == which]
        share = wilson(int(np.sum(came > 0.5)), len(came), level=level)
        found.append(ReliabilityBin(float(said.mean()), float(said.min()), float(said.max()), share))
    return tuple(found)


def brier_parts(logits: Floats, labels: Floats, *, bins: int = BINS) -> BrierParts:
    """Murphy's decomposition of the Brier score over bins of equal mass; the four parts add up exactly."""
    p, y = metrics.sigmoid(logits), np.asarray(labels, np.float64)
    place, n, base = _bins(logits, bins), len(y), y.mean()
    reliable = resolved = 0.0
    for which in np.unique(place):
        said, came = p[place == which].mean(), y[place == which].mean()
        share = np.mean(place == which)
        reliable += share * (said - came) ** 2
        resolved += share * (came - base) ** 2
    brier, uncertain = float(np.square(p - y).mean()), float(base * (1 - base))
    assert n > 0
    return BrierParts(
        brier, float(reliable), float(resolved), uncertain, float(brier - reliable + resolved - uncertain)
    )


def _bins(logits: Floats, bins: int) -> Ints:
    """(S,) bin of each row: that of the mean rank of its equals."""
    _, place, counts = np.unique(logits, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - counts / 2
    return (middle * bins / len(logits)).astype(int)[place]


# --- scaling ----------------------------------------------------------------------------------------------------------


def temperature(logits: Floats, labels: Floats) -> float:
    """The T > 0 whose logits / T have the least log loss (Guo et al. 2017, section 4.2); 1: calibrated as it is.

    The loss is convex in 1/T; T stays within 1/20 … 20 where labels can't tell (forecasts that are no better than their
    own reverse would ask for an infinite one).
    """
    from scipy.optimize import minimize_scalar

    def loss(log_t: float) -> float:
        return float(metrics.per_sample_loss("probability", logits / np.exp(log_t), labels).mean())

    bound = np.log(20.0)
    found = minimize_scalar(loss, bounds=(-bound, bound), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x))


def fit_temperature(logits: Floats, labels: Floats) -> Scaling:
    """Scaling by `temperature`: it changes how sure a forecast sounds, never its order nor which side of ½ it is on."""
    t = temperature(np.asarray(logits, np.float64), labels)
    return lambda new: np.asarray(new, np.float64) / t


def fit_isotonic(logits: Floats, labels: Floats) -> Scaling:
    """Scaling by isotonic regression (Zadrozny & Elkan 2002): any increasing map; needs hundreds of rows."""
    from sklearn.isotonic import IsotonicRegression

    model = IsotonicRegression(y_min=_CLIP, y_max=1 - _CLIP, out_of_bounds="clip")
    model.fit(np.asarray(logits, np.float64), np.asarray(labels, np.float64))

    def scale(new: Floats) -> Floats:
        p = model.predict(np.asarray(new, np.float64))
        return np.log(p) - np.log1p(-p)

    return scale


METHODS: dict[str, Callable[[Floats, Floats], Scaling]] = {
    "temperature": fit_temperature,
    "isotonic": fit_isotonic,
}


def recalibrate(
    logits: Floats, labels: Floats, held_logits: Floats, held_labels: Floats
) -> tuple[RecalibrationScore, ...]:
    """Fit every scaling on some rows (validation), judge it on others (the opened test part).

    Returns:
        "none" first: the forecast as it is.
    """
    scaled = {"none": np.asarray(held_logits, np.float64)}
    scaled |= {name: fit(logits, labels)(held_logits) for name, fit in METHODS.items()}
    return tuple(_judged(name, values, held_labels) for name, values in scaled.items())


def recalibrate_forward(logits: Floats, labels: Floats, groups: Ints) -> tuple[RecalibrationScore, ...]:
    """Fit every scaling on the groups before, judge it on the next one, pool what was judged; the first teaches only.

    Args:
        groups: (S,) fold of each row, in time order; or `halves` where there is one fold. Negative: not used.

    Raises:
        ValueError: fewer than two groups.
    """
    order = np.unique(groups[groups >= 0])
    if len(order) < 2:
        raise ValueError("scaling needs rows to learn from and later ones to be judged on: two folds, or halves of one")
    held = groups > order[0]
    scaled = {"none": np.asarray(logits, np.float64).copy()} | {name: np.full(len(logits), np.nan) for name in METHODS}
    for group in order[1:]:
        before, now = (groups >= 0) & (groups < group), groups == group
        for name, fit in METHODS.items():
            scaled[name][now] = fit(logits[before], labels[before])(logits[now])
    return tuple(_judged(name, values[held], labels[held]) for name, values in scaled.items())


def halves(dates: np.ndarray, *, horizon: int) -> Ints:
    """(S,) 0: the older half of the days; 1: the newer; −1: the h days between, whose labels look into the newer."""
    days = np.unique(dates)
    middle = len(days) // 2
    place = np.searchsorted(days, dates)
    return np.where(place >= middle, 1, np.where(place >= middle - horizon, -1, 0))


def _judged(method: str, logits: Floats, labels: Floats) -> RecalibrationScore:
    return RecalibrationScore(
        method=method,
        log_loss=float(metrics.per_sample_loss("probability", logits, labels).mean()),
        brier=float(np.square(metrics.sigmoid(logits) - labels).mean()),
        calibration_error=metrics.calibration_error(logits, labels),
        n=len(labels),
    )


DECILES = tuple(k / 10 for k in range(1, 10))


@dataclass(frozen=True)
class ThresholdRow:
    """Saying yes where p ≥ threshold."""

    decile: float
    """Share of rows that lie below the threshold, .9: the tenth of the rows with the highest p says yes."""
    threshold: float
    """Probability."""
    predicted: int
    """Rows that say yes. More than their decile's share where many rows have the same p."""
    precision: Share
    """Share of them that came true."""
    recall: Share
    """Share of what came true that was said."""
    lift: float | None
    lift_low: float
    lift_high: float
    """Precision over the base rate of these rows, with the ends of precision's interval."""


@dataclass(frozen=True, eq=False)
class PrecisionRecall:
    """The precision–recall curve, a point per distinct output, from the surest yes to all rows."""

    threshold: Floats
    """(K,) probability."""
    predicted: Floats
    """(K,) rows that say yes."""
    recall: Floats
    precision: Floats
    """(K,)."""
    precision_low: Floats
    precision_high: Floats
    """(K,) Wilson."""
    base_rate: float
    """Precision of saying yes always; lift is precision over it."""
    average_precision: float | None

    @property
    def lift(self) -> Floats:
        """(K,) precision / base rate; NaN without positives."""
        return self.precision / self.base_rate if self.base_rate > 0 else np.full(len(self.precision), np.nan)


def threshold_table(
    logits: Floats, labels: Floats, *, deciles: tuple[float, ...] = DECILES, level: float = 0.95
) -> tuple[ThresholdRow, ...]:
    """Predicted positives, precision, recall and lift at each decile of the outputs.

    The thresholds come from the very rows: they describe, and are not known beforehand. Intervals are Wilson's, of
    independent rows: labels that overlap over h days make them too narrow by up to √h.

    Args:
        logits: (S,), S > 0.
        labels: (S,) 0 or 1.
    """
    ordered, positives = np.sort(logits), int(np.sum(labels > 0.5))
    base_rate = positives / len(labels)
    rows = []
    for decile in deciles:
        # The smallest output with at least that share of the rows below it; rounding of .3 · n must not skip one.
        cut = ordered[min(int(np.ceil(decile * len(ordered) - 1e-9)), len(ordered) - 1)]
        said = logits >= cut
        hits = int(np.sum(labels[said] > 0.5))
        precision = wilson(hits, int(said.sum()), level=level)
        rows.append(
            ThresholdRow(
                decile=decile,
                threshold=float(metrics.sigmoid(cut)),
                predicted=int(said.sum()),
                precision=precision,
                recall=wilson(hits, positives, level=level),
                lift=None if base_rate == 0 or precision.value is None else precision.value / base_rate,
                lift_low=precision.low / base_rate if base_rate else 0.0,
                lift_high=precision.high / base_rate if base_rate else float("inf"),
            )
        )
    return tuple(rows)


def precision_recall(logits: Floats, labels: Floats, *, level: float = 0.95) -> PrecisionRecall:
    """Precision and recall of saying yes at and above every distinct output; arguments as `threshold_table`."""
    order = np.argsort(-logits, kind="stable")
    scores, truth = logits[order], labels[order] > 0.5
    ends = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))
    predicted, hits = ends + 1, np.cumsum(truth)[ends]
    positives = int(truth.sum())
    shares = [wilson(int(k), int(n), level=level) for k, n in zip(hits, predicted, strict=True)]
    return PrecisionRecall(
        threshold=metrics.sigmoid(scores[ends]),
        predicted=predicted,
        recall=hits / positives if positives else np.full(len(ends), np.nan),
        precision=hits / predicted,
        precision_low=np.array([share.low for share in shares]),
        precision_high=np.array([share.high for share in shares]),
        base_rate=positives / len(labels),
        average_precision=metrics.average_precision(logits, labels),
    )


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
