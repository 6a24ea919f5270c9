"""Each statistic agrees with a closed form, a published table or another implementation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.signal import lfilter

from fintx.evaluate import metrics, selection, significance
from fintx.evaluate.significance import Estimate


def correlated_losses() -> np.ndarray:
    """(600, 6): moving averages of five days, a part that all share, and means from .6 to .66."""
    rng = np.random.default_rng(7)
    noise = rng.standard_normal((604, 6))
    own = np.lib.stride_tricks.sliding_window_view(noise, 5, axis=0).sum(-1) / np.sqrt(5)
    common = rng.standard_normal(600)
    return 0.6 + 0.1 * common[:, None] + 0.2 * own + np.array([0, 0, 0.01, 0.02, 0.05, 0.06])


# --- losses and days --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("predicts", "loss"), [("probability", "log_loss"), ("probability", "brier"), ("value", "mse"), ("value", "mae")]
)
def test_row_losses_average_to_the_metric_of_their_name(predicts, loss):
    rng = np.random.default_rng(0)
    outputs = rng.standard_normal(200)
    targets = rng.standard_normal(200) if predicts == "value" else (rng.random(200) < 0.4).astype(float)
    scored = metrics.evaluate(predicts, outputs, targets, prior=0.4)
    assert significance.row_losses(predicts, loss, outputs, targets).mean() == pytest.approx(scored[loss], rel=1e-12)


@pytest.mark.parametrize("metric", ["auc", "average_precision"])
def test_row_losses_of_a_ranking_average_to_one_less_the_metric_and_move_as_it_moves(metric):
    """Each row's share is n times the slope of the metric in the row's weight: seen by weighing a row ε more."""
    rng = np.random.default_rng(0)
    targets = (rng.random(150) < 0.4).astype(float)
    outputs = np.round(rng.standard_normal(150) + targets, 1)  # with ties
    losses = significance.row_losses("probability", metric, outputs, targets)
    assert len(np.unique(outputs)) < 60
    assert losses.mean() == pytest.approx(1 - getattr(metrics, metric)(outputs, targets), rel=1e-12)
    times = 4000  # whole copies of every row, and one row once more
    for row in rng.choice(150, 12, replace=False):
        more = weighted(metric, outputs, targets, np.where(np.arange(150) == row, times + 1, times))
        assert 1 - losses[row] - (1 - losses.mean()) == pytest.approx(
            150 * times * (more - (1 - losses.mean())), abs=1e-2
        )


def weighted(metric, outputs, targets, copies):
    """The metric of rows that stand there several times each, from its definition."""
    hit, miss = copies * targets, copies * (1 - targets)
    if metric == "auc":
        wins = (outputs[:, None] > outputs) + 0.5 * (outputs[:, None] == outputs)
        return hit @ wins @ miss / (hit.sum() * miss.sum())
    at_least = outputs >= outputs[:, None]
    return hit @ ((at_least @ hit) / np.maximum(at_least @ copies, 1)) / hit.sum()


@pytest.mark.parametrize("metric", ["auc", "average_precision"])
def test_a_difference_in_a_ranking_has_the_error_of_the_metric_on_resampled_days(metric):
    rng = np.random.default_rng(1)
    targets = (rng.random(600) < 0.4).astype(float)
    shared = rng.standard_normal(600) + targets
    models = [shared + sd * rng.standard_normal(600) for sd in (0.5, 1.5)]
    days = np.datetime64("2020-01-01") + np.arange(600)
    saved = significance.by_day(
        np.subtract(*(significance.row_losses("probability", metric, each, targets) for each in reversed(models))), days
    )
    resamples = significance.resample(600, 10, reps=400)
    counts = np.round(resamples.weights * 600).astype(int)
    again = [np.subtract(*(weighted(metric, each, targets, n) for each in models)) for n in counts]
    assert significance.estimate(saved, resamples).se == pytest.approx(np.std(again), rel=0.1)


def test_a_ranking_of_one_class_is_undefined():
    assert np.isnan(significance.row_losses("probability", "auc", np.arange(5.0), np.ones(5))).all()


def test_one_asset_is_its_own_series_and_the_order_of_rows_does_not_matter():
    losses = correlated_losses()
    dates = np.datetime64("2020-01-01") + np.arange(600)
    order = np.random.default_rng(0).permutation(600)
    np.testing.assert_allclose(significance.by_day(losses[order], dates[order]), losses, rtol=1e-12)


@given(st.integers(0, 2**31 - 1), st.booleans())
def test_the_mean_over_days_is_the_mean_over_rows(seed, some):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 60))
    dates = np.datetime64("2020-01-01") + rng.integers(0, 20, n)
    losses = rng.standard_normal((n, 3))
    chosen = rng.random(n) < 0.5 if some else np.ones(n, bool)
    chosen[0] = True
    series = significance.by_day(losses, dates, chosen=chosen)
    assert series.shape == (len(np.unique(dates)), 3)
    np.testing.assert_allclose(series.mean(axis=0), losses[chosen].mean(axis=0), atol=1e-12)


def test_a_mean_over_no_rows_is_refused():
    with pytest.raises(ValueError, match="no rows"):
        significance.by_day(np.ones(3), np.full(3, np.datetime64("2020-01-01")), chosen=np.zeros(3, bool))


def test_a_panels_error_is_that_of_its_days_not_of_its_rows():
    """Ten assets that always lose together are one."""
    rng = np.random.default_rng(3)
    alone = rng.standard_normal(400)
    dates = np.datetime64("2020-01-01") + np.arange(400)
    panel, days = np.repeat(alone, 10), np.repeat(dates, 10)
    resamples = significance.resample(400, 5)
    one = significance.estimate(significance.by_day(alone, dates), resamples)
    ten = significance.estimate(significance.by_day(panel, days), resamples)
    assert ten.se == pytest.approx(one.se, rel=1e-6)


def test_a_panel_that_grows_has_the_error_of_a_ratio():
    """Against the spread of the ratio itself, resampled row by row."""
    rng = np.random.default_rng(4)
    counts = np.repeat([1, 2, 8], 100)
    place = np.repeat(np.arange(300), counts)
    losses = 0.7 + 0.3 * rng.standard_normal(300)[place] + 0.1 * rng.standard_normal(len(place))
    dates = np.datetime64("2020-01-01") + place
    resamples = significance.resample(300, 5, reps=4000)
    sums = np.bincount(place, weights=losses)
    ratios = (resamples.weights @ sums) / (resamples.weights @ counts)
    estimate = significance.estimate(significance.by_day(losses, dates), resamples)
    assert estimate.mean == pytest.approx(losses.mean())
    assert estimate.se == pytest.approx(ratios.std(), rel=0.05)  # linear against exact, 300 days


# --- blocks -----------------------------------------------------------------------------------------------------------


def test_block_lengths_agree_with_pattons_program():
    """recombinator 0.0.6.1, a port of Patton's opt_block_length_REV_dec07: 9.07 11.96 11.91 12.01 7.95 11.25."""
    losses = correlated_losses()
    patton = [9.074, 11.962, 11.907, 12.010, 7.952, 11.253]
    # arch takes autocovariances over the whole sample, Patton over a common one: they differ by 3 % here.
    lengths = [significance.block_length(losses[:, i], horizon=1) for i in range(6)]
    assert lengths == [math.ceil(length) for length in (9.2, *patton[1:4], 8.2, patton[5])]
    assert significance.block_length(losses, horizon=1) == 12
    assert significance.block_length(losses, horizon=20) == 20


@pytest.mark.parametrize("n", [20, 21, 60, 500, 3000])
@pytest.mark.parametrize("kind", ["noise", "autoregressive", "walk", "alternating", "late"])
def test_lengths_are_those_of_arch(n, kind):
    from arch.bootstrap import optimal_block_length

    shocks = np.random.default_rng(n).standard_normal(n)
    series = {
        "noise": shocks,
        "autoregressive": lfilter([1], [1, -0.8], shocks),
        "walk": shocks.cumsum(),
        "alternating": lfilter([1], [1, 0.9], shocks),
        "late": np.where(np.arange(n) < n - 5, 0.0, shocks),
    }[kind]
    wanted = optimal_block_length(series)["stationary"].item()
    assert significance._best_length(series) == pytest.approx(wanted, rel=1e-9)


@given(st.lists(st.integers(-2, 2), min_size=20, max_size=60).filter(lambda column: len(set(column)) > 1))
def test_lengths_are_those_of_arch_where_sums_can_vanish(column):
    from arch.bootstrap import optimal_block_length

    series = np.array(column, np.float64)
    with np.errstate(all="ignore"):
        wanted = optimal_block_length(series)["stationary"].item()
    assert significance._best_length(series) == pytest.approx(wanted, rel=1e-6)


def test_a_block_is_never_shorter_than_a_week_or_the_horizon():
    rng = np.random.default_rng(0)
    assert significance.block_length(rng.standard_normal(500), horizon=1) == 5
    assert significance.block_length(np.ones(500), horizon=7) == 7
    assert significance.block_length(rng.standard_normal(8), horizon=1) == 5


def test_the_bootstraps_variance_is_the_closed_form():
    """Politis & Romano 1994, lemma 1: γ₀ + 2 Σ ((1 − i/n)(1 − p)ⁱ + (i/n)(1 − p)ⁿ⁻ⁱ) γᵢ is n times its variance."""
    series = correlated_losses()
    n, block = len(series), 12
    centred = series - series.mean(axis=0)
    p, wanted = 1 / block, np.square(centred).sum(axis=0) / n
    for i in range(1, n):
        kernel = (1 - i / n) * (1 - p) ** i + (i / n) * (1 - p) ** (n - i)
        wanted = wanted + 2 * kernel * (centred[:-i] * centred[i:]).sum(axis=0) / n
    resamples = significance.resample(n, block, reps=20_000)
    variances = significance.standard_errors(series, resamples) ** 2 * n
    np.testing.assert_allclose(variances, wanted, rtol=0.04)  # 20,000 draws: a variance to 1 %, six of them
    np.testing.assert_allclose(resamples.weights.sum(axis=1), 1, rtol=1e-5)


def test_an_estimate_adds_the_errors_of_days_and_of_seeds():
    series = correlated_losses()[:, 0]
    resamples = significance.resample(600, 12)
    days = significance.estimate(series, resamples)
    seeds = np.array([0.1, 0.6, 1.1])
    both = significance.estimate(series, resamples, seeds=seeds)
    assert both.se**2 == pytest.approx(days.se**2 + 0.25 / 3)
    # Nearly all of it is of three seeds: t with 2 degrees of freedom at 97.5 % is 4.30.
    assert (both.high - both.mean) / both.se == pytest.approx(4.30, rel=0.03)
    assert (days.high - days.mean) / days.se == pytest.approx(2.01, rel=0.01)  # 49 degrees
    assert significance.estimate(np.zeros(50), significance.resample(50, 5)) == Estimate(0, 0, 0, 0)


# --- superior predictive ability --------------------------------------------------------------------------------------


def hansen(benchmark: np.ndarray, models: np.ndarray, weights: np.ndarray) -> float:
    """The paper's consistent p-value, from its formulas: Hansen 2005, section 3."""
    gains = benchmark[:, None] - models
    n, mean = len(gains), gains.mean(axis=0)
    stars = weights @ gains
    omega = np.sqrt(n * np.square(stars - mean).mean(axis=0))
    statistic = max(0.0, float((np.sqrt(n) * mean / omega).max()))
    recentred = mean * (mean >= -np.sqrt(omega**2 / n * 2 * np.log(np.log(n))))
    simulated = np.maximum(0, (np.sqrt(n) * (stars - recentred) / omega).max(axis=1))
    return float((simulated > statistic).mean())


@pytest.mark.parametrize("edge", [0.0, 0.03, 0.05, 0.07])
def test_spa_agrees_with_the_papers_formulas(edge):
    losses = correlated_losses()
    losses -= losses.mean(axis=0)
    models = losses[:, 1:] * np.array([1, 1, 1, 1, 5])  # one is five times as noisy: studentising matters
    models += np.array([-edge, 0, 0.01, 0.03, -0.02])
    other_draws = significance.resample(600, 12, reps=5000, seed=11).weights
    p_value, better = selection.superiority(losses[:, 0], models, significance.resample(600, 12))
    assert p_value == pytest.approx(hansen(losses[:, 0], models, other_draws), abs=0.03)  # 2,000 draws each
    assert better == ((0,) if p_value < 0.05 else ())


def test_a_copy_of_the_benchmark_neither_wins_nor_breaks_the_test():
    losses = correlated_losses()
    resamples = significance.resample(600, 12)
    copy = np.column_stack([losses[:, 0], losses[:, 0] - 0.1 - 0.001 * losses[:, 1]])
    p_value, better = selection.superiority(losses[:, 0], copy, resamples)
    assert better == (1,) and p_value < 0.01
    assert selection.superiority(losses[:, 0], losses[:, :1], resamples) == (1.0, ())


# --- the model confidence set -----------------------------------------------------------------------------------------


def test_the_confidence_set_agrees_with_another_implementation():
    """model-confidence-set 0.1.3, 20,000 moving blocks of 10 days."""
    p_values = selection.confidence_set(correlated_losses(), block=10, reps=5000)
    other = [0.025, 0.786, 0.025, 1.0, 0.0016, 0.0]
    np.testing.assert_allclose(p_values, other, atol=0.02)  # its blocks don't vary in length
    assert (p_values > significance.LEVEL).tolist() == [False, True, False, True, False, False]


def test_equal_models_stand_or_fall_together():
    losses = correlated_losses()
    first, second, third, fourth = selection.confidence_set(losses[:, [0, 0, 5, 5]], block=10)
    assert first == second == 1 and third == fourth < significance.LEVEL
    assert selection.confidence_set(losses[:, [0, 0]], block=10).tolist() == [1.0, 1.0]
    assert selection.confidence_set(losses[:, :1], block=10).tolist() == [1.0]


# --- a search's luck --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_models", "n_blocks", "wanted"), [(7, 16, (0.7174048 + 0.9013986) / 2), (6, 10, 0.8452381)])
def test_overfitting_agrees_with_another_implementation(n_models, n_blocks, wanted):
    """purgedcv 0.1.11, of the same losses negated: the mean of its shares of logits < 0 and ≤ 0."""
    rng = np.random.default_rng(7)
    noise = 0.2 * rng.standard_normal((610, 7))
    losses = 0.6 + noise + np.array([0, 0, 0.01, 0.002, 0.004, 0.003, -0.004])
    probability = selection.overfitting_probability(losses[:, :n_models], n_blocks=n_blocks)
    assert probability == pytest.approx(wanted, abs=1e-6)


def test_a_choice_by_lot_is_overfitted_half_the_time():
    """Three models that take turns: whichever is chosen, the rest of the days knows nothing of it."""
    rng = np.random.default_rng(2)
    shares = [selection.overfitting_probability(rng.standard_normal((160, 3)), n_blocks=8) for _ in range(200)]
    # Of equal models the halves mirror each other, so that the better on one is the worse on the other.
    assert 0.5 < np.mean(shares) < 0.75


def test_a_search_over_one_truly_better_model_is_not_overfitted():
    losses = 0.6 + 0.2 * np.random.default_rng(0).standard_normal((640, 20))
    losses[:, 3] -= 0.2
    assert selection.overfitting_probability(losses) == 0


def test_the_luck_of_equal_trials_is_the_expected_maximum_of_their_noise():
    """Normal order statistics: the largest of 50 has mean 2.24907, of 2 .56419 (Harter 1961)."""
    losses = 0.6 + 0.2 * np.random.default_rng(1).standard_normal((1000, 50))
    resamples = significance.resample(1000, 5)
    wanted = 2.24907 * 0.2 / np.sqrt(1000)
    assert selection.luck_of_the_best(losses, resamples) == pytest.approx(wanted, rel=0.05)
    copies = np.repeat(losses[:, :2], 25, axis=1)  # fifty trials that are two
    two = 0.56419 * 0.2 / np.sqrt(1000)
    assert selection.luck_of_the_best(copies, resamples) == pytest.approx(two, rel=0.1)


# --- small ones -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scored", "expected"),
    [
        ({"auc": 0.97}, "AUC 0.970 is too good to be true"),
        ({"auc": 0.95}, None),
        ({"auc": None}, None),
        ({"correlation": 0.9}, "correlation 0.900 is too good"),
        ({"mse": 1e-9}, None),
    ],
)
def test_what_is_too_good_to_be_true_is_flagged_in_a_line(scored, expected):
    warning = significance.leakage_warning(scored)
    assert warning is None if expected is None else (warning.startswith(expected) and "\n" not in warning)


def test_terciles_hold_a_third_each_and_leave_out_what_is_unknown():
    values = np.append(np.random.default_rng(0).permutation(300).astype(float), [np.nan, np.nan])
    thirds = significance.tercile_indices(values)
    assert [int((thirds == i).sum()) for i in (-1, 0, 1, 2)] == [2, 100, 100, 100]
    assert (
        values[thirds == 0].max() < values[thirds == 1].min() <= values[thirds == 1].max() < values[thirds == 2].min()
    )
    assert (significance.tercile_indices(np.full(3, np.nan)) == -1).all()
