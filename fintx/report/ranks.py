"""Do two orders agree? Spearman's rank correlation, with an interval that is honest for few points."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

from fintx.types import Floats

LEAST = 5
"""Fewer pairs than this say nothing: the interval would be nearly −1 … 1."""


@dataclass(frozen=True)
class Agreement:
    """A rank correlation of n pairs."""

    rho: float | None
    """None where either side is constant, or the pairs are too few."""
    low: float | None
    high: float | None
    n: int


def spearman(a: Floats, b: Floats, *, level: float = 0.95) -> Agreement:
    """Spearman's ρ and its interval by Fisher's z with variance (1 + ρ²/2) / (n − 3) (Bonett & Wright 2000).

    Args:
        a, b: (n,) paired values.
    """
    n = len(a)
    if n < LEAST or np.ptp(a) == 0 or np.ptp(b) == 0:
        return Agreement(None, None, None, n)
    ranks = [stats.rankdata(values) for values in (a, b)]
    rho = float(np.clip(np.corrcoef(*ranks)[0, 1], -1, 1))
    half = float(stats.norm.ppf((1 + level) / 2)) * math.sqrt((1 + rho**2 / 2) / (n - 3))
    z = math.atanh(min(max(rho, -1 + 1e-9), 1 - 1e-9))
    return Agreement(rho, math.tanh(z - half), math.tanh(z + half), n)
