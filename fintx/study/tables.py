"""What do a study's trials come to at a glance? Tables as JSON and CSV, written again from the records each time."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from fintx.study import records
from fintx.study.records import DamagedRecord, TrialRecord

_CSV_HEAD = (
    "study trial_number value value_se metric skill outcome source d_model n_layers n_heads d_ff param_count seed "
    "best_epoch epochs trace_s compile_s run_s wall_s device config_hash label_hash finished"
).split()


def flat(record: TrialRecord) -> dict[str, Any]:
    """A trial as one flat object: identity, shape, outcome, searched values, all metrics at the best step."""
    row: dict[str, Any] = {
        "trial_number": record.trial_number,
        "value": record.value,
        "value_se": record.value_se,
        "n_replicates": 1 + len(record.replicates),
        "metric": record.metric,
        **record.config.shape.model_dump(),
        "param_count": record.param_count,
        "outcome": record.outcome,
        "source": record.source,
        "note": record.note,
        "training": record.training,
        "seed": record.config.seed,
        "best_epoch": record.folds[0].best_epoch if len(record.folds) == 1 else None,
        "best_step": record.folds[0].best_step if len(record.folds) == 1 else None,
        "epochs": sum(fold.epochs for fold in record.folds),
        "n_folds": len(record.folds),
        "trace_s": round(record.trace_s, 3),
        "compile_s": round(record.compile_s, 3),
        "run_s": round(record.run_s, 3),
        "wall_s": round(record.wall_s, 3),
        "device": record.device,
        "config_hash": record.config_hash,
        "label_hash": record.folds[0].label_hash if record.folds else None,
        "finished": record.finished,
    }
    for section in ("model", "optim", "train"):
        row.update({f"{section}.{key}": value for key, value in getattr(record.config, section).model_dump().items()})
    row.update({key: value for key, value in record.best.items() if key not in row})
    return row


def write(study_folder: Path, found: list[TrialRecord], *, n_trials: int, metric: str, minimize: bool) -> None:
    """Rewrite <study>_all_trials.json and <study>_best.json from the records.

    Raises:
        FintxError: a file can't be written.
    """
    name = study_folder.name
    trials = [flat(record) for record in found]
    head = {"study": name, "metric": metric, "n_trials": n_trials, "finished": len(trials)}
    records.write_atomically(
        study_folder / f"{name}_all_trials.json", json.dumps({**head, "trials": trials}, indent=1) + "\n"
    )
    best = records.best_of(found, minimize=minimize)
    if best is not None:
        whole = {**head, **flat(best), "config": best.config.model_dump(mode="json")}
        records.write_atomically(study_folder / f"{name}_best.json", json.dumps(whole, indent=1) + "\n")


def write_csv(outputs: Path) -> list[DamagedRecord]:
    """Rewrite outputs/experiment_results.csv: a line per trial of every study, from their records alone.

    Returns:
        What is wrong with the studies that are left out: damage to one is no reason to stop another.

    Raises:
        FintxError: the file can't be written.
    """
    damaged = []
    text = io.StringIO()
    writer = csv.DictWriter(text, _CSV_HEAD, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for folder in records.study_folders(outputs):
        try:
            found = records.read_all(folder)
        except DamagedRecord as error:
            damaged.append(error)
            continue
        writer.writerows({**flat(record), "study": record.study} for record in found)
    records.write_atomically(outputs / "experiment_results.csv", text.getvalue())
    return damaged
