"""Power laws: fits of L(x) = E + A·x^(−α), of a constant, and of a power law that rises again.

Chinchilla's third approach (Hoffmann et al. 2022, section 3.3): minimise the *sum* of Huber losses (δ = 1e-3) of
ln L̂ − ln L by L-BFGS, in float64, from a grid of starts, and keep the best. Besiroglu et al. 2024 (arXiv 2404.10102)
found that the published fit took a mean in place of the sum and a loose tolerance: the optimiser stopped early, and
the intervals were impossibly narrow. For given exponents the model is linear in E, A and B, so each start's
coefficients are solved for (non-negative least squares: variable projection) and the grid is one of exponents alone.
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
BOUND = (0.01, 5.0)
"""Of an exponent: below, x^(−α) is a logarithm; above, a step."""
_EXPONENTS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9, 1.2, 1.6, 2.2, 3.0)
_DESCENTS = 3
"""How many of the grid's best points L-BFGS starts from."""
_REWEIGHTINGS = 8
_TINY = 1e-9

Form = Literal["constant", "power law", "power law + overfitting"]
FORMS: dict[Form, tuple[int, ...]] = {
    "constant": (),
    "power law": (-1,),
    "power law + overfitting": (-1, 1),
}
"""Form → the sign of each of its terms' exponents: E, E + A·x^(−α), E + A·x^(−α) + B·x^β."""


@dataclass(frozen=True)
class FittedLaw:
    """A fitted form, which predicts losses when called with sizes."""

    form: Form
    unit: float
    """Geometric mean of the sizes, which the fit measures them in."""
    floor: float
    """E, the loss that no size goes below."""
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
    def coefficients(self) -> tuple[float, ...]:
        """A, B, for sizes in units of one."""
        signs = FORMS[self.form]
        return tuple(h * self.unit ** (-s * x) for h, s, x in zip(self.heights, signs, self.exponents, strict=True))

    def __call__(self, sizes: Floats) -> Floats:
        relative = np.asarray(sizes, np.float64) / self.unit
        terms = zip(self.heights, FORMS[self.form], self.exponents, strict=True)
        return self.floor + np.sum([h * relative ** (s * x) for h, s, x in terms], axis=0)


def fit(form: Form, sizes: Floats, losses: Floats, *, starts: Sequence[tuple[float, ...]] | None = None) -> FittedLaw:
    """Fit one form.

    Args:
        sizes: (n,) positive.
        losses: (n,) positive.
        starts: exponents to start from, for a refit near an earlier fit: L-BFGS starts from the best of them; None: a
            grid, and its best three.

    Raises:
        ValueError: other lengths, or numbers that aren't positive.
    """
    sizes, losses = np.asarray(sizes, np.float64), np.asarray(losses, np.float64)
    if sizes.shape != losses.shape or sizes.ndim != 1 or not (np.all(sizes > 0) and np.all(losses > 0)):
        raise ValueError(f"a fit needs (n,) positive sizes and losses; got shapes {sizes.shape} and {losses.shape}")
    unit = float(np.exp(np.mean(np.log(sizes))))
    signs, log_sizes, log_losses = FORMS[form], np.log(sizes / unit), np.log(losses)
    scale, log_losses = math.exp(float(np.mean(log_losses))), log_losses - log_losses.mean()
    grid = starts if starts is not None else list(itertools.product(_EXPONENTS, repeat=len(signs)))
    projected = sorted((_project(log_sizes, log_losses, signs, point) for point in grid), key=lambda end: end[0])
    n_descents = _DESCENTS if starts is None else 1
    huber, theta = min(
        (_descend(log_sizes, log_losses, signs, theta) for _, theta in projected[:n_descents]), key=lambda end: end[0]
    )
    k = len(signs)
    return FittedLaw(
        form=form,
        unit=unit,
        floor=scale * math.exp(theta[0]),
        heights=tuple(scale * math.exp(value) for value in theta[1 : 1 + k]),
        exponents=tuple(float(value) for value in theta[1 + k :]),
        huber=huber,
        aicc=_aicc(huber, len(losses), 2 + 2 * k),  # the scale of the residuals is a parameter too
        n=len(losses),
    )


# Parameters θ, in what follows: ln E, ln heights, exponents; losses in units of their geometric mean.


def _project(
    log_sizes: Floats, log_losses: Floats, signs: tuple[int, ...], exponents: tuple[float, ...]
) -> tuple[float, Floats]:
    """(Σ Huber, θ) for given exponents.

    E and the heights are linear: least squares, reweighted by the Huber weights of the residuals before.
    """
    terms = [np.exp(s * x * log_sizes) for s, x in zip(signs, exponents, strict=True)]
    # Over the losses, so that residuals are those of ln L.
    columns = np.stack([np.ones_like(log_sizes), *terms], axis=1) / np.exp(log_losses)[:, None]
    root_weights = np.ones_like(log_sizes)
    for _ in range(_REWEIGHTINGS):
        heights, _ = optimize.nnls(columns * root_weights[:, None], root_weights)
        residuals = np.abs(np.log(np.maximum(columns @ heights, _TINY)))
        root_weights = np.sqrt(HUBER / np.maximum(residuals, HUBER))
    theta = np.concatenate([np.log(np.maximum(heights, _TINY)), exponents])
    return _objective(theta, log_sizes, log_losses, signs, HUBER)[0], theta


def _descend(log_sizes: Floats, log_losses: Floats, signs: tuple[int, ...], theta: Floats) -> tuple[float, Floats]:
    """(Σ Huber, θ) at the minimum that is reached from a start."""
    bounds = [(math.log(_TINY), 5.0)] * (1 + len(signs)) + [BOUND] * len(signs)
    ends = [(_objective(theta, log_sizes, log_losses, signs, HUBER)[0], theta)]
    # First a smoother objective: at δ = 1e-3 it is nearly one of absolute values, whose kinks stop a quasi-Newton
    # method far from the minimum.
    for delta in (5 * HUBER, HUBER):
        theta = optimize.minimize(
            _objective, theta, args=(log_sizes, log_losses, signs, delta), jac=True, method="L-BFGS-B", bounds=bounds,
            options={"maxiter": 1000, "maxfun": 1000, "ftol": 1e-15, "gtol": 1e-12},
        ).x  # fmt: skip
        ends.append((_objective(theta, log_sizes, log_losses, signs, HUBER)[0], theta))
    return min(ends, key=lambda end: end[0])


def _objective(
    theta: Floats, log_sizes: Floats, log_losses: Floats, signs: tuple[int, ...], delta: float
) -> tuple[float, Floats]:
    """Σ Huber_δ and its gradient."""
    k = len(signs)
    slopes = np.concatenate([[0.0], np.multiply(signs, theta[1 + k :])])
    terms = np.exp(theta[: 1 + k, None] + slopes[:, None] * log_sizes)  # (1 + k, n)
    predicted = terms.sum(axis=0)
    residual = np.log(predicted) - log_losses
    d_residual = np.clip(residual, -delta, delta)
    d_log_terms = (terms / predicted) * d_residual
    gradient = np.concatenate([d_log_terms.sum(axis=1), np.multiply(signs, d_log_terms[1:] @ log_sizes)])
    return float(d_residual @ residual - 0.5 * (d_residual @ d_residual)), gradient


def _aicc(huber: float, n: int, n_parameters: int) -> float | None:
    """Akaike's criterion, corrected for small n (Hurvich & Tsai 1989), of the likelihood that the Huber fit maximises.

    The density of a residual r is exp(−Huber(r) / s) / Z(s): normal in the middle, exponential in the tails, so for any
    scale s the fit is the likelihood's maximum; s itself is chosen by it too.
    """
    k = n_parameters
    if n - k - 1 <= 0:
        return None

    def minus_log_likelihood(log_s: float) -> float:
        s = math.exp(log_s)
        middle = math.sqrt(2 * math.pi * s) * special.erf(HUBER / math.sqrt(2 * s))
        tails = 2 * s / HUBER * math.exp(-(HUBER**2) / (2 * s))
        return huber / s + n * math.log(middle + tails)

    # s = mean Huber if all residuals are in the tails; a hundredfold to either side holds every case.
    centre = math.log(max(huber / n, 1e-12))
    minimum = optimize.minimize_scalar(minus_log_likelihood, bounds=(centre - 7, centre + 7), method="bounded")
    return 2 * float(minimum.fun) + 2 * k + 2 * k * (k + 1) / (n - k - 1)


def weights(laws: Sequence[FittedLaw]) -> tuple[float | None, ...]:
    """Akaike weights: how probable each form is, of those compared; None for a form without AICc."""
    best = min((law.aicc for law in laws if law.aicc is not None), default=0.0)
    shares = [None if law.aicc is None else math.exp(-(law.aicc - best) / 2) for law in laws]
    total = sum(share for share in shares if share is not None)
    return tuple(None if share is None else share / total for share in shares)
