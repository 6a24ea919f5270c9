"""Metrics of predicted probabilities and of predicted values; NumPy in, plain numbers out.

The ranking metrics are written out rather than taken from scikit-learn: every command imports this module, and
importing scikit-learn takes seconds. Tests compare them with scikit-learn's.
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
"""Metrics that a study may optimise, and whether lower is better."""

RANKINGS = ("auc", "average_precision")
"""Metrics of the order of rows, which are no mean over rows. As a loss each is 1 − its value."""

SKILLS: dict[str, str] = {"log_loss": "skill", "brier": "brier_skill", "mse": "skill", "mae": "mae_skill"}
"""Loss → the key of its skill, 1 − loss / loss of the training prior."""

CALIBRATION_BINS = 10


def evaluate(predicts: Prediction, outputs: Floats, targets: Floats, *, prior: float) -> Metrics:
    """All metrics of a set of predictions.

    Args:
        outputs: (S,) logits of probabilities, or predicted values.
        targets: (S,) 0 or 1, or values.
        prior: mean training label, the forecast of a model without inputs. Skill is measured against it.

    Returns:
        Name → number; None where a metric is undefined (AUC with one class), never NaN.

    Raises:
        ValueError: no samples, different lengths, outputs or targets that are not finite, classes other than 0 and 1,
            or a base rate of 0 or 1 as the prior.
    """
    return _SCORINGS[predicts].evaluate(*_checked(predicts, outputs, targets), prior)


def per_asset(
    predicts: Prediction, outputs: Floats, targets: Floats, asset_ids: Ints, assets: Sequence[str], *, prior: float
) -> dict[str, Metrics]:
    """`evaluate` of each asset's own samples, against the one pooled prior; assets without samples are left out.

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
    """(S,) float64, whose mean is log_loss (nats) of probabilities, mse of values.

    Raises:
        ValueError: as `evaluate`, for outputs and targets.
    """
    return _SCORINGS[predicts].loss(*_checked(predicts, outputs, targets))


def ensemble(predicts: Prediction, outputs: Floats) -> Floats:
    """(S,) output of an ensemble: the logit of the members' mean probability, or their mean value.

    Args:
        outputs: (N, S) logits, or values.
    """
    return _SCORINGS[predicts].ensemble(np.asarray(outputs, np.float64))


def prior_output(predicts: Prediction, prior: float) -> np.float32:
    """The constant output of a model that knows the training prior alone; float32, as every model's output is.

    Raises:
        ValueError: a base rate that is not strictly between 0 and 1, or a mean that is not finite.
    """
    return _SCORINGS[predicts].prior_output(prior)


def better(metric: str, a: float | None, b: float | None) -> bool:
    """Whether a is strictly better than b; an undefined value is worse than any number."""
    if a is None or b is None:
        return a is not None
    return a < b if MINIMIZE[metric] else a > b


# --- probabilities ----------------------------------------------------------------------------------------------------


def _evaluate_probabilities(logits: Floats, targets: Floats, prior: float) -> Metrics:
    # The prior is scored as the constant output it is, rounding included: its own skill is exactly 0.
    constant = np.full(len(targets), _prior_logit(prior), np.float64)
    p, prior_p = sigmoid(logits), sigmoid(constant)
    log_loss = float(_log_loss(logits, targets).mean())
    prior_log_loss = float(_log_loss(constant, targets).mean())
    brier, prior_brier = float(np.square(p - targets).mean()), float(np.square(prior_p - targets).mean())
    is_positive, positives = targets > 0.5, int(targets.sum())
    return {
        "log_loss": log_loss,
        "skill": _skill(log_loss, prior_log_loss),
        "brier": brier,
        "brier_skill": _skill(brier, prior_brier),
        "auc": auc(logits, targets),
        "average_precision": average_precision(logits, targets),
        "calibration_error": calibration_error(logits, targets),
        **_confusion(logits >= 0, is_positive, "half"),
        **_confusion(logits >= constant, is_positive, "base_rate"),
        **_spread(p),
        "base_rate": positives / len(targets),
        "prior": float(prior),
        "prior_log_loss": prior_log_loss,
        "prior_brier": prior_brier,
        "positives": positives,
        "n": len(targets),
    }


def _log_loss(logits: Floats, targets: Floats) -> Floats:
    """ln(1 + e^(∓logit)), which needs no clipping of probabilities."""
    return np.logaddexp(0.0, (1 - 2 * targets) * logits)


def _logit_of_mean_probability(logits: Floats) -> Floats:
    # ln Σp − ln Σ(1 − p), each summed as logarithms: no probability is rounded to 0 or 1 on the way.
    return np.logaddexp.reduce(-np.logaddexp(0.0, -logits), axis=0) - np.logaddexp.reduce(
        -np.logaddexp(0.0, logits), axis=0
    )


def _prior_logit(prior: float) -> np.float32:
    if not 0 < prior < 1:
        raise ValueError(f"the training base rate must lie between 0 and 1, got {prior}: train on rows of both classes")
    return np.float32(np.log(prior) - np.log1p(-prior))


def _confusion(is_predicted: np.ndarray, is_positive: np.ndarray, threshold: str) -> Metrics:
    tp, fp = int((is_predicted & is_positive).sum()), int((is_predicted & ~is_positive).sum())
    fn, tn = int((~is_predicted & is_positive).sum()), int((~is_predicted & ~is_positive).sum())
    return {
        f"precision_at_{threshold}": tp / (tp + fp) if tp + fp else None,
        f"recall_at_{threshold}": tp / (tp + fn) if tp + fn else None,
        f"tp_at_{threshold}": tp,
        f"fp_at_{threshold}": fp,
        f"fn_at_{threshold}": fn,
        f"tn_at_{threshold}": tn,
    }


def auc(scores: Floats, targets: Floats) -> float | None:
    """Area under the ROC curve: P(score of a positive > of a negative) + ½ P(equal); None where a class is missing.

    The Mann–Whitney statistic (Hanley & McNeil 1982), counted in whole numbers.
    """
    hits, misses = _hits_and_misses(scores, targets)
    if hits[-1] == 0 or misses[-1] == 0:
        return None
    # A hit at a score beats the misses below it and ties with those at it.
    twice_wins = np.sum(np.diff(misses, prepend=0) * (2 * hits - np.diff(hits, prepend=0)))
    return int(twice_wins) / (2 * int(hits[-1]) * int(misses[-1]))


def average_precision(scores: Floats, targets: Floats) -> float | None:
    """Σ (recall step) × precision over the distinct scores, highest first; None without positives."""
    hits, misses = _hits_and_misses(scores, targets)
    if hits[-1] == 0:
        return None
    return float(np.sum(np.diff(hits, prepend=0) / hits[-1] * hits / (hits + misses)))


def row_shares(metric: str, scores: Floats, targets: Floats) -> Floats | None:
    """(S,) whose mean is a ranking metric and whose resampled means have its error; None where it is undefined.

    A row's share is the metric plus n times what the metric moves by as the row's weight grows (its influence
    function): for the AUC the components of DeLong, DeLong & Clarke-Pearson 1988, for the average precision the
    derivative of E[y · precision] / E[y], through the hits and through the counts at every lower score.
    """
    value = auc(scores, targets) if metric == "auc" else average_precision(scores, targets)
    if value is None:
        return None
    hits, misses = _hits_and_misses(scores, targets)
    own_hits, positives, negatives, n = np.diff(hits, prepend=0), hits[-1], misses[-1], len(scores)
    is_positive, place = targets > 0.5, np.unique(-scores, return_inverse=True)[1]
    if metric == "auc":
        beaten = (negatives - misses + np.diff(misses, prepend=0) / 2) / negatives
        beaten_by = (hits - own_hits / 2) / positives
        influence = np.where(
            is_positive, (beaten[place] - value) * n / positives, (beaten_by[place] - value) * n / negatives
        )
    else:
        counts = hits + misses
        precision = hits / counts
        by_hits = np.cumsum((own_hits / counts)[::-1])[::-1]
        by_counts = np.cumsum((own_hits * precision / counts)[::-1])[::-1]
        influence = (is_positive * (precision - value + by_hits)[place] - by_counts[place]) * n / positives
    return value + influence


def _hits_and_misses(scores: Floats, targets: Floats) -> tuple[Ints, Ints]:
    """Per distinct score, highest first: the positives, and the negatives, with that score or more."""
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(targets[order] > 0.5)
    misses = np.arange(1, len(scores) + 1) - hits
    is_last_of_score = np.append(scores[order][1:] != scores[order][:-1], True)
    return hits[is_last_of_score], misses[is_last_of_score]


def calibration_error(logits: Floats, targets: Floats) -> float:
    """Expected calibration error: |share of positives − mean probability| per bin, weighted by the bin's size.

    Of a constant prediction it is |base rate − p|. Of calibrated predictions that differ it is not 0 but, by chance
    alone, about √(2 · bins · p(1 − p) / (π n)); on this bias see Roelofs et al. 2022.
    """
    gaps = np.bincount(equal_mass_bins(logits), weights=targets - sigmoid(logits), minlength=CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / len(logits))


def equal_mass_bins(logits: Floats, n_bins: int = CALIBRATION_BINS) -> Ints:
    """(S,) bin of each row, in bins of equal mass from low to high.

    Equal mass rather than equal width (Nguyen & O'Connor 2015): rare outcomes crowd into few equal-width bins. Rows
    with equal logits share a bin, the one of their mean rank: the order of rows doesn't matter.
    """
    _, place, counts = np.unique(logits, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - counts / 2
    return (middle * n_bins / len(logits)).astype(int)[place]


# --- values -----------------------------------------------------------------------------------------------------------


def _evaluate_values(predicted: Floats, targets: Floats, prior: float) -> Metrics:
    constant = float(_prior_value(prior))
    mse, prior_mse = float(np.square(predicted - targets).mean()), float(np.square(constant - targets).mean())
    mae, prior_mae = float(np.abs(predicted - targets).mean()), float(np.abs(constant - targets).mean())
    has_sign = (predicted != 0) & (targets != 0)
    same_sign = ((predicted > 0) == (targets > 0))[has_sign]
    return {
        "mse": mse,
        "skill": _skill(mse, prior_mse),
        "mae": mae,
        "mae_skill": _skill(mae, prior_mae),
        "correlation": correlation(predicted, targets),
        "sign_accuracy": float(same_sign.mean()) if has_sign.any() else None,
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
    """Pearson's; None where either is constant."""
    centred = []
    for values in (np.asarray(predicted, np.float64), np.asarray(targets, np.float64)):
        # Rounding leaves the SD of a constant at 1e-17 or so, not at 0: ask whether it varies beyond that.
        if np.ptp(values) <= 1e-12 * np.abs(values).max():
            return None
        deviations = values - values.mean()
        centred.append(deviations / np.abs(deviations).max())
    a, b = centred
    return float(np.clip(np.dot(a, b) / np.sqrt(np.dot(a, a) * np.dot(b, b)), -1, 1))


# --- shared -----------------------------------------------------------------------------------------------------------


def _checked(predicts: Prediction, outputs: Floats, targets: Floats) -> tuple[Floats, Floats]:
    outputs, targets = np.asarray(outputs, np.float64), np.asarray(targets, np.float64)
    if outputs.shape != targets.shape or outputs.ndim != 1 or len(outputs) == 0:
        raise ValueError(
            f"metrics need (S,) outputs and as many targets, S > 0; got shapes {outputs.shape} and {targets.shape}"
        )
    for name, values in (("outputs", outputs), ("targets", targets)):
        if bad := int((~np.isfinite(values)).sum()):
            raise ValueError(f"{name} must be finite; {bad} of {len(values)} are not")
    classes = _SCORINGS[predicts].classes
    if classes and not np.isin(targets, classes).all():
        raise ValueError(f"targets of probabilities must be 0 or 1, got {targets.min():g} … {targets.max():g}")
    return outputs, targets


def sigmoid(logits: Floats) -> Floats:
    """1 / (1 + e^(−logit)), float64, without overflow."""
    return np.exp(-np.logaddexp(0.0, -np.asarray(logits, np.float64)))


def _skill(loss: float, prior_loss: float) -> float | None:
    """None where the prior is never wrong, so that nothing could improve on it."""
    return 1 - loss / prior_loss if prior_loss > 0 else None


def _spread(predictions: Floats) -> Metrics:
    return {
        "prediction_min": float(predictions.min()),
        "prediction_max": float(predictions.max()),
        "prediction_mean": float(predictions.mean()),
        "prediction_spread": float(predictions.std()),
    }


@dataclass(frozen=True)
class _Scoring:
    """How one kind of prediction is scored."""

    evaluate: Callable[[Floats, Floats, float], Metrics]
    """(outputs, targets, prior) → metrics."""
    loss: Callable[[Floats, Floats], Floats]
    """(outputs, targets) → (S,)."""
    ensemble: Callable[[Floats], Floats]
    prior_output: Callable[[float], np.float32]
    classes: tuple[float, ...] = ()
    """The values that targets may have; empty: any."""


_SCORINGS: dict[Prediction, _Scoring] = {
    "probability": _Scoring(
        _evaluate_probabilities, _log_loss, _logit_of_mean_probability, _prior_logit, classes=(0.0, 1.0)
    ),
    "value": _Scoring(_evaluate_values, lambda y, t: np.square(y - t), lambda y: y.mean(axis=0), _prior_value),
}
