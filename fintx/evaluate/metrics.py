"""Metrics: all that fit what is predicted at once, a probability or a value; NumPy in, plain numbers out.

The ranking metrics are written out rather than taken from scikit-learn: every command imports this module, and that
import alone takes seconds. Tests hold them equal to scikit-learn's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fintx.tasks import Prediction
from fintx.types import Floats, Ints

Metrics = dict[str, float | int | None]
"""Name → number. An int is a count, which adds up over folds; None: undefined on these samples."""

MINIMIZE: dict[str, bool] = {
    "log_loss": True,
    "brier": True,
    "auc": False,
    "average_precision": False,
    "mse": True,
    "mae": True,
}
"""What a study may decide by, and whether less is better."""

RANKINGS = ("auc", "average_precision")
"""Metrics of an order of rows: no mean over rows. As a loss each is 1 − its value."""

SKILLS: dict[str, str] = {"log_loss": "skill", "brier": "brier_skill", "mse": "skill", "mae": "mae_skill"}
"""Loss → the key of its skill, 1 − loss / loss of the training prior."""

CALIBRATION_BINS = 10


def evaluate(predicts: Prediction, outputs: Floats, targets: Floats, *, prior: float) -> Metrics:
    """All metrics of a set of predictions.

    Args:
        outputs: (S,) logits of probabilities, or predicted values.
        targets: (S,) 0 or 1, or values.
        prior: mean training label: what a forecaster without inputs would say. Skill is measured against it.

    Returns:
        Name → number; None where a metric is undefined (AUC with one class), never NaN.

    Raises:
        ValueError: no samples, different lengths, outputs or targets that are not finite, classes other than 0 and 1,
            or a base rate of 0 or 1 as the prior.
    """
    return _SCORES[predicts].evaluate(*_checked(predicts, outputs, targets), prior)


def per_asset(
    predicts: Prediction, outputs: Floats, targets: Floats, asset_ids: Ints, assets: Sequence[str], *, prior: float
) -> dict[str, Metrics]:
    """`evaluate` of each asset's own samples, against the one pooled prior; assets without any are left out.

    Args:
        asset_ids: (S,) index into assets.
    """
    masks = {asset: asset_ids == i for i, asset in enumerate(assets)}
    return {
        asset: evaluate(predicts, outputs[mask], targets[mask], prior=prior)
        for asset, mask in masks.items()
        if mask.any()
    }


def per_sample_loss(predicts: Prediction, outputs: Floats, targets: Floats) -> Floats:
    """(S,) float64, whose mean is log_loss, or mse of values.

    Log loss in nats is ln(1 + e^(∓logit)), computed so for any logit and never clamped.

    Raises:
        ValueError: as `evaluate`, for outputs and targets.
    """
    return _SCORES[predicts].loss(*_checked(predicts, outputs, targets))


def ensemble(predicts: Prediction, outputs: Floats) -> Floats:
    """(S,) output of several models that speak as one: the logit of their mean probability, or their mean value.

    Args:
        outputs: (N, S) logits, or values.
    """
    return _SCORES[predicts].ensemble(np.asarray(outputs, np.float64))


def prior_output(predicts: Prediction, prior: float) -> np.float32:
    """What a model that knows the training prior alone puts out for every row; float32, as every model's output is.

    Raises:
        ValueError: a base rate that is not strictly between 0 and 1, or a mean that is not finite.
    """
    return _SCORES[predicts].prior_output(prior)


def better(metric: str, a: float | None, b: float | None) -> bool:
    """Is a strictly better than b? An undefined value is worse than any number."""
    if a is None or b is None:
        return a is not None
    return a < b if MINIMIZE[metric] else a > b


# --- probabilities ----------------------------------------------------------------------------------------------------


def _of_probabilities(logits: Floats, targets: Floats, prior: float) -> Metrics:
    # The prior is scored as the constant output it is, rounding included: its own skill is exactly 0.
    constant = np.full(len(targets), _prior_logit(prior), np.float64)
    p, prior_p = sigmoid(logits), sigmoid(constant)
    log_loss = float(_log_loss(logits, targets).mean())
    prior_log_loss = float(_log_loss(constant, targets).mean())
    brier, prior_brier = float(np.square(p - targets).mean()), float(np.square(prior_p - targets).mean())
    truth, n, positives = targets > 0.5, len(targets), int(targets.sum())
    return {
        "log_loss": log_loss,
        "skill": _skill(log_loss, prior_log_loss),
        "brier": brier,
        "brier_skill": _skill(brier, prior_brier),
        "auc": auc(logits, targets),
        "average_precision": average_precision(logits, targets),
        "calibration_error": calibration_error(logits, targets),
        **_decisions(logits >= 0, truth, "half"),
        **_decisions(logits >= constant, truth, "base_rate"),
        **_spread(p),
        "base_rate": positives / n,
        "prior": float(prior),
        "prior_log_loss": prior_log_loss,
        "prior_brier": prior_brier,
        "positives": positives,
        "n": n,
    }


def _log_loss(logits: Floats, targets: Floats) -> Floats:
    return np.logaddexp(0.0, (1 - 2 * targets) * logits)


def _mean_probability(logits: Floats) -> Floats:
    # ln Σp − ln Σ(1 − p), each summed as logarithms: no probability is rounded to 0 or 1 on the way.
    return np.logaddexp.reduce(-np.logaddexp(0.0, -logits), axis=0) - np.logaddexp.reduce(
        -np.logaddexp(0.0, logits), axis=0
    )


def _prior_logit(prior: float) -> np.float32:
    if not 0 < prior < 1:
        raise ValueError(f"the training base rate must lie between 0 and 1, got {prior}: train on rows of both classes")
    return np.float32(np.log(prior) - np.log1p(-prior))


def _decisions(said: np.ndarray, truth: np.ndarray, at: str) -> Metrics:
    """Confusion counts, precision and recall of saying yes."""
    tp, fp = int((said & truth).sum()), int((said & ~truth).sum())
    fn, tn = int((~said & truth).sum()), int((~said & ~truth).sum())
    return {
        f"precision_at_{at}": tp / (tp + fp) if tp + fp else None,
        f"recall_at_{at}": tp / (tp + fn) if tp + fn else None,
        f"tp_at_{at}": tp,
        f"fp_at_{at}": fp,
        f"fn_at_{at}": fn,
        f"tn_at_{at}": tn,
    }


def auc(scores: Floats, targets: Floats) -> float | None:
    """Area under the ROC curve: P(score of a positive > of a negative) + ½ P(equal); none where a class is missing.

    The Mann–Whitney statistic (Hanley & McNeil 1982), counted in whole numbers.
    """
    ranked = _Ranking.of(scores, targets)
    if ranked.positives == 0 or ranked.positives == len(scores):
        return None
    # Hits at a score beat the misses below it and draw with its own.
    wins = np.sum(np.diff(ranked.misses, prepend=0) * (2 * ranked.hits - np.diff(ranked.hits, prepend=0)))
    return int(wins) / (2 * ranked.positives * (len(scores) - ranked.positives))


def average_precision(scores: Floats, targets: Floats) -> float | None:
    """Σ (recall step) × precision over the distinct scores, highest first; none without positives."""
    ranked = _Ranking.of(scores, targets)
    if ranked.positives == 0:
        return None
    recall_steps = np.diff(ranked.hits, prepend=0) / ranked.positives
    return float(np.sum(recall_steps * ranked.hits / (ranked.hits + ranked.misses)))


def row_shares(metric: str, scores: Floats, targets: Floats) -> Floats | None:
    """(S,) whose mean is a ranking metric and whose resampled means have its error; none where it is undefined.

    A row's share is the metric plus n times what the metric moves by as the row's weight grows (its influence
    function): for the AUC the components of DeLong, DeLong & Clarke-Pearson 1988, for the average precision the
    derivative of E[y · precision] / E[y], through the hits and through the counts at every lower score.
    """
    ranked, n = _Ranking.of(scores, targets), len(scores)
    value = auc(scores, targets) if metric == "auc" else average_precision(scores, targets)
    if value is None:
        return None
    is_hit, place = targets > 0.5, np.unique(-scores, return_inverse=True)[1]
    own_hits = np.diff(ranked.hits, prepend=0)
    if metric == "auc":
        negatives = n - ranked.positives
        beaten = (negatives - ranked.misses + np.diff(ranked.misses, prepend=0) / 2) / negatives
        beaten_by = (ranked.hits - own_hits / 2) / ranked.positives
        influence = np.where(
            is_hit, (beaten[place] - value) * n / ranked.positives, (beaten_by[place] - value) * n / negatives
        )
    else:
        counted = ranked.hits + ranked.misses
        precision = ranked.hits / counted
        by_hits = np.cumsum((own_hits / counted)[::-1])[::-1]
        by_counts = np.cumsum((own_hits * precision / counted)[::-1])[::-1]
        moved = is_hit * (precision - value + by_hits)[place] - by_counts[place]
        influence = moved * n / ranked.positives
    return value + influence


@dataclass(frozen=True, eq=False)
class _Ranking:
    """Per distinct score, highest first: positives and negatives that score it or more."""

    hits: Ints
    misses: Ints
    positives: int

    @staticmethod
    def of(scores: Floats, targets: Floats) -> _Ranking:
        order = np.argsort(-scores, kind="stable")
        hits = np.cumsum(targets[order] > 0.5)
        last_of_its_score = np.append(scores[order][1:] != scores[order][:-1], True)
        misses = np.arange(1, len(scores) + 1) - hits
        return _Ranking(hits[last_of_its_score], misses[last_of_its_score], int(hits[-1]))


def calibration_error(logits: Floats, targets: Floats) -> float:
    """Expected calibration error: |share of positives − mean probability| over 10 bins of equal mass, weighted by size.

    Equal mass rather than equal width (Nguyen & O'Connor 2015): rare outcomes crowd into few equal-width bins. Rows
    with equal logits share a bin, the one of their mean rank: the result does not depend on the order of rows, and of
    a constant prediction it is |base rate − p|. Of calibrated predictions that differ it is not 0 but, by chance alone,
    about √(2 · bins · p(1 − p) / (π n)); on this bias see Roelofs et al. 2022.
    """
    p, n = sigmoid(logits), len(logits)
    _, place, counts = np.unique(logits, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - counts / 2
    bins = (middle * CALIBRATION_BINS / n).astype(int)[place]
    gaps = np.bincount(bins, weights=targets - p, minlength=CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / n)


# --- values -----------------------------------------------------------------------------------------------------------


def _of_values(predicted: Floats, targets: Floats, prior: float) -> Metrics:
    constant = float(_prior_value(prior))
    mse, prior_mse = float(np.square(predicted - targets).mean()), float(np.square(constant - targets).mean())
    mae, prior_mae = float(np.abs(predicted - targets).mean()), float(np.abs(constant - targets).mean())
    return {
        "mse": mse,
        "skill": _skill(mse, prior_mse),
        "mae": mae,
        "mae_skill": _skill(mae, prior_mae),
        "correlation": correlation(predicted, targets),
        "sign_accuracy": _sign_accuracy(predicted, targets),
        **_spread(predicted),
        "target_spread": float(targets.std()),
        "prior": float(prior),
        "prior_mse": prior_mse,
        "prior_mae": prior_mae,
        "n": len(targets),
    }


def _prior_value(prior: float) -> np.float32:
    if not np.isfinite(prior):
        raise ValueError(f"the prior must be a finite mean training label, got {prior}")
    return np.float32(prior)


def correlation(predicted: Floats, targets: Floats) -> float | None:
    """Pearson's; none where either is constant."""
    centred = []
    for values in (np.asarray(predicted, np.float64), np.asarray(targets, np.float64)):
        # Rounding leaves the SD of a constant at 1e-17 or so, not at 0: ask whether it varies beyond that.
        if np.ptp(values) <= 1e-12 * np.abs(values).max():
            return None
        moved = values - values.mean()
        centred.append(moved / np.abs(moved).max())
    a, b = centred
    return float(np.clip(np.dot(a, b) / np.sqrt(np.dot(a, a) * np.dot(b, b)), -1, 1))


def _sign_accuracy(predicted: Floats, targets: Floats) -> float | None:
    """Share of right signs where both have one; none where there are no such rows."""
    signed = (predicted != 0) & (targets != 0)
    return float(((predicted > 0) == (targets > 0))[signed].mean()) if signed.any() else None


# --- shared -----------------------------------------------------------------------------------------------------------


def _checked(predicts: Prediction, outputs: Floats, targets: Floats) -> tuple[Floats, Floats]:
    outputs, targets = np.asarray(outputs, np.float64), np.asarray(targets, np.float64)
    if outputs.shape != targets.shape or outputs.ndim != 1 or len(outputs) == 0:
        raise ValueError(
            f"wanted (S,) outputs and as many targets, S > 0; got shapes {outputs.shape} and {targets.shape}"
        )
    for name, values in (("outputs", outputs), ("targets", targets)):
        if bad := int((~np.isfinite(values)).sum()):
            raise ValueError(f"{name} must be finite; {bad} of {len(values)} are not")
    if predicts == "probability" and not np.isin(targets, (0.0, 1.0)).all():
        raise ValueError(f"targets of probabilities must be 0 or 1, got {targets.min():g} … {targets.max():g}")
    return outputs, targets


def sigmoid(logits: Floats) -> Floats:
    """1 / (1 + e^(−logit)), float64, without overflow."""
    return np.exp(-np.logaddexp(0.0, -np.asarray(logits, np.float64)))


def _skill(loss: float, prior_loss: float) -> float | None:
    """None where the prior is never wrong, so that nothing could improve on it."""
    return 1 - loss / prior_loss if prior_loss > 0 else None


def _spread(predictions: Floats) -> Metrics:
    """Extent of probabilities, or of predicted values; spread is their SD."""
    return {
        "prediction_min": float(predictions.min()),
        "prediction_max": float(predictions.max()),
        "prediction_mean": float(predictions.mean()),
        "prediction_spread": float(predictions.std()),
    }


@dataclass(frozen=True)
class _Scores:
    """How one kind of prediction is scored."""

    evaluate: Callable[[Floats, Floats, float], Metrics]
    """(outputs, targets, prior) → metrics."""
    loss: Callable[[Floats, Floats], Floats]
    ensemble: Callable[[Floats], Floats]
    prior_output: Callable[[float], np.float32]


_SCORES: dict[Prediction, _Scores] = {
    "probability": _Scores(_of_probabilities, _log_loss, _mean_probability, _prior_logit),
    "value": _Scores(
        _of_values,
        lambda outputs, targets: np.square(outputs - targets),
        lambda outputs: outputs.mean(axis=0),
        _prior_value,
    ),
}
