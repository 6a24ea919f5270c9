"""How likely is a level touched, if volatility is all that is known? Driftless diffusion, with one scale fitted.

    price high:  P(max ≥ (1 + θ) · close) = 2 · (1 − Φ(ln(1 + θ) / (k · s)))      θ > 0, the reflection principle
    price close: P(close[t+h] ≥ (1 + θ) · close) = 1 − Φ(ln(1 + θ) / (k · s))

with s the forecast SD of the log return over the h days, and Φ the normal distribution function (Karatzas & Shreve
1991, Brownian Motion and Stochastic Calculus, § 2.8). k is fitted on the training rows: it takes up that an implied
volatility is dearer than what follows, that prices are watched once a day, and that returns have fat tails.
"""

from __future__ import annotations

import math

import numpy as np

from fintx.evaluate import metrics
from fintx.tasks import Threshold
from fintx.types import Floats

TRADING_DAYS = 252
"""A year's, which VIX annualises over."""
_K = (0.1, 4.0)
_CLOSEST = 1e-6
"""Probabilities are kept this far from 0 and 1."""
_FEWEST_RETURNS = 250
"""A year of days, below which no GARCH model is fitted."""


def applies(level: Threshold | None) -> bool:
    """Whether the formula says anything: a level that is not the close itself, and for highs one above it."""
    return level is not None and (level.threshold > 0 or (level.price == "close" and level.threshold != 0))


def fitted(level: Threshold, train: Floats, labels: Floats, validation: Floats) -> Floats:
    """Logits of the touch probability, k fitted by the mean log loss of the training rows.

    Args:
        train: (S,) forecast SD of the log return over the horizon, positive; in any unit, which k takes up.
        labels: (S,) 0 or 1.
        validation: (S',), in the same unit.

    Returns:
        (S',) float64.
    """
    from scipy import optimize

    def loss(log_k: float) -> float:
        outputs = touch_logits(level, math.exp(log_k) * train)
        return float(metrics.per_sample_loss("probability", outputs, labels).mean())

    unit = float(np.median(train))
    typical = abs(math.log1p(level.threshold))  # of the order of s where neither answer is certain
    bounds = [math.log(k * typical / unit) for k in (_K[0] / 10, _K[1] * 10)]
    best = optimize.minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6})
    return touch_logits(level, math.exp(best.x) * validation)


def touch_logits(level: Threshold, sd: Floats) -> Floats:
    """The formula.

    Args:
        sd: (S,) k · s, of the log return over the horizon.
    """
    from scipy.special import ndtr

    assert applies(level)
    tail = ndtr(-math.log1p(level.threshold) / np.maximum(sd, 1e-9))
    probability = np.clip(2 * tail if level.price == "high" else tail, _CLOSEST, 1 - _CLOSEST)
    return np.log(probability) - np.log1p(-probability)


def garch_sd(close: Floats, *, n_train: int, horizon: int) -> Floats:
    """Forecast SD of each day's next `horizon` log returns by a GJR-GARCH(1, 1) (Glosten, Jagannathan & Runkle 1993).

    σ²[t+1] = ω + (α + γ·[e[t] < 0]) · e[t]² + β · σ²[t], fitted by `arch` to the first `n_train` closes with normal
    errors; later days only run through the recursion. E σ² further ahead follows from symmetric errors.

    Returns:
        (T,) float64, known at each close; NaN throughout where there are too few returns, or no fit was found.
    """
    import warnings

    from arch import arch_model

    percent = 100 * np.diff(np.log(close))
    if n_train - 1 < _FEWEST_RETURNS or np.ptp(percent[: n_train - 1]) == 0:
        return np.full(len(close), np.nan)
    model = arch_model(percent[: n_train - 1], mean="Constant", vol="GARCH", p=1, o=1, q=1, rescale=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its words on convergence: judged below
        result = model.fit(disp="off", show_warning=False)
    mu, omega, alpha, gamma, beta = (float(value) for value in result.params)
    persistence = alpha + gamma / 2 + beta
    if result.convergence_flag != 0 or not 0 <= persistence < 1:
        return np.full(len(close), np.nan)
    shocks = percent - mu
    ahead = np.empty(len(close))  # σ² of the next day, known at each close
    ahead[0] = np.var(percent[: n_train - 1])
    for t, shock in enumerate(shocks, start=1):
        ahead[t] = omega + (alpha + gamma * (shock < 0)) * shock**2 + beta * ahead[t - 1]
    total, step = np.zeros(len(close)), ahead
    for _ in range(horizon):
        total, step = total + step, omega + persistence * step
    return np.sqrt(total) / 100
