"""Splits: the days that train, validate and test across all assets, purged by the horizon; what a part can show."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fintx.config.schema import SplitConfig, TaskConfig
from fintx.errors import FintxError
from fintx.types import Floats, Ints


class BadSplit(FintxError):
    """The split does not fit the data."""


class TooFewSamples(FintxError):
    """A part is too small to show anything."""


@dataclass(frozen=True)
class Fold:
    """One train and one validation part, as bounds on dates; every bound called `before` is exclusive.

    A row belongs to a part if its date lies in the part's days and the last day its label looks at lies before the
    part's label bound. The purge follows: a label reaches h bars ahead, by its own asset's calendar.
    """

    train_first: np.datetime64
    train_labels_before: np.datetime64
    """First validation day, less the embargo."""
    validation_first: np.datetime64
    validation_before: np.datetime64
    validation_labels_before: np.datetime64
    """First test day, less the embargo; far in the future where nothing is sealed."""


@dataclass(frozen=True)
class Split:
    """The folds, oldest first, and where the sealed test part begins."""

    folds: tuple[Fold, ...]
    test_first: np.datetime64 | None


@dataclass(frozen=True)
class PartRow:
    """A line of the split table."""

    part: str
    """train, validation or test, with the fold where there are several."""
    first: str
    last: str
    n: int
    positives: int | None
    """None for regression, and for the sealed test part."""
    base_rate: float | None
    """Mean label; None where sealed."""
    n_effective: float
    se_log_loss: float | None
    se_auc: float | None


_NEVER = np.datetime64("9999-12-31")


def split_days(split: SplitConfig, *, horizon: int, dates: np.ndarray) -> Split:
    """Turn a split's description into bounds on dates.

    Args:
        horizon: h; only to refuse data that are shorter than it.
        dates: (D,) datetime64[D], the union of all assets' trading days, increasing.

    Raises:
        BadSplit: bounds outside the data, or a part without days.
    """
    if len(dates) <= horizon + 1:
        raise BadSplit(
            f"task.horizon = {horizon} needs more than {horizon + 1} trading days, the data have {len(dates)}; "
            "shorten the horizon or widen data.start/end"
        )
    edges, test = _edges(split, dates)
    sealed_from = _NEVER if test is None else _embargoed(dates, test, split.embargo)
    folds = []
    for first, after in itertools.pairwise(edges):
        if first >= after:
            raise BadSplit(f"split.n_folds = {split.n_folds}: a fold has no trading day; lower it")
        oldest = first - edges[0] if split.window == "rolling" else 0
        end = _NEVER if after == len(dates) else dates[after]
        folds.append(Fold(dates[oldest], _embargoed(dates, first, split.embargo), dates[first], end, sealed_from))
    return Split(tuple(folds), None if test is None else dates[test])


def _edges(split: SplitConfig, dates: np.ndarray) -> tuple[list[int], int | None]:
    """Where each validation part begins and the last one ends, and where the test part begins, in `dates`."""
    if split.kind == "fractions":
        assert split.train is not None and split.validation is not None
        first = round(split.train * len(dates))
        test = round((split.train + split.validation) * len(dates))
        if not 0 < first < test < len(dates):
            raise BadSplit(
                f"split.train = {split.train}, split.validation = {split.validation} leave a part of the "
                f"{len(dates)} trading days empty; change them or widen data.start/end"
            )
        return [first, test], test
    first = _index(split.validation_start, dates, "split.validation_start")
    sealed = None if split.test_start is None else _index(split.test_start, dates, "split.test_start")
    end = len(dates) if sealed is None else sealed
    if first >= end:
        raise BadSplit(f"no trading day lies in [{split.validation_start}, {split.test_start}); move them apart")
    n_folds = split.n_folds or 1  # a split by dates has one
    span = ((dates[-1] + 1 if sealed is None else dates[sealed]) - dates[first]).astype(int)
    starts = [dates[first] + np.timedelta64(round(span * k / n_folds), "D") for k in range(n_folds)]
    return [*(int(index) for index in np.searchsorted(dates, starts)), end], sealed


def _index(day: datetime.date | None, dates: np.ndarray, key: str) -> int:
    assert day is not None
    index = int(np.searchsorted(dates, np.datetime64(day)))
    if not 0 < index < len(dates):
        raise BadSplit(f"{key} = {day} lies outside the data's {dates[0]} … {dates[-1]}; choose a day within")
    return index


def _embargoed(dates: np.ndarray, index: int, embargo: int) -> np.datetime64:
    if index - embargo <= 0:
        raise BadSplit(f"split.embargo = {embargo} leaves no day before {dates[index]}; lower it")
    return dates[index - embargo]


# --- what a part can show ---------------------------------------------------------------------------------------------


def effective_n(rows: Ints, *, horizon: int) -> float:
    """Σ of the average uniqueness of labels that overlap in time (López de Prado 2018, section 4.4).

    A label of row r spans bars r + 1 … r + h; its uniqueness is the mean over its span of 1 / (labels there).

    Args:
        rows: (S,) bar indices of one asset. Assets' sums are added: what assets share between them is not counted.
    """
    if len(rows) == 0:
        return 0.0
    rows = np.sort(rows) - rows.min()
    edges = np.zeros(rows[-1] + horizon + 2)
    np.add.at(edges, rows + 1, 1)
    np.add.at(edges, rows + horizon + 1, -1)
    concurrent = np.maximum(np.cumsum(edges), 1)
    cumulative = np.concatenate([[0.0], np.cumsum(1 / concurrent)])
    return float(np.sum((cumulative[rows + horizon + 1] - cumulative[rows + 1]) / horizon))


def se_auc(base_rate: float, n: float, *, auc: float = 0.7) -> float | None:
    """Standard error of an AUC (Hanley & McNeil 1982, eq. 1–3); none where a class has less than one sample."""
    positives, negatives = n * base_rate, n * (1 - base_rate)
    if min(positives, negatives) < 1:
        return None
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = auc * (1 - auc) + (positives - 1) * (q1 - auc**2) + (negatives - 1) * (q2 - auc**2)
    return float(np.sqrt(variance / (positives * negatives)))


def se_log_loss(base_rate: float, n: float) -> float | None:
    """Standard error of the mean log loss of a useful forecaster, in nats.

    The forecaster is calibrated, with logits normal about the base rate's with SD 1 (AUC ≈ .75). The base rate itself
    won't do as a yardstick: its loss has no spread at all at one half. Var = E[p(1 − p) logit(p)²] + Var[H(p)], by
    Gauss–Hermite quadrature.
    """
    if n <= 0 or not 0 < base_rate < 1:
        return None
    nodes, weights = np.polynomial.hermite_e.hermegauss(41)
    weights = weights / weights.sum()
    logits = np.log(base_rate / (1 - base_rate)) + nodes
    p = 1 / (1 + np.exp(-logits))
    entropy = -p * np.log(p) - (1 - p) * np.log(1 - p)
    mean = np.sum(weights * entropy)
    variance = np.sum(weights * (p * (1 - p) * logits**2 + (entropy - mean) ** 2))
    return float(np.sqrt(variance / n))


def describe_part(
    part: str, task: TaskConfig, *, dates: np.ndarray, labels: Floats | None, bars: Sequence[Ints]
) -> PartRow:
    """A line of the split table.

    Args:
        labels: None for the sealed test part.
        bars: for each asset, the indices of the part's samples among its bars.
    """
    n_effective = sum(effective_n(own, horizon=task.horizon) for own in bars)
    base_rate = None if labels is None or len(labels) == 0 else float(np.mean(labels, dtype=np.float64))
    classes = labels is not None and task.predicts == "probability"
    class_rate = base_rate if classes else None
    return PartRow(
        part=part,
        first=str(dates.min()) if len(dates) else "–",
        last=str(dates.max()) if len(dates) else "–",
        n=len(dates),
        positives=int(np.sum(labels)) if classes else None,  # type: ignore[arg-type]
        base_rate=base_rate,
        n_effective=n_effective,
        se_log_loss=None if class_rate is None else se_log_loss(class_rate, n_effective),
        se_auc=None if class_rate is None else se_auc(class_rate, n_effective),
    )


def check_sizes(split: SplitConfig, task: TaskConfig, rows: tuple[PartRow, ...]) -> None:
    """Refuse parts that are too small: every train part, and the validation part (all folds' together).

    Raises:
        TooFewSamples: with the numbers and what to change.
    """
    validation = [row for row in rows if row.part.startswith("validation")]
    n, effective = sum(row.n for row in validation), sum(row.n_effective for row in validation)
    positives = None if task.predicts == "value" else sum(row.positives or 0 for row in validation)
    parts = [(row.part, row.n, row.positives) for row in rows if row.part.startswith("train")]
    complaints = []
    for part, n_samples, n_positives in [*parts, ("validation", n, positives)]:
        counts = {f"{n_samples} samples": n_samples}
        if n_positives is not None:
            classes = {"positives": n_positives, "negatives": n_samples - n_positives}
            counts = {f"{count} {name} among {n_samples} samples": count for name, count in classes.items()}
        complaints += [
            f"{part} has {words}, below split.min_positives = {split.min_positives}"
            for words, count in counts.items()
            if count < split.min_positives
        ]
    if effective < split.min_effective:
        complaints.append(
            f"validation has an effective sample size of {effective:.0f} ({n} labels that overlap over "
            f"{task.horizon} days), below split.min_effective = {split.min_effective}"
        )
    if complaints:
        advice = (
            "give the part more days (split.*), use more data, shorten task.horizon, or knowingly lower that minimum"
        )
        raise TooFewSamples(f"{'; '.join(complaints)}: {advice}")
