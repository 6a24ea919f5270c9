"""Is the best trial ahead of the best baseline, and by more than noise? Paired on the identical rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fintx.config import StudySpec
from fintx.evaluate import metrics
from fintx.study import records
from fintx.study.records import TrialRecord


@dataclass(frozen=True)
class Lead:
    """The best trial against the best baseline, by the study's metric and by mean loss per row."""

    baseline: str
    value: float
    """The baseline's metric."""
    gain: float
    """Mean loss saved per row (log loss in nats, or squared error); negative: the baseline is better."""
    se: float
    """Its standard error: SD of the paired differences over √(effective n), since labels overlap."""
    n: int


def over_baselines(
    study_folder: Path, spec: StudySpec, best: TrialRecord, baselines: dict[str, Any], *, n_effective: float
) -> Lead | None:
    """Compare per-row losses from the kept predictions; none where no baseline has the metric.

    Args:
        n_effective: of the validation rows, by average uniqueness. What else is alike between days (a calm year) it
            does not know, and the best of many trials was chosen on these very rows: the true error is larger.
    """
    metric = spec.study.metric
    scored = {name: held["metrics"].get(metric) for name, held in baselines.items()}
    rivals = {name: value for name, value in scored.items() if value is not None}
    if not rivals:
        return None
    sign = 1 if metrics.MINIMIZE[metric] else -1
    rival = min(rivals, key=lambda name: sign * rivals[name])
    mine = pq.read_table(records.trial_folder(study_folder, best.trial_number) / "predictions.parquet")
    theirs = pq.read_table(study_folder / "baselines.parquet")
    theirs = theirs.filter(pc.equal(theirs["baseline"], rival))
    for column in ("fold", "date", "asset", "label"):
        assert mine[column].equals(theirs[column]), "a baseline was scored on other rows"
    saved = _losses(spec, theirs) - _losses(spec, mine)
    se = float(saved.std() / np.sqrt(max(n_effective, 1)))
    return Lead(rival, rivals[rival], float(saved.mean()), se, len(saved))


def _losses(spec: StudySpec, table: Any) -> np.ndarray:
    return metrics.per_sample_loss(spec.task.kind, table["output"].to_numpy(), table["label"].to_numpy())
