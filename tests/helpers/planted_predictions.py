"""Studies whose truth is known: predictions that are planted as a search, a confirmation and baselines leave them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from fintx.config.schema import config_hash
from fintx.evaluate import metrics
from fintx.study import records
from fintx.study.records import TrialRecord


@dataclass
class Planted:
    """A study's folder that is filled with what a test wants to be true."""

    folder: Path
    template: TrialRecord
    labels: np.ndarray
    dates: np.ndarray
    folds: np.ndarray
    predicts: str = "probability"

    def table(self, outputs: np.ndarray) -> pa.Table:
        """Predictions as a study keeps them."""
        n = len(self.labels)
        columns = (
            self.folds.astype(np.int32),
            self.dates,
            np.full(n, "SPX"),
            self.labels.astype(np.float32),
            outputs.astype(np.float32),
        )
        return pa.table([pa.array(column) for column in columns], names=list(records.PREDICTION_COLUMNS))

    def baselines(self, outputs: Mapping[str, np.ndarray]) -> None:
        """Write baselines.parquet."""
        tables = [
            self.table(each).append_column("baseline", pa.array([name] * len(self.labels)))
            for name, each in outputs.items()
        ]
        records.write_predictions(self.folder, pa.concat_tables(tables), name="baselines.parquet")

    def trial(self, number: int, outputs: np.ndarray) -> TrialRecord:
        """A trial of the search."""
        record = self._record(number, number, outputs)
        folder = records.trial_folder(self.folder, number)
        records.write_predictions(folder, self.table(outputs))
        records.append(self.folder, record)
        return record

    def rerun(self, number: int, seed: int, outputs: np.ndarray | None) -> TrialRecord:
        """A trial trained again; without outputs, one that diverged."""
        record = self._record(number, seed, outputs)
        folder = records.rerun_folder(self.folder, number, seed)
        if outputs is not None:
            records.write_predictions(folder, self.table(outputs))
        records.write_record(folder, record)
        return record

    def _record(self, number: int, seed: int, outputs: np.ndarray | None) -> TrialRecord:
        config = self.template.config.model_copy(update={"seed": seed})
        fold = self.template.folds[0]
        best = {} if outputs is None else self._scored(outputs)
        metric = "mse" if self.predicts == "value" else "log_loss"
        folds = tuple(
            fold.model_copy(update={"best": held, "outcome": "completed" if held else "diverged"})
            for held in (best.values() if best else ({},))
        )
        return self.template.model_copy(
            update={
                "trial_number": number,
                "config": config,
                "config_hash": config_hash(config),
                "folds": folds,
                "metric": metric,
                "value": records.mean_metrics([held.best for held in folds]).get(metric),
                "outcome": "completed" if best else "diverged",
            }
        )

    def _scored(self, outputs: np.ndarray) -> dict[int, dict]:
        return {
            int(fold): metrics.evaluate(
                self.predicts,
                outputs[self.folds == fold].astype(np.float32),
                self.labels[self.folds == fold],
                prior=0.5,
            )
            for fold in np.unique(self.folds)
        }
