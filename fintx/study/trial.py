"""How does one trial become a record? Fit every fold, keep predictions and checkpoints, and write the record last."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from fintx.config import StudySpec, TrialConfig, config_hash
from fintx.data import sources
from fintx.data.windows import Dataset
from fintx.evaluate import baselines, metrics
from fintx.study import environment, lock, programs, records
from fintx.study.records import FoldRecord, TrialRecord
from fintx.train import checkpoint, hosts, loop, resume
from fintx.types import FintxError, Floats


class Job(BaseModel):
    """One attempt at one trial: all that a worker is told of it, as JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    spec: StudySpec
    config: TrialConfig
    number: int
    attempt: int
    params: dict[str, bool | int | float | str]
    entry: str | None
    """The queue entry's identity; none: the sampler's own proposal."""
    note: str
    training: str
    study_folder: Path
    data_root: Path
    memory_limit: int | None
    """Bytes; none: what the device has."""
    member: int | None = None
    """Of a confirmation, which trains a trial again with another seed: its place there. None: the trial itself."""

    @property
    def source(self) -> Literal["queue", "sampler"]:
        """Who asked."""
        return "sampler" if self.entry is None else "queue"

    @property
    def key(self) -> int:
        """What tells it from the other jobs of its course."""
        return self.number if self.member is None else self.member

    @property
    def folder(self) -> Path:
        """The trial's, or the member's."""
        if self.member is None:
            return records.trial_folder(self.study_folder, self.number)
        return records.member_folder(self.study_folder, self.number, self.config.seed)


@dataclass(frozen=True)
class Hooks:
    """What a running trial tells, and asks."""

    on_epoch: Callable[[int, loop.Epoch], None]
    """Fold, and what is known after the epoch."""
    on_progress: Callable[[int, int], None]
    """Fold and step; at least every few seconds of training."""
    on_warning: Callable[[str], None]
    should_stop: Callable[[], bool]
    """Asked between segments of steps."""


def run(job: Job, folds: tuple[Dataset, ...], hooks: Hooks) -> TrialRecord | None:
    """Train a config on every fold, going on where an earlier attempt stopped, and write its record.

    Returns:
        The record, or none if asked to stop: then the training state is saved for the next attempt.

    Raises:
        Superseded: another attempt has taken the trial over; nothing has been written since.
        FintxError: the disk is full, or the study's metric is undefined on its rows.
    """
    where = job.folder
    with lock.seize(where / "run") as check:
        is_done = (where / "record.json").is_file()
        _gather_hosts(job, folds, is_done=is_done)
        if is_done:  # an earlier attempt that lost its coordinator came to the end
            return records.read(where / "record.json")
        started = environment.now()
        fits = _fit_folds(job, folds, hooks, check)
        if fits is None:
            return None
        record = _record(job, fits, folds, started=started)
        check()
        records.write_predictions(where, _predictions(fits, folds))
        if record.value is not None:
            for index, (fit, dataset) in enumerate(zip(fits, folds, strict=True)):
                assert fit.params is not None
                meta = _checkpoint_meta(record, dataset, fold=index)
                checkpoint.save(where / "checkpoint" / f"fold_{index}", fit.params, config=job.config, meta=meta)
        check()
        records.write_record(where, record)
        shutil.rmtree(where / "run", ignore_errors=True)
    return record


def follow(job: Job, folds: tuple[Dataset, ...]) -> None:
    """What the other processes of several hosts do meanwhile: the same training; nothing is told or written."""
    if _gather_hosts(job, folds, is_done=False):
        silent = Hooks(
            on_epoch=lambda fold, epoch: None,
            on_progress=lambda fold, step: None,
            on_warning=lambda text: None,
            should_stop=lambda: False,
        )
        _fit_folds(job, folds, silent, lambda: None)


def _gather_hosts(job: Job, folds: tuple[Dataset, ...], *, is_done: bool) -> bool:
    """Whether there is anything to train, once all hosts are known to see the same.

    Raises:
        FintxError: some don't see the study's folder, or read other data.
    """
    (done,) = hosts.agree(is_done)
    if not hosts.least(job.study_folder.is_dir()):
        raise FintxError(
            f"{job.study_folder}: not all hosts see it; give --outputs a folder on a file system they share"
        )
    data = int(
        hashlib.sha256("".join(fold.data_hash + fold.label_hash for fold in folds).encode()).hexdigest()[:15], 16
    )
    if hosts.least(data) != hosts.most(data):
        raise FintxError(f"{job.data_root}: the hosts read different data there; give --data-dir a folder they share")
    return not done


def _fit_folds(
    job: Job, folds: tuple[Dataset, ...], hooks: Hooks, check: Callable[[], None]
) -> list[loop.FitResult] | None:
    programs.keep(job.spec.execution.program_cache, outputs=job.study_folder.parent)
    fits: list[loop.FitResult] = []
    for index, dataset in enumerate(folds):
        hook = _FoldHooks(job, index, hooks, begun=not hosts.is_first())
        folder, every_s = job.folder / "run" / f"fold_{index}", job.spec.execution.checkpoint_s
        fit = loop.fit(
            job.config,
            dataset,
            metric=job.spec.study.metric,
            on_epoch=hook.on_epoch,
            on_progress=hook.on_progress,
            on_warning=hooks.on_warning,
            should_stop=hooks.should_stop,
            saves=resume.Saves(folder, every_s, check, at_end=index + 1 < len(folds)),
            memory_limit=job.memory_limit,
            mesh=job.spec.mesh,
        )
        if fit.outcome == "interrupted":
            return None
        fits.append(fit)
        if fit.outcome not in records.SUCCESSES:
            break
    return fits


@dataclass
class _FoldHooks:
    """One fold's calls, with its number; the first step is logged as the one that the attempt went on from."""

    job: Job
    fold: int
    hooks: Hooks
    begun: bool = False

    def on_epoch(self, epoch: loop.Epoch) -> None:
        self.hooks.on_epoch(self.fold, epoch)

    def on_progress(self, step: int) -> None:
        if not self.begun:
            self.begun = True
            line = {
                "attempt": self.job.attempt, "fold": self.fold, "from_step": step, "host": socket.gethostname(),
                "pid": os.getpid(), "at": environment.now(),
            }  # fmt: skip
            with (self.job.folder / "attempts.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        self.hooks.on_progress(self.fold, step)


def _record(job: Job, fits: list[loop.FitResult], folds: tuple[Dataset, ...], *, started: str) -> TrialRecord:
    spec, config = job.spec, job.config
    kept = tuple(_fold_record(spec, fit, fold) for fit, fold in zip(fits, folds, strict=False))
    outcome = kept[-1].outcome
    value = records.mean_metrics([fold.best for fold in kept]).get(spec.study.metric)
    estimates = [fit.memory_bytes for fit in fits if fit.memory_bytes is not None]
    return TrialRecord(
        study=spec.study.name,
        trial_number=job.number,
        config=config,
        config_hash=config_hash(config),
        budget=spec.budget,
        source=job.source,
        entry=job.entry,
        note=job.note,
        training=job.training,
        params=job.params,
        **config.shape.model_dump(),
        param_count=fits[0].param_count,
        seeds={"study": spec.study.seed, "trial": config.seed},
        metric=spec.study.metric,
        value=value if outcome in records.SUCCESSES else None,
        outcome=outcome,
        detail=fits[-1].detail,
        warnings=tuple(warning for fit in fits for warning in fit.warnings),
        attempt=job.attempt,
        host=socket.gethostname(),
        micro_batch=fits[-1].micro_batch,
        remat=fits[-1].arrangement.remat,
        layout=dataclasses.asdict(fits[-1].arrangement.layout),
        memory_bytes=max(estimates, default=None),
        folds=kept,
        libraries=environment.libraries(),
        device=environment.device(),
        git_commit=environment.git_commit(),
        started=started,
        finished=environment.now(),
        compile_s=sum(fit.compile_s for fit in fits),
        wall_s=sum(fit.wall_s for fit in fits),
    )


def _fold_record(spec: StudySpec, fit: loop.FitResult, dataset: Dataset) -> FoldRecord:
    assert fit.outcome != "interrupted"
    part = dataset.validation
    per_asset: dict[str, dict[str, Any]] = {}
    if fit.outputs is not None and np.isfinite(fit.outputs).all():
        ids = dataset.asset_ids[part.rows]
        prior = train_prior(dataset)
        per_asset = metrics.per_asset(spec.task.kind, fit.outputs, part.labels, ids, dataset.assets, prior=prior)
    return FoldRecord(
        outcome=fit.outcome,
        best=fit.best,
        last=fit.last,
        per_asset=per_asset,
        best_epoch=fit.best_epoch,
        best_step=fit.best_step,
        epochs=fit.epochs,
        steps=fit.steps,
        curve=tuple(fit.curve),
        data_hash=dataset.data_hash,
        label_hash=dataset.label_hash,
        split_hash=dataset.split_hash,
        n_train=len(dataset.train.rows),
        n_validation=len(part.rows),
        compile_s=fit.compile_s,
        wall_s=fit.wall_s,
    )


def _checkpoint_meta(record: TrialRecord, dataset: Dataset, *, fold: int) -> dict[str, Any]:
    """What a checkpoint holds beside weights and config, so that its path alone is enough to evaluate it."""
    return {
        "study": record.study,
        "trial_number": record.trial_number,
        "fold": fold,
        "metric": record.metric,
        "best": record.folds[fold].best,
        "feature_names": list(dataset.feature_names),
        "param_count": record.param_count,
        "prior": train_prior(dataset),
        "scaling": dataset.scaling.to_json(),
        "data_hash": dataset.data_hash,
        "label_hash": dataset.label_hash,
        "split_hash": dataset.split_hash,
        "libraries": record.libraries,
        "layout": record.layout,
    }


def drop_checkpoint(study_folder: Path, number: int) -> None:
    """A trial that is no longer among the best keeps its record alone."""
    shutil.rmtree(records.trial_folder(study_folder, number) / "checkpoint", ignore_errors=True)


def train_prior(dataset: Dataset) -> float:
    """Mean training label: the base rate, or the mean log return."""
    return float(np.mean(dataset.train.labels, dtype=np.float64))


def ensure_baselines(
    folder: Path, folds: tuple[Dataset, ...], spec: StudySpec, data_root: Path, *, tell: Callable[[str], None]
) -> dict[str, Any]:
    """What must be beaten on the very same rows: fitted once per data, label and split, whatever study asks.

    Args:
        tell: told of progress, a line per fold.

    Returns:
        name → {"words", "metrics" (mean over folds), "folds" (metrics of each)}.
    """
    path = folder / "baselines.json"
    if path.is_file():
        with contextlib.suppress(ValueError):  # damaged: made again
            return json.loads(path.read_text())
    kept = data_root / "baselines" / _baselines_key(folds, spec)
    found = _kept_baselines(kept)
    if found is None:
        _fit_baselines(kept, folds, spec, data_root, tell)
        found = _kept_baselines(kept)
        assert found is not None
    text, table = found
    records.write_predictions(folder, table, name="baselines.parquet")
    records.write_atomically(path, text)  # last: with it the study has them
    return json.loads(text)


def _kept_baselines(kept: Path) -> tuple[str, pa.Table] | None:
    """None: never fitted, or not whole."""
    try:
        text = (kept / "baselines.json").read_text()
        json.loads(text)
        return text, pq.read_table(kept / "baselines.parquet")
    except (OSError, ValueError, pa.ArrowException):
        return None


def _baselines_key(folds: tuple[Dataset, ...], spec: StudySpec) -> str:
    """Of all that a baseline depends on; the inputs' scaling and the context's bars are in `data`."""
    hashes = [(fold.data_hash, fold.label_hash, fold.split_hash) for fold in folds]
    asked = [spec.data.model_dump(mode="json"), spec.task.model_dump(mode="json")]
    text = json.dumps([baselines.VERSION, hashes, asked], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _fit_baselines(
    kept: Path, folds: tuple[Dataset, ...], spec: StudySpec, data_root: Path, tell: Callable[[str], None]
) -> None:
    loaded = {
        symbol: sources.load(symbol, root=data_root, version=spec.data.versions.get(symbol))
        for symbol in (*spec.data.assets, *spec.data.context)
    }
    context = {symbol: loaded[symbol] for symbol in spec.data.context}
    bars = {symbol: loaded[symbol] for symbol in spec.data.assets}
    per_fold = []
    for index, fold in enumerate(folds):
        tell("fitting what must be beaten" + (f", fold {index + 1} of {len(folds)}" if len(folds) > 1 else ""))
        per_fold.append(baselines.for_dataset(fold, spec.task, bars, context))
    result = {
        first.name: {
            "words": first.words,
            "metrics": records.mean_metrics([fold[index].metrics for fold in per_fold]),
            "folds": [fold[index].metrics for fold in per_fold],
        }
        for index, first in enumerate(per_fold[0])
    }
    outputs = [
        _prediction_table(fold, index, baseline.outputs).append_column(
            "baseline", pa.array([baseline.name] * len(fold.validation.rows))
        )
        for index, fold in enumerate(folds)
        for baseline in per_fold[index]
    ]
    records.write_predictions(kept, pa.concat_tables(outputs), name="baselines.parquet")
    records.write_atomically(kept / "baselines.json", json.dumps(result, indent=1) + "\n")


def _predictions(fits: list[loop.FitResult], folds: tuple[Dataset, ...]) -> pa.Table:
    """One row per validation sample of every fold that has outputs."""
    parts = [
        _prediction_table(dataset, index, fit.outputs)
        for index, (fit, dataset) in enumerate(zip(fits, folds, strict=False))
        if fit.outputs is not None
    ]
    return pa.concat_tables(parts) if parts else pa.table({name: [] for name in records.PREDICTION_COLUMNS})


def _prediction_table(dataset: Dataset, fold: int, outputs: Floats) -> pa.Table:
    rows = dataset.validation.rows
    columns = (
        np.full(len(rows), fold, np.int32),
        dataset.dates[rows].astype("datetime64[D]"),
        np.asarray(dataset.assets)[dataset.asset_ids[rows]],
        dataset.validation.labels.astype(np.float32),
        np.asarray(outputs, np.float32),
    )
    return pa.table([pa.array(column) for column in columns], names=list(records.PREDICTION_COLUMNS))
