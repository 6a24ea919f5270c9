"""Fits of planted laws: the optimum that a global search finds, the truth where there is no noise, the right form."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, optimize

from fintx.evaluate import power_law
from fintx.evaluate.power_law import FORMS, HUBER, fit


def points(law, *, n=12, noise=0.0, sizes=(2e6, 2e7, 2e8), seed=0):
    rng = np.random.default_rng(seed)
    size = np.repeat(sizes, n) * rng.uniform(0.75, 1.25, n * len(sizes))
    return size, law(size) * np.exp(rng.normal(0, noise, len(size)))


@settings(max_examples=20)  # each is a search over starts
@given(alpha=st.floats(0.15, 1.2), reducible=st.floats(0.05, 0.5), floor=st.floats(0.2, 1.0))
def test_without_noise_a_law_is_found_exactly(alpha, reducible, floor):
    size, loss = points(lambda n: floor + reducible * (n / 2e6) ** -alpha)
    fitted = fit("power law", size, loss)
    # L-BFGS on a sum of 36 Hubers, tolerance 1e-15: three digits of an exponent are safe, and a loss far better.
    assert fitted.exponents[0] == pytest.approx(alpha, rel=0.02)
    assert fitted.floor == pytest.approx(floor, rel=0.02)
    np.testing.assert_allclose(fitted(size), loss, rtol=1e-4)
    assert fitted.coefficients[0] == pytest.approx(reducible * 2e6**alpha, rel=0.3)


@pytest.mark.parametrize("form", ["constant", "power law"])
@pytest.mark.parametrize(("height", "alpha"), [(40, 0.35), (0, 0.5)], ids=["falling", "flat"])
def test_the_minimum_is_the_one_that_a_global_search_finds(form, height, alpha):
    size, loss = points(lambda n: 0.6 + height * n**-alpha, noise=0.003)
    law = fit(form, size, loss)
    signs = FORMS[form]
    logs, wanted = np.log(size / law.unit), np.log(loss) - np.log(loss).mean()
    bounds = [(math.log(1e-9), 2.0)] * (1 + len(signs)) + [power_law.BOUND] * len(signs)
    reference = optimize.differential_evolution(
        lambda theta: power_law._objective(theta, logs, wanted, signs, HUBER)[0], bounds, seed=0, tol=1e-10, popsize=20
    )
    assert law.huber <= reference.fun * (1 + 1e-6)


@pytest.mark.parametrize(
    ("law", "form"),
    [
        (lambda n: 0.6 + 0 * n, "constant"),
        (lambda n: 0.6 + 0.05 * (n / 2e6) ** -0.5, "power law"),
        (lambda n: 0.6 + 0.05 * (n / 2e6) ** -1.0 + 0.02 * (n / 2e8) ** 0.6, "power law + overfitting"),
    ],
    ids=["flat", "falls", "falls and rises"],
)
def test_aicc_prefers_the_planted_form(law, form):
    size, loss = points(law, noise=0.002, sizes=(2e6, 6e6, 2e7, 6e7, 2e8))
    fits = [fit(each, size, loss) for each in FORMS]
    shares = power_law.weights(fits)
    assert max(zip(shares, FORMS, strict=True))[1] == form
    assert sum(shares) == pytest.approx(1)


def test_the_likelihood_of_residuals_is_a_density():
    # AICc uses Z(s) = √(2πs)·erf(δ/√(2s)) + (2s/δ)·exp(−δ²/2s): it must be the integral of exp(−Huber / s).
    for s in (1e-7, 1e-6, 1e-5):

        def height(r, s=s):
            return math.exp(-(0.5 * r * r if abs(r) <= HUBER else HUBER * (abs(r) - 0.5 * HUBER)) / s)

        whole = 2 * (integrate.quad(height, 0, HUBER)[0] + integrate.quad(height, HUBER, HUBER + 50 * s / HUBER)[0])
        z = math.sqrt(2 * math.pi * s) * math.erf(HUBER / math.sqrt(2 * s)) + 2 * s / HUBER * math.exp(
            -(HUBER**2) / (2 * s)
        )
        assert whole == pytest.approx(z, rel=1e-6)


def test_too_few_points_have_no_aicc():
    size, loss = points(lambda n: 0.6 + 0.05 * (n / 2e6) ** -0.5, n=1, sizes=(2e6, 6e6, 2e7, 6e7, 2e8))
    assert fit("constant", size, loss).aicc is not None
    assert fit("power law", size, loss).aicc is None
    assert power_law.weights([fit(form, size, loss) for form in FORMS])[1] is None


def test_a_refit_from_near_the_truth_is_as_good_as_a_fit_from_the_grid():
    size, loss = points(lambda n: 0.6 + 0.05 * (n / 2e6) ** -0.5, noise=0.003)
    whole = fit("power law", size, loss)
    again = fit("power law", size, loss, starts=[(whole.exponents[0] * 1.2,), (0.1,)])
    assert again.huber == pytest.approx(whole.huber, rel=1e-4)


def test_numbers_that_are_no_losses_are_refused():
    with pytest.raises(ValueError, match="positive sizes and losses"):
        fit("constant", np.array([1.0, 2.0]), np.array([1.0, -1.0]))
    with pytest.raises(ValueError, match="positive sizes and losses"):
        fit("constant", np.array([1.0, 2.0]), np.array([1.0]))
