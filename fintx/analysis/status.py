"""How far is each study? Read from its folder alone, while it runs or long after."""

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
    """One line of `fintx status`, and what it says below of what is unfinished."""

    name: str
    finished: int
    n_trials: int
    holder: str | None
    """The process that runs it on this host; none: nobody."""
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
    """What its confirmation came to, in a few words; "–": there was none."""
    doubt: str | None
    """Why its best result is too good to be true; none: it is believable."""
    test_openings: int
    note: str
    """Why nothing is known of its unfinished trials, or of its best trial beside the baselines; empty: it is."""

    @property
    def running(self) -> bool:
        """Whether a process of this host runs it."""
        return self.holder is not None


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
    numbers = {record.trial_number for record in finished}
    held, unasked = _leases(study_folder, spec)
    leases = {lease.number: lease for lease in held if lease.number not in numbers}
    at_work = sum(lease.state == "running" and lease.step > 0 for lease in leases.values())
    to_go = max(spec.study.n_trials - len(finished), 0)
    best = records.best_of(finished, minimize=metrics.MINIMIZE[spec.study.metric])
    comparison, uncompared = (None, "") if best is None else _comparison(study_folder, spec, best)
    mean_s = sum(record.wall_s for record in finished) / len(finished) if finished else None
    return StudyStatus(
        name=spec.study.name,
        finished=len(finished),
        n_trials=spec.study.n_trials,
        holder=locks.holder_of(study_folder),
        failed=dict(Counter(record.outcome for record in finished if record.outcome not in records.SUCCESSES)),
        unfinished=tuple(leases[number] for number in sorted(leases)),
        metric=spec.study.metric,
        best=best,
        comparison=comparison,
        eta=None if mean_s is None else datetime.timedelta(seconds=round(mean_s * to_go / max(at_work, 1))),
        confirmation=_confirmation(study_folder, len(finished)),
        doubt=significance.leakage_warning(best.best) if best else None,
        test_openings=len(study_file.openings(study_folder)),
        note="; ".join(words for words in (unasked, uncompared) if words),
    )


def _comparison(study_folder: Path, spec: StudySpec, best: TrialRecord) -> tuple[BaselineComparison | None, str]:
    """The best trial against the best baseline, or why it can't be said: what the records say is there all the same."""
    here = records.trial_folder(study_folder, best.trial_number) / "predictions.parquet"
    if not here.is_file() or not (study_folder / "baselines.parquet").is_file():
        return None, ""
    try:
        return predictions.compare_trial(study_folder, spec, best), ""
    except FintxError as error:
        return None, str(error)


def _confirmation(study_folder: Path, finished: int) -> str:
    found = confirmation.read(study_folder)
    if found is None:
        return "–"
    if not found.complete:
        return f"{found.n_trained}/{found.n_members} trained"
    words = f"{len(found.confirmed)} of {len(found.candidates)}"
    return words if found.n_finished == finished else f"{words} (after {found.n_finished} trials)"


def _leases(study_folder: Path, spec: StudySpec) -> tuple[tuple[Lease, ...], str]:
    """What the storage says, or why it says nothing: what the records say is there all the same."""
    url = spec.execution.storage
    if "***" in url:
        return (), f"{url}: its password was not kept, so trials that are under way are not shown"
    try:
        return trial_table.read(study_folder, url=url), ""
    except FintxError as error:
        return (), f"{error}; until then trials that are under way are not shown"


_CSV_HEAD = (
    "study trial_number value value_se metric skill outcome source d_model n_layers n_heads d_ff param_count seed "
    "best_epoch epochs trace_s compile_s run_s wall_s device config_hash label_hash finished"
).split()


def trial_row(record: TrialRecord) -> dict[str, Any]:
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


def write_json(study_folder: Path, found: list[TrialRecord], *, n_trials: int, metric: str, minimize: bool) -> None:
    """Rewrite <study>_all_trials.json and <study>_best.json from the records.

    Raises:
        FintxError: a file can't be written.
    """
    name = study_folder.name
    trials = [trial_row(record) for record in found]
    head = {"study": name, "metric": metric, "n_trials": n_trials, "finished": len(trials)}
    records.write_atomically(
        study_folder / f"{name}_all_trials.json", json.dumps({**head, "trials": trials}, indent=1) + "\n"
    )
    best = records.best_of(found, minimize=minimize)
    if best is not None:
        whole = {**head, **trial_row(best), "config": best.config.model_dump(mode="json")}
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
    for folder in study_file.study_folders(outputs):
        try:
            found = records.read_all(folder)
        except DamagedRecord as error:
            damaged.append(error)
            continue
        writer.writerows({**trial_row(record), "study": record.study} for record in found)
    records.write_atomically(outputs / "experiment_results.csv", text.getvalue())
    return damaged
