"""What can validation rows show? The smallest difference that is seen, and how lucky the best of many trials is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fintx.types import Floats

POWER, LEVEL = 0.8, 0.05
"""Chance to see a difference that is there; two-sided chance to see one that isn't."""

LOGIT_GAP = 0.5
"""Assumed SD of the difference between two good forecasters' logits, from which their paired losses differ.

Measured between the baselines that see volatility, on the validation rows of SPY + VIX from 2005, "the high exceeds
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
    """Smallest true difference that a two-sided 5 % test sees in 80 % of studies."""
    n_trials: int
    luck: float
    """Expected maximum of n_trials equal trials, in SDs of one trial's own noise."""
    luck_nats: float
    """By how much the best of equal trials looks better than it is: luck × paired SE / √2."""


def of_rows(base_rate: float, n: int, n_effective: float, *, n_trials: int, logit_gap: float = LOGIT_GAP) -> Power:
    """The power of a paired comparison before any model is trained.

    Of two forecasters whose logits differ by Δ ~ N(0, logit_gap²), both calibrated to first order, a row's losses
    differ by (p − y) Δ, with variance E[p(1 − p)] · logit_gap². p is spread as a useful forecaster's is. Trials that
    are equal but for noise share the rows; each one's own part of the paired variance is half of it, hence the √2.

    Args:
        base_rate: of the validation rows.
        n_effective: of them, by average uniqueness: overlapping labels count once.

    Raises:
        ValueError: a base rate of 0 or 1, or no rows.
    """
    if not 0 < base_rate < 1 or n_effective <= 0:
        raise ValueError(f"wanted a base rate within (0, 1) and rows; got {base_rate} and {n_effective} effective rows")
    paired = float(np.sqrt(_mean_variance(base_rate) * logit_gap**2 / n_effective))
    luck = expected_maximum(n_trials)
    return Power(
        n=n,
        n_effective=n_effective,
        base_rate=base_rate,
        paired_se=paired,
        detectable=smallest_detectable(paired),
        n_trials=n_trials,
        luck=luck,
        luck_nats=luck * paired / np.sqrt(2.0),
    )


def smallest_detectable(se: float, *, power: float = POWER, level: float = LEVEL) -> float:
    """(z_{1 − level/2} + z_{power}) · SE: 2.80 SE at 5 % and 80 % (the far tail's share is below 1e-6)."""
    from scipy.special import ndtri

    return float((ndtri(1 - level / 2) + ndtri(power)) * se)


def expected_maximum(n: int) -> float:
    """Mean of the largest of n independent standard normals: what choosing the best of n equal trials gains, in SDs.

    E = ∫ x n φ(x) Φ(x)ⁿ⁻¹ dx, by the trapezoidal rule; exact to 1e-9 up to a million.

    Raises:
        ValueError: n below 1.
    """
    from scipy.special import log_ndtr

    if n < 1:
        raise ValueError(f"wanted at least one trial, got {n}")
    x: Floats = np.linspace(-12.0, 12.0, 24_001)
    log_density = np.log(n) - 0.5 * x**2 - 0.5 * np.log(2 * np.pi) + (n - 1) * log_ndtr(x)
    return float(np.trapezoid(x * np.exp(log_density), x))


def _mean_variance(base_rate: float) -> float:
    """E[p(1 − p)] of logits normal about the base rate's, by Gauss–Hermite quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(41)
    p = 1 / (1 + np.exp(-(np.log(base_rate / (1 - base_rate)) + _SKILL_SD * nodes)))
    return float(np.sum(weights * p * (1 - p)) / weights.sum())
