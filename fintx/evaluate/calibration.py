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
class Recalibration:
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


def recalibrate(logits: Floats, labels: Floats, held_logits: Floats, held_labels: Floats) -> tuple[Recalibration, ...]:
    """Fit every scaling on some rows (validation), judge it on others (the opened test part).

    Returns:
        "none" first: the forecast as it is.
    """
    scaled = {"none": np.asarray(held_logits, np.float64)}
    scaled |= {name: fit(logits, labels)(held_logits) for name, fit in METHODS.items()}
    return tuple(_judged(name, values, held_labels) for name, values in scaled.items())


def recalibrate_forward(logits: Floats, labels: Floats, groups: Ints) -> tuple[Recalibration, ...]:
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


def _judged(method: str, logits: Floats, labels: Floats) -> Recalibration:
    return Recalibration(
        method=method,
        log_loss=float(metrics.per_sample_loss("probability", logits, labels).mean()),
        brier=float(np.square(metrics.sigmoid(logits) - labels).mean()),
        calibration_error=metrics.calibration_error(logits, labels),
        n=len(labels),
    )
