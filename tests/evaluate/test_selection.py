"""Where the truth is known, the verdict is it: at the stated level, over many simulated studies."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from fintx.evaluate import metrics, selection, significance
from fintx.evaluate.selection import Judgement

HORIZON, DAYS, REPS = 3, 400, 200


def overlapping(rng: np.random.Generator, n: int, columns: int = 1) -> np.ndarray:
    """(n, columns): standard normal, each the sum of HORIZON neighbours' shocks, as labels over a horizon are."""
    shocks = rng.standard_normal((n + HORIZON - 1, columns))
    return np.lib.stride_tricks.sliding_window_view(shocks, HORIZON, axis=0).sum(-1) / np.sqrt(HORIZON)


def study(
    rng: np.random.Generator, *, n_days: int = DAYS, strength: float, noise: tuple[float, ...], known: float = 0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Losses of candidates (K, N, D), of the baseline (D,) and of 10 other trials (D, M).

    Args:
        strength: of the signal that decides the label, beside noise of SD 1.
        noise: per candidate, SD of what each seed adds to the right logit; other trials have the first one's.
        known: share of the signal that the baseline knows.
    """
    signal, chance = overlapping(rng, n_days)[:, 0], overlapping(rng, n_days)[:, 0]
    labels = (strength * signal + chance > 0).astype(float)
    logit = 1.7 * strength * signal  # the logistic curve that is closest to the normal one

    def losses(outputs: np.ndarray) -> np.ndarray:
        return metrics.per_sample_loss("probability", outputs, labels)

    def trained(sd: float) -> np.ndarray:
        return losses(logit + sd * overlapping(rng, n_days)[:, 0])

    fresh = np.array([[trained(sd) for _ in range(3)] for sd in noise])
    others = np.array([trained(noise[0]) for _ in range(10)]).T
    return fresh, losses(known * logit), others


def judged(seed: int, **truth) -> Judgement:
    return selection.judge(*study(np.random.default_rng(seed), **truth), horizon=HORIZON, reps=REPS)


def counted(runs: int, **truth) -> Counter[str]:
    """Over many studies: in how many is every candidate indistinguishable, any confirmed, the first behind, …"""
    counts: Counter[str] = Counter()
    for seed in range(runs):
        verdicts = judged(seed, **truth).verdicts
        counts["all alike"] += all(each.indistinguishable for each in verdicts)
        counts["any confirmed"] += any(each.confirmed for each in verdicts)
        counts["baseline better"] += all(each.gain.negative for each in verdicts)
        counts["last told apart"] += not verdicts[-1].indistinguishable
    return counts


def test_a_verdict_says_who_is_best_and_who_is_like_it():
    judgement = judged(0, strength=1.0, noise=(0.1, 0.1, 3.0))
    assert [each.best for each in judgement.verdicts].count(True) == 1
    assert [each.indistinguishable for each in judgement.verdicts] == [True, True, False]
    words = sorted(each.words for each in judgement.verdicts[:2])
    assert words == ["best, confirmed", "indistinguishable from the best, confirmed"]
    assert judgement.verdicts[2].words == "not confirmed"
    behind = [each.behind for each in judgement.verdicts]
    assert behind.count(None) == 1 and behind[2].positive


def test_two_equal_seeds_of_two_equal_configs_are_equal():
    fresh, baseline, others = study(np.random.default_rng(1), strength=0.5, noise=(0.2,))
    judgement = selection.judge(np.concatenate([fresh, fresh]), baseline, others, horizon=HORIZON, reps=REPS)
    assert all(each.indistinguishable for each in judgement.verdicts)
    assert judgement.verdicts[1].behind == significance.Estimate(0, 0, 0, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "truth",
    [
        pytest.param({"strength": 0.5, "noise": (0.05, 0.05)}, id="much alike", marks=pytest.mark.long),
        pytest.param({"strength": 0.5, "noise": (1.0, 1.0)}, id="seeds differ much", marks=pytest.mark.long),
        pytest.param({"strength": 0.0, "noise": (0.3, 0.3, 0.3, 0.3)}, id="four without skill"),
    ],
)
def test_equal_models_are_indistinguishable_in_nine_of_ten_studies(truth):
    assert counted(200, **truth)["all alike"] >= 180


@pytest.mark.slow
def test_without_skill_nothing_is_confirmed():
    """A level of 5 %: of 200 studies more than 20 would be a fault (p < .002)."""
    assert counted(200, strength=0.0, noise=(0.02, 0.02))["any confirmed"] <= 20


@pytest.mark.slow
def test_a_baseline_that_is_truly_best_is_reported_so():
    counts = counted(50, strength=0.5, noise=(1.5, 1.5), known=1.0)
    assert counts["any confirmed"] == 0 and counts["baseline better"] >= 45


@pytest.mark.slow
def test_a_planted_signal_is_found_and_a_bad_model_is_told_apart():
    counts = counted(50, strength=0.7, noise=(0.1, 2.5))
    assert counts["any confirmed"] >= 45 and counts["last told apart"] >= 45


@pytest.mark.slow
def test_the_gains_interval_covers_the_planted_one_at_its_rate():
    """1,000 studies, three seeds each; the truth: one of a million days, .120 nats. Stated are 95 %, ± .7 %."""
    truth = {"strength": 0.8, "noise": (0.5,)}
    fresh, baseline, _ = study(np.random.default_rng(10**6), n_days=1_000_000, **truth)
    planted = float(baseline.mean() - fresh.mean())
    assert planted == pytest.approx(0.12, abs=0.002)
    covered = found_positive = 0
    resamples = significance.resample(DAYS, 6, reps=500)
    for seed in range(1000):
        fresh, baseline, _ = study(np.random.default_rng(seed), **truth)
        gain, seeds = baseline - fresh[0].mean(axis=0), baseline.mean() - fresh[0].mean(axis=1)
        estimate = significance.estimate(gain, resamples, seeds=seeds)
        covered += estimate.low <= planted <= estimate.high
        found_positive += estimate.positive
    assert 930 <= covered <= 970 and found_positive >= 900, (covered, found_positive)


def test_an_interval_of_overlapping_labels_covers_at_its_rate():
    """2,000 series at once; 95 % stated, and blocks of 6 days catch nearly all of three days' overlap."""
    series = overlapping(np.random.default_rng(0), DAYS, 2000)
    errors = significance.standard_errors(series, significance.resample(DAYS, 10))
    covered = np.mean(np.abs(series.mean(axis=0)) < 2.01 * errors)  # t with 49 degrees of freedom
    assert 0.92 <= covered <= 0.965
    naive = np.mean(np.abs(series.mean(axis=0)) < 1.96 * series.std(axis=0) / np.sqrt(DAYS))
    assert naive < 0.8


def test_labels_that_are_shuffled_leave_no_skill():
    """The probabilities of a good model against labels in another order, beside the base rate."""
    rng = np.random.default_rng(5)
    signal = overlapping(rng, 1000)[:, 0]
    labels = (signal + overlapping(rng, 1000)[:, 0] > 0).astype(float)
    resamples = significance.resample(1000, 6)
    p_values = {}
    for name, truth in (("as they are", labels), ("shuffled", rng.permutation(labels))):
        prior = np.full(1000, metrics.prior_output("probability", float(truth.mean())))
        models = np.column_stack(
            [metrics.per_sample_loss("probability", scale * 1.7 * signal, truth) for scale in (0.1, 0.5, 1.0)]
        )
        baseline = metrics.per_sample_loss("probability", prior, truth)
        p_values[name], _ = selection.superiority(baseline, models, resamples)
    assert p_values["as they are"] < 0.01 and p_values["shuffled"] > 0.2


def test_a_planted_leak_is_too_good_to_be_true():
    rng = np.random.default_rng(6)
    labels = (rng.random(1000) < 0.3).astype(float)
    leaked = metrics.evaluate("probability", 4 * labels - 2 + rng.standard_normal(1000), labels, prior=0.3)
    assert leaked["auc"] > 0.95 and "too good to be true" in significance.leakage_warning(leaked)
    honest = metrics.evaluate("probability", 2 * labels - 2 + rng.standard_normal(1000), labels, prior=0.3)
    assert 0.85 < honest["auc"] < 0.95 and significance.leakage_warning(honest) is None
