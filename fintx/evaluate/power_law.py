"""How does loss fall with size? Fits of L(x) = E + A·x^(−α), of a constant, and of a power law that turns up again.

Chinchilla's third approach (Hoffmann et al. 2022, section 3.3): minimise the *sum* of Huber losses (δ = 1e-3) of
ln L̂ − ln L by L-BFGS, in float64, from a grid of starts, and keep the best. Besiroglu et al. 2024 (arXiv 2404.10102)
found the published fit spoilt by a mean in place of the sum and a loose tolerance: the optimiser stopped early, and the
intervals were impossibly narrow. For given exponents the model is linear in E, A and B, so each start's coefficients
are solved for (non-negative least squares: variable projection) and the grid is one of exponents alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import optimize, special

from fintx.types import Floats

HUBER = 1e-3
"""δ in ln loss, the paper's: residuals beyond a thousandth count by their size, not by their square."""
_EXPONENTS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9, 1.2, 1.6, 2.2, 3.0)
BOUND = (0.01, 5.0)
"""Of an exponent: below, x^(−α) is a logarithm; above, a step."""
_TINY = 1e-9
_STARTS = 3
"""How many of the grid's best points are descended from."""
_REWEIGHTINGS = 8
_OPTIONS = {"maxiter": 1000, "maxfun": 1000, "ftol": 1e-15, "gtol": 1e-12}

Form = Literal["constant", "power law", "power law + overfitting"]
FORMS: dict[Form, tuple[int, ...]] = {
    "constant": (),
    "power law": (-1,),
    "power law + overfitting": (-1, 1),
}
"""Form → the sign of each of its terms' exponents: E, E + A·x^(−α), E + A·x^(−α) + B·x^β."""


@dataclass(frozen=True)
class FittedLaw:
    """A fitted form. Sizes are measured in `unit`, their geometric mean, inside; `__call__` takes plain sizes."""

    form: Form
    unit: float
    floor: float
    """E."""
    heights: tuple[float, ...]
    """Of each term at x = unit: A·unit^(−α), B·unit^β."""
    exponents: tuple[float, ...]
    """α, β; positive."""
    huber: float
    """Σ Huber of ln L̂ − ln L."""
    aicc: float | None
    """None where n is too small for the form."""
    n: int

    @property
    def n_parameters(self) -> int:
        """Free numbers, the scale of the residuals included."""
        return 2 + 2 * len(self.exponents)

    @property
    def coefficients(self) -> tuple[float, ...]:
        """A, B, for sizes in units of one."""
        signs = FORMS[self.form]
        return tuple(h * self.unit ** (-s * x) for h, s, x in zip(self.heights, signs, self.exponents, strict=True))

    def __call__(self, sizes: Floats) -> Floats:
        """Losses that the fit predicts."""
        relative = np.asarray(sizes, np.float64) / self.unit
        terms = zip(self.heights, FORMS[self.form], self.exponents, strict=True)
        return self.floor + np.sum([h * relative ** (s * x) for h, s, x in terms], axis=0)


def fit(form: Form, sizes: Floats, losses: Floats, *, starts: Sequence[tuple[float, ...]] | None = None) -> FittedLaw:
    """FittedLaw one form.

    Args:
        sizes: (n,) positive.
        losses: (n,) positive.
        starts: exponents to start from, for a refit near a known fit: the best of them is descended from; none: a grid,
            and its best three.

    Raises:
        ValueError: other lengths, or numbers that aren't positive.
    """
    sizes, losses = np.asarray(sizes, np.float64), np.asarray(losses, np.float64)
    if sizes.shape != losses.shape or sizes.ndim != 1 or not (np.all(sizes > 0) and np.all(losses > 0)):
        raise ValueError(f"wanted (n,) positive sizes and losses; got shapes {sizes.shape} and {losses.shape}")
    unit = float(np.exp(np.mean(np.log(sizes))))
    logs, wanted, signs = np.log(sizes / unit), np.log(losses), FORMS[form]
    grid = starts if starts is not None else list(itertools.product(_EXPONENTS, repeat=len(signs)))
    begun = sorted((_project(logs, wanted, signs, each) for each in grid), key=lambda found: found[0])
    few = _STARTS if starts is None else 1
    best = min((_descend(logs, wanted, signs, theta) for _, theta in begun[:few]), key=lambda found: found[0])
    total, theta = best
    k = len(signs)
    scale = math.exp(float(np.mean(wanted)))
    return FittedLaw(
        form=form,
        unit=unit,
        floor=scale * math.exp(theta[0]),
        heights=tuple(scale * math.exp(value) for value in theta[1 : 1 + k]),
        exponents=tuple(float(value) for value in theta[1 + k :]),
        huber=total,
        aicc=_aicc(total, len(losses), 2 + 2 * k),
        n=len(losses),
    )


def _project(
    logs: Floats, wanted: Floats, signs: tuple[int, ...], exponents: tuple[float, ...]
) -> tuple[float, Floats]:
    """(Σ Huber, parameters) for given exponents: ln E, ln heights, exponents; losses in units of their geometric mean.

    The heights are linear: least squares with the Huber weights of the residuals before, again and again.
    """
    k = len(signs)
    losses = np.exp(wanted - wanted.mean())
    terms = [np.exp(s * x * logs) for s, x in zip(signs, exponents, strict=True)]
    columns = np.stack([np.ones_like(logs), *terms], axis=1) / losses[:, None]  # so that residuals are those of ln L
    root = np.ones_like(logs)
    for _ in range(_REWEIGHTINGS):
        heights, _ = optimize.nnls(columns * root[:, None], root)
        off = np.abs(np.log(np.maximum(columns @ heights, _TINY)))
        root = np.sqrt(HUBER / np.maximum(off, HUBER))
    theta = np.concatenate([np.log(np.maximum(heights, _TINY)), exponents])
    assert len(theta) == 1 + 2 * k
    return _objective(theta, logs, wanted - wanted.mean(), signs, HUBER)[0], theta


def _descend(logs: Floats, wanted: Floats, signs: tuple[int, ...], theta: Floats) -> tuple[float, Floats]:
    """(Σ Huber, parameters) at the minimum that is reached from a start."""
    k, relative = len(signs), wanted - wanted.mean()
    bounds = [(math.log(_TINY), 5.0)] * (1 + k) + [BOUND] * k
    # From a smooth objective to the one that is wanted: at δ = 1e-3 it is nearly one of absolute values, whose kinks
    # stop a quasi-Newton method far from the minimum.
    ends = [(_objective(theta, logs, relative, signs, HUBER)[0], theta)]
    for delta in (5 * HUBER, HUBER):
        found = optimize.minimize(
            _objective, theta, args=(logs, relative, signs, delta), jac=True, method="L-BFGS-B", bounds=bounds,
            options=_OPTIONS,
        )  # fmt: skip
        theta = found.x
        ends.append((_objective(theta, logs, relative, signs, HUBER)[0], theta))
    return min(ends, key=lambda end: end[0])


def _objective(
    theta: Floats, logs: Floats, wanted: Floats, signs: tuple[int, ...], delta: float
) -> tuple[float, Floats]:
    """Σ Huber_δ and its gradient."""
    k = len(signs)
    slopes = np.concatenate([[0.0], np.multiply(signs, theta[1 + k :])])
    terms = np.exp(theta[: 1 + k, None] + slopes[:, None] * logs)  # (1 + k, n)
    whole = terms.sum(axis=0)
    residual = np.log(whole) - wanted
    slope = np.clip(residual, -delta, delta)
    pull = (terms / whole) * slope
    gradient = np.concatenate([pull.sum(axis=1), np.multiply(signs, pull[1:] @ logs)])
    return float(slope @ residual - 0.5 * (slope @ slope)), gradient


def _aicc(total: float, n: int, k: int) -> float | None:
    """Akaike's criterion, corrected for small n (Hurvich & Tsai 1989), of the likelihood that the Huber fit maximises.

    The density of a residual r is exp(−Huber(r) / s) / Z(s): normal in the middle, exponential in the tails, so for any
    scale s the fit is the likelihood's maximum; s itself is chosen by it too.
    """
    if n - k - 1 <= 0:
        return None

    def minus_log_likelihood(log_s: float) -> float:
        s = math.exp(log_s)
        middle = math.sqrt(2 * math.pi * s) * special.erf(HUBER / math.sqrt(2 * s))
        tails = 2 * s / HUBER * math.exp(-(HUBER**2) / (2 * s))
        return total / s + n * math.log(middle + tails)

    # s = mean Huber if all residuals are in the tails; a hundredfold to either side holds every case.
    centre = math.log(max(total / n, 1e-12))
    found = optimize.minimize_scalar(minus_log_likelihood, bounds=(centre - 7, centre + 7), method="bounded")
    return 2 * float(found.fun) + 2 * k + 2 * k * (k + 1) / (n - k - 1)


def weights(fits: Sequence[FittedLaw]) -> tuple[float | None, ...]:
    """Akaike weights: how probable each form is, of those compared; none for a form without AICc."""
    known = [f.aicc for f in fits if f.aicc is not None]
    if not known:
        return tuple(None for _ in fits)
    shares = {f.form: math.exp(-(f.aicc - min(known)) / 2) for f in fits if f.aicc is not None}
    return tuple(shares[f.form] / sum(shares.values()) if f.form in shares else None for f in fits)
