"""The touch probability against simulated paths, its scale against a planted one, GARCH against arch's own filter."""

from __future__ import annotations

import numpy as np
import pytest

from fintx.evaluate import baselines
from fintx.tasks import Direction, Threshold


def task(threshold: float = 0.01, price: str = "high", horizon: int = 3) -> Threshold:
    return Threshold(price=price, threshold=threshold, horizon=horizon)


def probability(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))


@pytest.mark.parametrize(("price", "threshold"), [("high", 0.01), ("close", 0.01), ("close", -0.02)])
def test_the_formula_is_what_fine_paths_do(price, threshold):
    rng = np.random.default_rng(0)
    sd, n_steps, n_paths = 0.012, 2000, 20_000
    path, highest = np.zeros(n_paths), np.zeros(n_paths)
    for _ in range(n_steps):
        path += rng.normal(scale=sd / np.sqrt(n_steps), size=n_paths)
        np.maximum(highest, path, out=highest)
    reached = highest if price == "high" else path
    p = probability(baselines.touch_logits(task(threshold, price), np.array([sd])))[0]
    # watched 2,000 times, a maximum is missed by .58 · sd / √2000 (Broadie, Glasserman & Kou 1997); SE .0035
    assert p == pytest.approx((reached >= np.log1p(threshold)).mean(), abs=0.02)


@pytest.mark.parametrize("k", [0.6, 1.0, 1.7])
def test_a_planted_scale_is_found(k):
    rng = np.random.default_rng(1)
    sd = np.exp(rng.normal(-4.5, 0.5, 20_000))
    labels = (rng.random(len(sd)) < probability(baselines.touch_logits(task(), k * sd))).astype(np.float32)
    logits = baselines.touch(task(), sd[:, None], labels, sd[:100, None])
    np.testing.assert_allclose(logits, baselines.touch_logits(task(), k * sd[:100]), atol=0.1)
    other_unit = baselines.touch(task(), 1e4 * sd[:, None], labels, 1e4 * sd[:100, None])
    np.testing.assert_allclose(other_unit, logits, atol=1e-3)


def test_where_the_formula_says_nothing():
    assert baselines.touch_applies(task()) and baselines.touch_applies(task(-0.01, "close"))
    assert not baselines.touch_applies(task(-0.01, "high"))
    assert not baselines.touch_applies(Direction(horizon=1).level)


def closes(n: int = 1500, seed: int = 2) -> np.ndarray:
    """Prices of a GJR-GARCH process."""
    rng = np.random.default_rng(seed)
    variance, returns = 1.0, []
    for shock in rng.normal(size=n):
        returns.append(np.sqrt(variance) * shock)
        variance = 0.03 + (0.03 + 0.1 * (returns[-1] < 0)) * returns[-1] ** 2 + 0.9 * variance
    return 100 * np.exp(np.cumsum(returns) / 100)


def test_garch_is_what_arch_filters_and_foresees():
    from arch import arch_model

    close = closes()
    sds = baselines.garch_sd(close, n_train=len(close), horizon=5)
    percent = 100 * np.diff(np.log(close))
    model = arch_model(percent, mean="Constant", vol="GARCH", p=1, o=1, q=1, rescale=False)
    result = model.fit(disp="off", show_warning=False)
    ahead = result.forecast(horizon=5, start=len(percent) - 1).variance.to_numpy()[-1].sum()
    # the two filters begin with other variances, which 1,500 days forget
    assert sds[-1] == pytest.approx(np.sqrt(ahead) / 100, rel=1e-6)
    day_ahead = baselines.garch_sd(close, n_train=len(close), horizon=1)[500:-1]
    np.testing.assert_allclose(day_ahead, result.conditional_volatility[500:] / 100, rtol=1e-6)


def test_garch_knows_nothing_of_later_days():
    close = closes()
    later = np.concatenate([close[:1200], close[1199] * np.exp(np.linspace(0.1, 2, 300))])
    before, after = (baselines.garch_sd(each, n_train=1000, horizon=3) for each in (close, later))
    np.testing.assert_array_equal(before[:1200], after[:1200])
    assert not np.array_equal(before, after)


def test_too_little_history_gives_nothing():
    assert np.isnan(baselines.garch_sd(closes(200), n_train=150, horizon=1)).all()
    assert np.isnan(baselines.garch_sd(np.full(1000, 7.0), n_train=900, horizon=1)).all()
