"""Is the best trial ahead of the best baseline, and by more than noise? Paired on the identical rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fintx.config.schema import StudySpec
from fintx.evaluate import metrics, significance
from fintx.evaluate.significance import Estimate
from fintx.study import predictions, records
from fintx.study.records import TrialRecord


@dataclass(frozen=True)
class Lead:
    """The best trial against the best baseline, by the study's metric and by mean loss per row."""

    baseline: str
    value: float
    """The baseline's metric."""
    loss: str
    """What of each row is compared: the study's metric where it is a mean over rows, else log_loss."""
    gain: Estimate
    """Mean loss saved per row; negative: the baseline is better. Days are resampled in blocks."""
    n: int
    """Rows."""


def best_baseline(baselines: dict[str, Any], metric: str) -> tuple[str, float] | None:
    """The one that must be beaten, and its score; none where no baseline has the metric.

    Args:
        baselines: as baselines.json holds them, by name.
    """
    scored = {name: held["metrics"].get(metric) for name, held in baselines.items()}
    rivals = {name: value for name, value in scored.items() if value is not None}
    if not rivals:
        return None
    sign = 1 if metrics.MINIMIZE[metric] else -1
    rival = min(rivals, key=lambda name: sign * rivals[name])
    return rival, rivals[rival]


def over_baselines(
    study_folder: Path, spec: StudySpec, best: TrialRecord, baselines: dict[str, Any]
) -> Lead | None:  # fmt: skip
    """Compare per-row losses from the kept predictions; none where no baseline has the metric.

    The best of many trials was chosen on these very rows: that luck is not in the interval (`study.confirmation`).

    Raises:
        FintxError: predictions that are missing, damaged or of other rows.
    """
    found = best_baseline(baselines, spec.study.metric)
    if found is None:
        return None
    rival, value = found
    rows = predictions.read_rows(study_folder, spec)
    mine = predictions.read_outputs(records.trial_folder(study_folder, best.trial_number), rows)
    saved = rows.series(rows.losses(rows.baselines[rival]) - rows.losses(mine))
    block = significance.block_length(saved, horizon=rows.horizon)
    gain = significance.estimate(saved, significance.resample(len(saved), block))
    return Lead(rival, value, rows.loss, gain, len(rows.labels))
