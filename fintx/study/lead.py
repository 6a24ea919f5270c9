"""The best baseline, and a trial against it: in the study's metric, on the same rows and folds, beyond noise or not.

Whoever names a baseline as the one to beat, or says who is ahead, asks here: status, the live view, the end of a sweep,
reports, comparisons of studies, scaling, confirmations and the test part.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fintx.config.schema import StudySpec
from fintx.evaluate import metrics, significance
from fintx.evaluate.significance import Estimate
from fintx.study import predictions
from fintx.study.predictions import Rows
from fintx.study.records import TrialRecord
from fintx.types import Floats

Standing = Literal["ahead", "can't be told apart", "behind"]


@dataclass(frozen=True)
class BaselineComparison:
    """A trial against the best baseline."""

    metric: str
    """The study's: values and difference are in it."""
    baseline: str
    baseline_value: float
    trial_value: float
    """Mean over the trial's seeds."""
    difference: Estimate
    """How much better the trial is; negative: the baseline is better. Days are resampled in blocks."""
    n_rows: int

    @property
    def standing(self) -> Standing:
        """Of the trial beside the baseline."""
        return standing(self.difference)


def standing(difference: Estimate) -> Standing:
    """The verdict in words: on which side of zero the whole interval lies, if on one."""
    return "ahead" if difference.positive else "behind" if difference.negative else "can't be told apart"


def best_baseline(rows: Rows, *, among: Iterable[str] | None = None) -> tuple[str, float] | None:
    """The baseline that is best in the study's metric on these rows, and its value; none where none has one.

    Args:
        among: names to choose from; none: all.
    """
    names = rows.baselines if among is None else among
    means = {name: float(rows.losses(rows.baselines[name]).mean()) for name in names}
    defined = {name: mean for name, mean in means.items() if mean == mean}  # NaN: one class alone in a fold
    if not defined:
        return None
    name = min(defined, key=lambda each: defined[each])
    return name, _value(rows.metric, defined[name])


def compare(rows: Rows, losses: Floats) -> BaselineComparison | None:
    """A trial against the best baseline; none where no baseline has the study's metric.

    The best of many trials was chosen on these very rows: that luck is not in the interval (`study.confirmation`).

    Args:
        losses: (S,) of the trial, as `predictions.trial_losses` reads them.
    """
    best = best_baseline(rows)
    if best is None:
        return None
    name, value = best
    saved = rows.series(rows.losses(rows.baselines[name]) - losses)
    block = significance.block_length(saved, horizon=rows.horizon)
    difference = significance.estimate(saved, significance.resample(len(saved), block))
    return BaselineComparison(
        metric=rows.metric,
        baseline=name,
        baseline_value=value,
        trial_value=_value(rows.metric, float(losses.mean())),
        difference=difference,
        n_rows=len(rows.labels),
    )


def of_trial(study_folder: Path, spec: StudySpec, trial: TrialRecord) -> BaselineComparison | None:
    """The same from the predictions kept in a study's folder.

    Raises:
        FintxError: predictions that are missing, damaged or of other rows.
    """
    rows = predictions.read_rows(study_folder, spec)
    return compare(rows, predictions.trial_losses(study_folder, trial.trial_number, rows))


def _value(metric: str, loss: float) -> float:
    return 1 - loss if metric in metrics.RANKINGS else loss
