"""Study status: how far each study is, read from its folder alone; and the tables of its trials as JSON and CSV."""

from __future__ import annotations

import csv
import datetime
import io
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fintx.analysis import confirmation, predictions
from fintx.analysis.predictions import BaselineComparison
from fintx.config.schema import StudySpec
from fintx.errors import FintxError
from fintx.evaluate import metrics, significance
from fintx.study import locks, records, study_file, trial_table
from fintx.study.records import DamagedRecord, TrialRecord
from fintx.study.trial_table import Lease


@dataclass(frozen=True)
class StudyStatus:
    """One line of `fintx status`, and the notes below it."""

    name: str
    finished: int
    n_trials: int
    running: bool
    """Whether a process of this host runs it."""
    failed: dict[str, int]
    """Outcome → count, for outcomes that are no success."""
    unfinished: tuple[Lease, ...]
    """Trials without a record: running, interrupted, or failed (their attempts crashed or hung); by number."""
    metric: str
    best: TrialRecord | None
    comparison: BaselineComparison | None
    """The best trial against the best baseline; none where their predictions are not here."""
    eta: datetime.timedelta | None
    """Mean wall time of the finished trials × trials to go, shared out among those that train now; none before the
    first."""
    confirmation: str
    """The result of its confirmation in a few words; "–": there was none."""
    doubt: str | None
    """Why its best result is too good to be true; none: it is believable."""
    test_openings: int
    note: str
    """Why its unfinished trials, or its best trial beside the baselines, can't be shown; empty: they are."""


def read(study_folder: Path) -> StudyStatus:
    """The status of the study in a folder.

    Raises:
        DamagedRecord: a file of the study can't be understood.
    """
    study = study_file.read_study(study_folder)
    if study is None:
        raise records.DamagedRecord(f"{study_folder}: holds no study (no study.json)")
    spec = study.spec
    finished = records.read_all(study_folder)
    leases, lease_note = _leases(study_folder, spec, {record.trial_number for record in finished})
    best = records.best_of(finished, minimize=metrics.MINIMIZE[spec.study.metric])
    comparison, comparison_note = (None, "") if best is None else _comparison(study_folder, spec, best)
    eta = None
    if finished:
        to_go = max(spec.study.n_trials - len(finished), 0)
        training = sum(lease.state == "running" and lease.step > 0 for lease in leases)
        mean_s = sum(record.wall_s for record in finished) / len(finished)
        eta = datetime.timedelta(seconds=round(mean_s * to_go / max(training, 1)))
    return StudyStatus(
        name=spec.study.name,
        finished=len(finished),
        n_trials=spec.study.n_trials,
        running=locks.holder_of(study_folder) is not None,
        failed=dict(Counter(record.outcome for record in finished if record.outcome not in records.SUCCESSES)),
        unfinished=leases,
        metric=spec.study.metric,
        best=best,
        comparison=comparison,
        eta=eta,
        confirmation=_confirmation(study_folder, len(finished)),
        doubt=significance.leakage_warning(best.best) if best else None,
        test_openings=len(study_file.openings(study_folder)),
        note="; ".join(filter(None, (lease_note, comparison_note))),
    )


def _leases(study_folder: Path, spec: StudySpec, finished: set[int]) -> tuple[tuple[Lease, ...], str]:
    """The leases of unfinished trials, by number; or why the storage can't be read."""
    url = spec.execution.storage
    if "***" in url:
        return (), f"{url}: its password was not kept, so trials that are under way are not shown"
    try:
        leases = [lease for lease in trial_table.read(study_folder, url=url) if lease.number not in finished]
    except FintxError as error:
        return (), f"{error}; until then trials that are under way are not shown"
    return tuple(sorted(leases, key=lambda lease: lease.number)), ""


def _comparison(study_folder: Path, spec: StudySpec, best: TrialRecord) -> tuple[BaselineComparison | None, str]:
    """The best trial against the best baseline, or why they can't be compared."""
    trial_predictions = records.trial_folder(study_folder, best.trial_number) / "predictions.parquet"
    if not trial_predictions.is_file() or not (study_folder / "baselines.parquet").is_file():
        return None, ""
    try:
        return predictions.compare_trial(study_folder, spec, best), ""
    except FintxError as error:
        return None, str(error)


def _confirmation(study_folder: Path, finished: int) -> str:
    result = confirmation.read(study_folder)
    if result is None:
        return "–"
    if not result.complete:
        return f"{result.n_trained}/{result.n_members} trained"
    later = "" if result.n_finished == finished else f" (after {result.n_finished} trials)"
    return f"{len(result.confirmed)} of {len(result.candidates)}{later}"


# --- tables -----------------------------------------------------------------------------------------------------------

_CSV_HEAD = (
    "study trial_number value value_se metric skill outcome source d_model n_layers n_heads d_ff param_count seed "
    "best_epoch epochs trace_s compile_s run_s wall_s device config_hash label_hash finished"
).split()


def trial_row(record: TrialRecord) -> dict[str, Any]:
    """A trial as one flat object: identity, shape, outcome, searched values, all metrics at the best step."""
    fold = record.folds[0] if len(record.folds) == 1 else None
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
        "best_epoch": fold.best_epoch if fold else None,
        "best_step": fold.best_step if fold else None,
        "epochs": sum(fold.epochs for fold in record.folds),
        "n_folds": len(record.folds),
        **{name: round(getattr(record, name), 3) for name in ("trace_s", "compile_s", "run_s", "wall_s")},
        "device": record.device,
        "config_hash": record.config_hash,
        "label_hash": record.folds[0].label_hash if record.folds else None,
        "finished": record.finished,
    }
    for section in ("model", "optim", "train"):
        row |= {f"{section}.{key}": value for key, value in getattr(record.config, section).model_dump().items()}
    return row | {key: value for key, value in record.best.items() if key not in row}


def write_json(study_folder: Path, finished: list[TrialRecord], *, n_trials: int, metric: str, minimize: bool) -> None:
    """Rewrite <study>_all_trials.json and <study>_best.json from the records.

    Raises:
        FintxError: a file can't be written.
    """
    name = study_folder.name
    tables: dict[str, dict[str, Any]] = {"all_trials": {"trials": [trial_row(record) for record in finished]}}
    if (best := records.best_of(finished, minimize=minimize)) is not None:
        tables["best"] = {**trial_row(best), "config": best.config.model_dump(mode="json")}
    head = {"study": name, "metric": metric, "n_trials": n_trials, "finished": len(finished)}
    for table, content in tables.items():
        text = json.dumps({**head, **content}, indent=1) + "\n"
        records.write_atomically(study_folder / f"{name}_{table}.json", text)


def write_csv(outputs: Path) -> list[DamagedRecord]:
    """Rewrite outputs/experiment_results.csv: a line per trial of every study, from their records alone.

    Returns:
        What is wrong with the studies that are left out: damage to one is no reason to stop another.

    Raises:
        FintxError: the file can't be written.
    """
    damaged, text = [], io.StringIO()
    writer = csv.DictWriter(text, _CSV_HEAD, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for folder in study_file.study_folders(outputs):
        try:
            writer.writerows([{**trial_row(record), "study": record.study} for record in records.read_all(folder)])
        except DamagedRecord as error:
            damaged.append(error)
    records.write_atomically(outputs / "experiment_results.csv", text.getvalue())
    return damaged
