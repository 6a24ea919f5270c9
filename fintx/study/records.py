"""Records: what is kept of a trial, and the layout of a study's folder. Every table is derived from records.

outputs/<study>/
  study.json                    the resolved sweep file, and a hash over its definition, which never changes
  journal.log                   the sampler's memory and the trials' leases, unless a database holds them (storage)
  baselines.json                what must be beaten, on the identical rows, written once
  trials/0007/record.json       a TrialRecord, written once, last of all: a folder without one is unfinished work
  trials/0007/predictions.parquet   one row per validation sample: fold, date, asset, label, output
  trials/0007/replicates.parquet    the same of its other seeds, with a column replicate; only where replicates > 1
  trials/0007/checkpoint/fold_0     the best step, for the best trials (train.checkpoint)
  trials/0007/run/              while it trains: its lock, its training states, and the log of each attempt
  trials/0007/attempts.jsonl    one line per attempt: who, where, from which step
  confirm/0007/seed_42/         a best trial trained again with a fresh seed (confirm): as a trial's folder
  confirmation.json             what came of it (confirmation)
  openings.jsonl                one line per opening of the sealed test part; test/ holds what each one said
  <study>_all_trials.json, <study>_best.json     derived
outputs/experiment_results.csv                   derived, a line per trial of every study
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from fintx import files
from fintx.config.schema import BudgetConfig, TrialConfig, config_hash
from fintx.data.datasets import Dataset
from fintx.errors import FintxError
from fintx.evaluate.metrics import Metrics
from fintx.types import Floats

Outcome = Literal["completed", "early_stopped", "diverged", "collapsed", "out_of_memory"]
SUCCESSES: tuple[Outcome, ...] = ("completed", "early_stopped")
PREDICTION_COLUMNS = ("fold", "date", "asset", "label", "output")


class DamagedRecord(FintxError):
    """A file of a study folder does not hold what fintx wrote."""


class RecordModel(BaseModel):
    """A value that is written to a study's folder as JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="null")


class FoldRecord(RecordModel):
    """One training run on one fold; a split without folds has exactly one."""

    outcome: Outcome
    best: Metrics
    """All validation metrics at the restored best step."""
    last: Metrics
    """The same at the last step."""
    per_asset: dict[str, Metrics]
    best_epoch: int
    best_step: int
    epochs: int
    steps: int
    curve: tuple[Metrics, ...]
    """One entry per epoch."""
    data_hash: str
    label_hash: str
    split_hash: str
    n_train: int
    n_validation: int
    trace_s: float = 0.0
    compile_s: float
    run_s: float = 0.0
    wall_s: float


class Replicate(RecordModel):
    """The same trial trained with another seed."""

    seed: int
    folds: tuple[FoldRecord, ...]

    @property
    def best(self) -> Metrics:
        """Every metric at the best step, over its folds."""
        return mean_metrics([fold.best for fold in self.folds])


class TrialRecord(RecordModel):
    """Everything known of one finished trial. Rebuilding its model from `config` gives `param_count` parameters.

    In a study with `replicates = k` the value, its standard error and `best` are over all k seeds. What belongs to one
    model is that of the first seed, `config.seed`: `folds`, predictions.parquet and the checkpoint. The first is no
    better and no worse than the others; taking the best of them would select noise.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, int]
    """The shape's numbers once more, for readers of the file: d_model, n_layers, n_heads, d_ff of an encoder."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> int: ...

    study: str
    trial_number: int
    config: TrialConfig
    config_hash: str
    budget: BudgetConfig
    source: Literal["sampler", "queue"]
    entry: str | None = None
    """Queue entry's identity, where source is queue."""
    note: str = ""
    training: str = ""
    """Where the values that a queue entry left open came from: "trial 7", "defaults", "sampler"."""
    origin: str = ""
    """Of a trial that a fork took over: the study and trial that it was trained in."""
    params: dict[str, bool | int | float | str]
    """What the sampler sees of the trial: its coordinates and searched values."""
    param_count: int
    seeds: dict[str, int]
    metric: str
    value: float | None
    """The metric at the restored best step, mean over folds and replicates; none unless the trial succeeded."""
    value_se: float | None = None
    """Standard error of the value by its seeds: their SD / √k. None with a single one."""
    outcome: Outcome
    detail: str = ""
    warnings: tuple[str, ...] = ()
    """What happened that a reader should know, such as a damaged training state that was set aside."""
    attempt: int = 1
    """The attempt that finished it; above 1 after an interruption or a crash."""
    host: str = ""
    micro_batch: int
    """Windows per gradient: below the batch size where gradients were accumulated to save memory."""
    remat: bool = False
    """Whether layers were computed again in the backward pass, to save memory."""
    layout: dict[str, int | bool] = {}
    """Devices that the trial was spread over: data, model and fsdp, as `train.sharding.Layout`; none: one device."""
    memory_bytes: int | None
    """Estimate from the compiled program; none where nothing was compiled."""
    folds: tuple[FoldRecord, ...]
    replicates: tuple[Replicate, ...] = ()
    """The other seeds, from the second on. If any seed fails in a fold, no further fold is trained."""
    libraries: dict[str, str]
    settings: dict[str, str] = {}
    """What can change speed and last digits: environment variables of its process, such as XLA_FLAGS, and the
    compiler's options."""
    device: str
    git_commit: str | None
    started: str
    finished: str
    trace_s: float = 0.0
    """Tracing and lowering, in Python; in older records part of compile_s."""
    compile_s: float
    """Compiling by XLA, or reading from the program cache."""
    n_compiled: int | None = None
    """Programs that XLA compiled: 0 where an earlier trial or the program cache had all. None: an older record."""
    run_s: float = 0.0
    """Training and evaluating on the devices."""
    wall_s: float
    """The whole trial. Where trials were trained side by side, each figure is the trial's share."""
    wait_s: float | None = None
    """How long its device waited, from the end of the worker's last trial to this one's first step, its share; none
    for the worker's first trial."""

    @model_validator(mode="after")
    def _consistent(self) -> TrialRecord:
        numbers, shape = self.__pydantic_extra__, self.config.shape.model_dump()
        if unknown := sorted(numbers.keys() - shape.keys()):
            raise ValueError(f"unknown keys: {', '.join(unknown)}")
        if numbers != shape:
            raise ValueError("the record's shape is not its config's shape")
        if self.config_hash != config_hash(self.config):
            raise ValueError("config_hash is not the hash of config")
        if not self.budget.low <= self.param_count <= self.budget.high:
            raise ValueError(
                f"{self.param_count:,} parameters are outside the budget {self.budget.low:,} … {self.budget.high:,}"
            )
        if (self.value is not None) != (self.outcome in SUCCESSES):
            raise ValueError(f"outcome {self.outcome} with value {self.value}")
        return self

    @property
    def best(self) -> Metrics:
        """Every metric at the best step, averaged over folds (counts are summed) and over replicates."""
        first = mean_metrics([fold.best for fold in self.folds])
        return mean_over_seeds([first, *(replicate.best for replicate in self.replicates)])


def mean_metrics(folds: list[Metrics]) -> Metrics:
    """Average each metric over folds; whole numbers (counts) are summed; none where any fold has none."""
    return {key: _combined([fold.get(key) for fold in folds], is_sum=True) for key in (folds[0] if folds else ())}


def mean_over_seeds(members: list[Metrics]) -> Metrics:
    """Average each metric over models scored on the same rows; what all agree on (counts) stays as it is."""
    return {
        key: _combined([member.get(key) for member in members], is_sum=False) for key in (members[0] if members else ())
    }


def _combined(values: list[float | int | None], *, is_sum: bool) -> float | int | None:
    if any(value is None for value in values):
        return None
    if is_sum and all(isinstance(value, int) for value in values):
        return sum(values)  # type: ignore[arg-type]
    if not is_sum and all(value == values[0] for value in values):
        return values[0]
    return float(np.mean(np.asarray(values, dtype=float)))


# --- folders ----------------------------------------------------------------------------------------------------------


def trial_folder(study_folder: Path, number: int) -> Path:
    """outputs/<study>/trials/0007."""
    return study_folder / "trials" / f"{number:04d}"


def rerun_folder(study_folder: Path, number: int, seed: int) -> Path:
    """outputs/<study>/confirm/0007/seed_42: trial 7, trained again with seed 42."""
    return study_folder / "confirm" / f"{number:04d}" / f"seed_{seed}"


# --- writing ----------------------------------------------------------------------------------------------------------


def write_atomically(path: Path, text: str, *, once: bool = False) -> None:
    """Write a whole text file or nothing, its folder too where there is none.

    Args:
        once: refuse to replace an existing file.

    Raises:
        FintxError: disk full, no permission, or `once` and the file exists.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(path, once=once) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except FileExistsError:
        raise FintxError(f"{path}: is written already; fintx never overwrites a record") from None
    except OSError as error:
        raise FintxError(f"{path}: can't be written: {error.strerror}; fix that and run the command again") from error


def append(study_folder: Path, record: TrialRecord) -> None:
    """Write a trial's record, once and for all.

    Raises:
        FintxError: the trial has a record already, or the file can't be written.
    """
    write_record(trial_folder(study_folder, record.trial_number), record)


def write_record(folder: Path, record: TrialRecord) -> None:
    """Write the record of a trial, or of one that was trained again, into its own folder, once and for all."""
    write_atomically(folder / "record.json", record.model_dump_json(indent=1), once=True)


def write_predictions(folder: Path, table: pa.Table, *, name: str = "predictions.parquet") -> None:
    """Write validation predictions, columns as in `PREDICTION_COLUMNS`; rewritten freely until the record exists.

    Raises:
        FintxError: the file can't be written.
    """
    path = folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with files.replacing(path) as temporary:
            pq.write_table(table, temporary, compression="zstd")
    except OSError as error:
        raise FintxError(f"{path}: can't be written: {error.strerror or error}; fix that and run again") from error


def prediction_table(dataset: Dataset, fold: int, outputs: Floats) -> pa.Table:
    """A model's predictions of a fold's validation samples, columns as in `PREDICTION_COLUMNS`."""
    rows = dataset.validation.rows
    columns = (
        np.full(len(rows), fold, np.int32),
        dataset.dates[rows].astype("datetime64[D]"),
        np.asarray(dataset.assets)[dataset.asset_ids[rows]],
        dataset.validation.labels.astype(np.float32),
        np.asarray(outputs, np.float32),
    )
    return pa.table([pa.array(column) for column in columns], names=list(PREDICTION_COLUMNS))


# --- reading ----------------------------------------------------------------------------------------------------------


def read_all(study_folder: Path) -> list[TrialRecord]:
    """All records of a study, by trial number.

    Raises:
        DamagedRecord: a record does not parse, naming its file.
    """
    return [read(path) for path in sorted((study_folder / "trials").glob("[0-9]*/record.json"))]


def read(path: Path) -> TrialRecord:
    """One record.json.

    Raises:
        DamagedRecord: it is missing, unreadable or not a record.
    """
    try:
        return TrialRecord.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DamagedRecord(f"{path}: can't be read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "file"
        raise DamagedRecord(f"{path}: is no trial record ({where}: {first['msg']}); restore it from a copy") from None


def ranked(records: list[TrialRecord], *, minimize: bool) -> list[TrialRecord]:
    """The successful trials, best first; of two equal ones the earlier."""
    scored = [(record.value, record) for record in records if record.value is not None]
    sign = 1 if minimize else -1
    return [record for _, record in sorted(scored, key=lambda pair: (sign * pair[0], pair[1].trial_number))]


def best_of(records: list[TrialRecord], *, minimize: bool) -> TrialRecord | None:
    """The best successful trial, or none."""
    return next(iter(ranked(records, minimize=minimize)), None)
