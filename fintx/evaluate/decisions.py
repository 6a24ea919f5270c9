"""What does saying yes bring? Precision, recall and lift at every threshold, and a table of them at each decile."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fintx.evaluate import metrics
from fintx.evaluate.calibration import Share, wilson
from fintx.types import Floats

DECILES = tuple(k / 10 for k in range(1, 10))


@dataclass(frozen=True)
class ThresholdRow:
    """Saying yes where p ≥ threshold."""

    decile: float
    """Share of rows that lie below the threshold, .9: the tenth of the rows with the highest p says yes."""
    threshold: float
    """Probability."""
    predicted: int
    """Rows that say yes. More than their decile's share where many rows have the same p."""
    precision: Share
    """Share of them that came true."""
    recall: Share
    """Share of what came true that was said."""
    lift: float | None
    lift_low: float
    lift_high: float
    """Precision over the base rate of these rows, with the ends of precision's interval."""


@dataclass(frozen=True, eq=False)
class PrecisionRecall:
    """The precision–recall curve, a point per distinct output, from the surest yes to all rows."""

    threshold: Floats
    """(K,) probability."""
    predicted: Floats
    """(K,) rows that say yes."""
    recall: Floats
    precision: Floats
    """(K,)."""
    precision_low: Floats
    precision_high: Floats
    """(K,) Wilson."""
    base_rate: float
    """Precision of saying yes always; lift is precision over it."""
    average_precision: float | None

    @property
    def lift(self) -> Floats:
        """(K,) precision / base rate; NaN without positives."""
        return self.precision / self.base_rate if self.base_rate > 0 else np.full(len(self.precision), np.nan)


def threshold_table(
    logits: Floats, labels: Floats, *, deciles: tuple[float, ...] = DECILES, level: float = 0.95
) -> tuple[ThresholdRow, ...]:
    """Predicted positives, precision, recall and lift at each decile of the outputs.

    The thresholds come from the very rows: they describe, and are not known beforehand. Intervals are Wilson's, of
    independent rows: labels that overlap over h days make them too narrow by up to √h.

    Args:
        logits: (S,), S > 0.
        labels: (S,) 0 or 1.
    """
    ordered, positives = np.sort(logits), int(np.sum(labels > 0.5))
    base_rate = positives / len(labels)
    rows = []
    for decile in deciles:
        # The smallest output with at least that share of the rows below it; rounding of .3 · n must not skip one.
        cut = ordered[min(int(np.ceil(decile * len(ordered) - 1e-9)), len(ordered) - 1)]
        said = logits >= cut
        hits = int(np.sum(labels[said] > 0.5))
        precision = wilson(hits, int(said.sum()), level=level)
        rows.append(
            ThresholdRow(
                decile=decile,
                threshold=float(metrics.sigmoid(cut)),
                predicted=int(said.sum()),
                precision=precision,
                recall=wilson(hits, positives, level=level),
                lift=None if base_rate == 0 or precision.value is None else precision.value / base_rate,
                lift_low=precision.low / base_rate if base_rate else 0.0,
                lift_high=precision.high / base_rate if base_rate else float("inf"),
            )
        )
    return tuple(rows)


def precision_recall(logits: Floats, labels: Floats, *, level: float = 0.95) -> PrecisionRecall:
    """Precision and recall of saying yes at and above every distinct output; arguments as `threshold_table`."""
    order = np.argsort(-logits, kind="stable")
    scores, truth = logits[order], labels[order] > 0.5
    ends = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))
    predicted, hits = ends + 1, np.cumsum(truth)[ends]
    positives = int(truth.sum())
    shares = [wilson(int(k), int(n), level=level) for k, n in zip(hits, predicted, strict=True)]
    return PrecisionRecall(
        threshold=metrics.sigmoid(scores[ends]),
        predicted=predicted,
        recall=hits / positives if positives else np.full(len(ends), np.nan),
        precision=hits / predicted,
        precision_low=np.array([share.low for share in shares]),
        precision_high=np.array([share.high for share in shares]),
        base_rate=positives / len(labels),
        average_precision=metrics.average_precision(logits, labels),
    )
