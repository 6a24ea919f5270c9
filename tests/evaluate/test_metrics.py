"""Metrics equal closed forms, naive loops and scikit-learn, keep their symmetries, and say None where undefined."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st

from fintx.config.schema import METRICS
from fintx.evaluate import metrics

CLASSIFICATION, REGRESSION = "probability", "value"


def sample(seed: int, n: int, *, tied: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Informative float32 logits and labels, as a model gives them."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=n)
    labels = (rng.random(n) < 1 / (1 + np.exp(-logits + 0.8))).astype(np.float32)
    return (np.round(logits) if tied else logits).astype(np.float32), labels


@st.composite
def classified(draw, *, both_classes: bool = False):
    """A few logits, ties likely, and their labels."""
    n = draw(st.integers(2, 40))
    logits = draw(st.lists(st.integers(-40, 40).map(lambda k: k / 8), min_size=n, max_size=n))
    labels = draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=n, max_size=n))
    if both_classes:
        labels[:2] = [0.0, 1.0]
    return np.array(logits), np.array(labels)


# --- golden numbers ---------------------------------------------------------------------------------------------------


def test_four_predictions_by_hand():
    """p = .8, .6, .4, .2 (odds 4, 1.5, 2/3, 1/4), labels 1 0 1 0, prior .25: every number below is worked on paper."""
    logits = np.log([4, 1.5, 2 / 3, 0.25])
    scores = metrics.evaluate(CLASSIFICATION, logits, np.array([1.0, 0, 1, 0]), prior=0.25)
    log_loss = -(2 * math.log(0.8) + 2 * math.log(0.4)) / 4
    prior_log_loss = -(math.log(0.25) + math.log(0.75)) / 2
    assert scores["log_loss"] == pytest.approx(log_loss, abs=1e-12)
    assert scores["brier"] == pytest.approx((0.04 + 0.36 + 0.36 + 0.04) / 4, abs=1e-12)
    assert scores["auc"] == 3 / 4
    assert scores["average_precision"] == pytest.approx((1 + 2 / 3) / 2, abs=1e-12)
    assert scores["calibration_error"] == pytest.approx((0.2 + 0.6 + 0.6 + 0.2) / 4, abs=1e-12)
    # 1e-6: the prior is scored as the float32 logit that a model would put out
    assert scores["prior_log_loss"] == pytest.approx(prior_log_loss, abs=1e-6)
    assert scores["skill"] == pytest.approx(1 - log_loss / prior_log_loss, abs=1e-6)
    assert scores["brier_skill"] == pytest.approx(1 - 0.2 / ((0.75**2 + 0.25**2) / 2), abs=1e-6)
    counts = {at: [scores[f"{cell}_at_{at}"] for cell in ("tp", "fp", "fn", "tn")] for at in ("half", "base_rate")}
    assert counts == {"half": [1, 1, 1, 1], "base_rate": [2, 1, 0, 1]}
    assert (scores["precision_at_half"], scores["recall_at_half"]) == (0.5, 0.5)
    assert (scores["precision_at_base_rate"], scores["recall_at_base_rate"]) == (2 / 3, 1.0)
    assert scores["prediction_min"] == pytest.approx(0.2, abs=1e-12)
    assert scores["prediction_max"] == pytest.approx(0.8, abs=1e-12)
    assert scores["prediction_spread"] == pytest.approx(math.sqrt((0.09 + 0.01) / 2), abs=1e-12)
    assert (scores["n"], scores["positives"], scores["base_rate"], scores["prior"]) == (4, 2, 0.5, 0.25)


def test_three_returns_by_hand():
    scores = metrics.evaluate(REGRESSION, np.array([0.5, -0.5, 1.0]), np.array([1.0, -1.0, -1.0]), prior=0.0)
    assert scores["mse"] == pytest.approx((0.25 + 0.25 + 4) / 3, abs=1e-12)
    assert scores["mae"] == pytest.approx((0.5 + 0.5 + 2) / 3, abs=1e-12)
    assert scores["prior_mse"] == 1.0
    assert scores["skill"] == pytest.approx(-0.5, abs=1e-12)
    assert scores["mae_skill"] == pytest.approx(0.0, abs=1e-12)
    assert scores["correlation"] == pytest.approx(0.1889822365046136, abs=1e-12)  # (1/3) / √(28/9) = 1 / (2 √7)
    assert scores["sign_accuracy"] == 2 / 3
    assert scores["n"] == 3


@pytest.mark.parametrize("tied", [False, True], ids=["distinct scores", "tied scores"])
@pytest.mark.parametrize("n", [20, 421, 3000])
def test_metrics_equal_scikit_learns(n, tied):
    logits, labels = sample(n, n, tied=tied)
    scores = metrics.evaluate(CLASSIFICATION, logits, labels, prior=0.3)
    p = 1 / (1 + np.exp(-logits.astype(float)))
    truth, predicted = labels.astype(int), (p >= 0.3).astype(int)
    expected = {
        "log_loss": sklearn.metrics.log_loss(truth, p),
        "brier": sklearn.metrics.brier_score_loss(truth, p),
        "auc": sklearn.metrics.roc_auc_score(truth, p),
        "average_precision": sklearn.metrics.average_precision_score(truth, p),
        "precision_at_base_rate": sklearn.metrics.precision_score(truth, predicted),
        "recall_at_base_rate": sklearn.metrics.recall_score(truth, predicted),
    }
    assert {key: scores[key] for key in expected} == pytest.approx(expected, abs=1e-12)
    tn, fp, fn, tp = sklearn.metrics.confusion_matrix(truth, predicted).ravel()
    assert [scores[f"{cell}_at_base_rate"] for cell in ("tn", "fp", "fn", "tp")] == [tn, fp, fn, tp]


def test_calibration_error_equals_a_loop_over_tenths():
    logits, labels = sample(7, 500)
    p = 1 / (1 + np.exp(-logits.astype(float)))
    order = sorted(range(500), key=lambda i: p[i])
    tenths = [order[50 * b : 50 * (b + 1)] for b in range(10)]
    expected = sum(
        abs(sum(float(labels[i]) for i in tenth) / 50 - sum(p[i] for i in tenth) / 50) * 50 / 500 for tenth in tenths
    )
    assert metrics.calibration_error(logits, labels) == pytest.approx(expected, abs=1e-12)


def test_a_constant_predictions_calibration_error_is_its_distance_from_the_base_rate():
    labels = np.r_[np.ones(300), np.zeros(700)]  # in runs, as regimes are: bins of neighbours would see 0 and 1
    assert metrics.calibration_error(np.full(1000, math.log(3 / 7)), labels) == pytest.approx(0, abs=1e-12)
    assert metrics.calibration_error(np.zeros(1000), labels) == pytest.approx(0.2, abs=1e-12)


def test_equal_predictions_share_the_bin_of_their_mean_rank():
    """20 rows are 2 a bin: ranks 1 … 3 share one logit and bin 1, so rank 0 is alone in bin 0 and nothing cancels."""
    logits = 1e-9 * np.array([0, 1, 1, 1, *range(4, 20)])
    labels = np.array([1.0, 0, 0, 0, *[0, 1] * 8])
    assert metrics.calibration_error(logits, labels) == pytest.approx((0.5 + 1.5) / 20, abs=1e-7)


def test_calibration_error_of_calibrated_predictions_is_the_stated_chance_level():
    rng = np.random.default_rng(3)
    n, errors = 1000, []
    for _ in range(200):
        logits = rng.normal(scale=0.05, size=n)
        errors.append(metrics.calibration_error(logits, (rng.random(n) < 1 / (1 + np.exp(-logits))).astype(float)))
    # 5 %: the mean of 200 draws has a standard error of about 2 % here
    assert np.mean(errors) == pytest.approx(math.sqrt(2 * 10 * 0.25 / (math.pi * n)), rel=0.05)


def test_correlation_equals_numpys():
    rng = np.random.default_rng(5)
    predicted, returns = rng.normal(size=200) * 1e-3, rng.normal(size=200) * 1e-2
    expected = np.corrcoef(predicted, returns)[0, 1]
    assert metrics.correlation(predicted, returns) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("predicts, mean", [("probability", "log_loss"), ("value", "mse")])
def test_the_mean_of_per_sample_losses_is_the_loss(predicts, mean):
    outputs, labels = sample(9, 300)
    losses = metrics.per_sample_loss(predicts, outputs, labels)
    assert losses.shape == (300,) and losses.dtype == np.float64
    assert losses.mean() == metrics.evaluate(predicts, outputs, labels, prior=0.3)[mean]


# --- properties -------------------------------------------------------------------------------------------------------


@given(classified(both_classes=True))
def test_auc_equals_counting_pairs(drawn):
    logits, labels = drawn
    pairs = [(a, b) for a in logits[labels == 1] for b in logits[labels == 0]]
    assert metrics.auc(logits, labels) == pytest.approx(
        sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs), abs=1e-12
    )


@given(classified())
def test_average_precision_equals_a_loop_over_thresholds(drawn):
    logits, labels = drawn
    positives, expected, recall = labels.sum(), 0.0, 0.0
    for threshold in sorted(set(logits), reverse=True):
        predicted = logits >= threshold
        now = labels[predicted].sum() / max(positives, 1)
        expected, recall = expected + (now - recall) * labels[predicted].mean(), now
    value = metrics.average_precision(logits, labels)
    assert value is None if positives == 0 else value == pytest.approx(expected, abs=1e-12)


@given(classified(both_classes=True), st.sampled_from([np.exp, np.arctan, lambda z: 3 * z - 7, lambda z: z**3]))
def test_ranking_metrics_do_not_change_under_a_monotone_map(drawn, monotone):
    logits, labels = drawn
    assert metrics.auc(monotone(logits), labels) == metrics.auc(logits, labels)
    assert metrics.average_precision(monotone(logits), labels) == metrics.average_precision(logits, labels)


@given(classified(both_classes=True), st.floats(0.05, 0.95))
def test_flipping_labels_and_logits_mirrors_every_metric(drawn, prior):
    logits, labels = drawn
    scores = metrics.evaluate(CLASSIFICATION, logits, labels, prior=prior)
    mirror = metrics.evaluate(CLASSIFICATION, -logits, 1 - labels, prior=1 - prior)
    for key in ("log_loss", "brier", "auc", "prediction_spread", "prior_log_loss"):
        assert mirror[key] == pytest.approx(scores[key], rel=1e-6, abs=1e-12), key
    assert metrics.auc(-logits, labels) == pytest.approx(1 - scores["auc"], abs=1e-12)
    assert mirror["prediction_min"] == pytest.approx(1 - scores["prediction_max"], abs=1e-12)


@given(classified(), st.randoms(use_true_random=False))
def test_the_order_of_rows_does_not_matter(drawn, random):
    logits, labels = drawn
    order = list(range(len(logits)))
    random.shuffle(order)
    scores = metrics.evaluate(CLASSIFICATION, logits, labels, prior=0.4)
    shuffled = metrics.evaluate(CLASSIFICATION, logits[order], labels[order], prior=0.4)
    undefined = {key for key, value in scores.items() if value is None}
    assert {key for key, value in shuffled.items() if value is None} == undefined
    for key in scores.keys() - undefined:
        assert shuffled[key] == pytest.approx(scores[key], rel=1e-9, abs=1e-12), key


@given(classified(), st.floats(0.001, 0.999))
def test_the_prior_itself_has_exactly_no_skill(drawn, prior):
    labels = drawn[1]
    outputs = np.full(len(labels), metrics.prior_output(CLASSIFICATION, prior))
    scores = metrics.evaluate(CLASSIFICATION, outputs, labels, prior=prior)
    assert (scores["skill"], scores["brier_skill"]) == (0.0, 0.0)
    assert scores["tp_at_base_rate"] + scores["fp_at_base_rate"] == len(labels)  # ≥ the threshold: all are said yes


@given(st.lists(st.integers(-200, 200).map(lambda k: k / 1024), min_size=3, max_size=30), st.floats(-0.01, 0.01))
def test_the_mean_return_itself_has_exactly_no_skill(returns, prior):
    outputs = np.full(len(returns), metrics.prior_output(REGRESSION, prior))
    scores = metrics.evaluate(REGRESSION, outputs, np.array(returns), prior=prior)
    never_wrong = np.all(outputs == returns)
    assert (scores["skill"], scores["mae_skill"]) == ((None, None) if never_wrong else (0.0, 0.0))
    assert scores["correlation"] is None


@given(classified(), st.integers(1, 4))
def test_assets_make_up_the_pool(drawn, n_assets):
    logits, labels = drawn
    ids = np.arange(len(labels)) % n_assets
    assets = [f"A{i}" for i in range(n_assets)] + ["EMPTY"]
    pooled = metrics.evaluate(CLASSIFICATION, logits, labels, prior=0.3)
    by_asset = metrics.per_asset(CLASSIFICATION, logits, labels, ids, assets, prior=0.3)
    assert list(by_asset) == assets[: min(n_assets, len(labels))]
    for key in ("n", "positives", "tp_at_half", "fn_at_base_rate"):
        assert sum(held[key] for held in by_asset.values()) == pooled[key]
    for key in ("log_loss", "brier", "prior_log_loss"):
        mean = sum(held[key] * held["n"] for held in by_asset.values()) / pooled["n"]
        assert mean == pytest.approx(pooled[key], rel=1e-9, abs=1e-12)


# --- edges ------------------------------------------------------------------------------------------------------------


def test_extreme_logits_have_their_exact_loss():
    logits = np.array([1e4, -1e4, 1e4, -1e4, 0.0], np.float32)
    labels = np.array([1.0, 0, 0, 1, 1])
    losses = metrics.per_sample_loss(CLASSIFICATION, logits, labels)
    assert losses.tolist() == [0.0, 0.0, 1e4, 1e4, math.log(2)]
    scores = metrics.evaluate(CLASSIFICATION, logits, labels, prior=0.5)
    assert scores["log_loss"] == pytest.approx((2e4 + math.log(2)) / 5)
    assert (scores["prediction_min"], scores["prediction_max"]) == (0.0, 1.0)
    assert (scores["tp_at_half"], scores["fp_at_half"]) == (2, 1)  # a logit of 0 is p = .5, which is said yes


def test_a_small_loss_is_not_rounded_away():
    assert metrics.per_sample_loss(CLASSIFICATION, [40.0], [1.0])[0] == pytest.approx(math.exp(-40), rel=1e-12)


def test_logits_beyond_the_resolution_of_probabilities_still_rank():
    assert metrics.auc(np.array([60.0, 50.0, 40.0]), np.array([1.0, 1.0, 0.0])) == 1.0


@pytest.mark.parametrize(
    "label, undefined",
    [
        (0.0, {"auc", "average_precision", "recall_at_half", "recall_at_base_rate", "precision_at_half"}),
        (1.0, {"auc", "precision_at_half"}),
    ],
    ids=["no positives", "no negatives"],
)
@pytest.mark.parametrize("n", [1, 2, 25])
def test_one_class_leaves_some_metrics_undefined_and_none_nan(n, label, undefined):
    scores = metrics.evaluate(CLASSIFICATION, np.full(n, -0.5), np.full(n, label), prior=0.2)
    assert {key for key, value in scores.items() if value is None} == undefined
    assert all(math.isfinite(value) for value in scores.values() if value is not None)


@pytest.mark.parametrize(
    "predicted, returns, undefined",
    [
        ([0.1] * 9, [0.01, 0.02, -0.01] * 3, {"correlation"}),
        ([0.1, 0.2], [0.3, 0.3], {"correlation"}),
        ([0.0, 0.0], [0.1, -0.1], {"correlation", "sign_accuracy"}),
        ([0.5], [0.0], {"correlation", "sign_accuracy", "skill", "mae_skill"}),
    ],
    ids=["constant prediction", "constant target", "no signs", "prior never wrong"],
)
def test_undefined_regression_metrics_are_none(predicted, returns, undefined):
    scores = metrics.evaluate(REGRESSION, np.array(predicted), np.array(returns), prior=0.0)
    assert {key for key, value in scores.items() if value is None} == undefined


@pytest.mark.parametrize("predicts", ["probability", "value"])
def test_metrics_are_plain_numbers_that_survive_json(predicts):
    outputs, labels = sample(2, 60)
    scores = metrics.evaluate(predicts, outputs, labels, prior=0.25)
    assert {type(value) for value in scores.values()} <= {int, float}
    assert json.loads(json.dumps(scores, allow_nan=False)) == scores


@pytest.mark.parametrize(
    "predicts, outputs, targets, prior, words",
    [
        ("probability", [0.0, 1.0], [0.0, 1.0], 0.0, "base rate must lie between 0 and 1"),
        ("probability", [0.0, 1.0], [0.0, 1.0], 1.0, "base rate must lie between 0 and 1"),
        ("probability", [0.0, 1.0], [0.0, 1.0], math.nan, "base rate must lie between 0 and 1"),
        ("value", [0.0, 1.0], [0.0, 1.0], math.nan, "prior must be a finite"),
        ("probability", [0.0, math.nan], [0.0, 1.0], 0.5, "outputs must be finite; 1 of 2"),
        ("probability", [math.inf, -math.inf], [0.0, 1.0], 0.5, "outputs must be finite; 2 of 2"),
        ("value", [0.0, 0.0], [0.0, math.nan], 0.5, "targets must be finite"),
        ("probability", [0.0, 1.0], [0.0, 0.5], 0.5, "must be 0 or 1"),
        ("probability", [], [], 0.5, "S > 0"),
        ("probability", [0.0], [0.0, 1.0], 0.5, r"shapes \(1,\) and \(2,\)"),
        ("probability", [[0.0]], [[1.0]], 0.5, r"shapes \(1, 1\)"),
    ],
)
def test_what_can_not_be_scored_is_refused(predicts, outputs, targets, prior, words):
    with pytest.raises(ValueError, match=words):
        metrics.evaluate(predicts, np.array(outputs), np.array(targets), prior=prior)


def test_an_ensemble_speaks_by_its_mean_probability_however_sure_its_members_are():
    logits = np.array([[2.0, -700.0, 40.0], [-1.0, -710.0, -40.0]])
    combined = metrics.ensemble("probability", logits)
    assert metrics.sigmoid(combined[0]) == pytest.approx((metrics.sigmoid(2.0) + metrics.sigmoid(-1.0)) / 2)
    # Of the two small probabilities the larger counts; of two that are sure of opposite things, the mean is one half.
    assert combined[1] == pytest.approx(-700 - math.log(2), abs=1e-3) and combined[2] == pytest.approx(0, abs=1e-12)
    np.testing.assert_allclose(metrics.ensemble("probability", logits[:1]), logits[0], rtol=1e-12)
    np.testing.assert_array_equal(metrics.ensemble("value", logits), logits.mean(axis=0))


@given(st.integers(0, 2**31 - 1), st.integers(2, 5))
def test_an_ensembles_loss_is_never_above_its_members_mean(seed, n):
    """Jensen's inequality: the logarithm is concave."""
    rng = np.random.default_rng(seed)
    logits, labels = rng.normal(0, 3, (n, 20)), (rng.random(20) < 0.5).astype(float)
    members = np.mean([metrics.per_sample_loss("probability", each, labels) for each in logits], axis=0)
    together = metrics.per_sample_loss("probability", metrics.ensemble("probability", logits), labels)
    assert (together <= members + 1e-12).all()


@pytest.mark.parametrize(
    "metric, good, bad",
    [
        *((metric, 0.1, 0.2) for metric in ("log_loss", "brier", "mse", "mae")),
        *((metric, 0.7, 0.6) for metric in ("auc", "average_precision")),
    ],
)
def test_better_knows_the_direction_and_that_undefined_is_worst(metric, good, bad):
    assert metrics.better(metric, good, bad)
    assert not metrics.better(metric, bad, good)
    assert not metrics.better(metric, good, good)
    assert metrics.better(metric, bad, None)
    assert not metrics.better(metric, None, bad)
    assert not metrics.better(metric, None, None)


@pytest.mark.parametrize("predicts", ["probability", "value"])
def test_every_study_metric_of_a_prediction_is_computed_for_it(predicts):
    outputs, labels = sample(4, 50)
    scores = metrics.evaluate(predicts, outputs, labels, prior=0.3)
    assert {metric for metric in metrics.MINIMIZE if metric in scores} == set(METRICS[predicts])
    assert all(metrics.SKILLS[metric] in scores for metric in metrics.SKILLS if metric in scores)
