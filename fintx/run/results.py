"""What is kept of a trial that came to its end: predictions, checkpoints, and the record, which is written last."""

from __future__ import annotations

import dataclasses
import shutil
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from fintx.config.schema import StudySpec, config_hash
from fintx.data.datasets import Dataset
from fintx.evaluate import metrics
from fintx.run.job import Job
from fintx.study import environment, records
from fintx.study.records import FoldRecord, Replicate, TrialRecord, prediction_table
from fintx.train import checkpoint, compilation
from fintx.train.progress import FitResult, Timing


@dataclass(frozen=True)
class Trained:
    """A trial's trainings, on as many folds as came to one."""

    job: Job
    fits: list[list[FitResult]]
    """By fold, then by replicate."""
    started: str
    wait_s: float | None


def write_results(training: Trained, folds: tuple[Dataset, ...], check: Callable[[], None]) -> TrialRecord:
    """Write all that is kept of a trial, the record last.

    Args:
        check: raises if the trial is somebody else's by now; called right before anything appears.
    """
    job, where = training.job, training.job.folder
    record = _record(training, folds)
    first = [fits[0] for fits in training.fits]
    check()
    records.write_predictions(where, _predictions(first, folds))
    if len(job.replicates) > 1:
        records.write_predictions(where, _of_replicates(training.fits, folds), name="replicates.parquet")
    if record.value is not None:
        for index, (fit, dataset) in enumerate(zip(first, folds, strict=True)):
            assert fit.params is not None
            meta = _checkpoint_meta(record, dataset, fold=index)
            checkpoint.save(where / "checkpoint" / f"fold_{index}", fit.params, config=job.config, meta=meta)
    check()
    records.write_record(where, record)
    shutil.rmtree(where / "run", ignore_errors=True)
    return record


def _record(training: Trained, folds: tuple[Dataset, ...]) -> TrialRecord:
    job, fits = training.job, [fit for of_fold in training.fits for fit in of_fold]
    spec, config = job.spec, job.config
    seeds_of_folds = [
        tuple(_fold_record(spec, of_fold[replicate], fold) for of_fold, fold in zip(training.fits, folds, strict=False))
        for replicate in range(len(job.replicates))
    ]
    deciding = next((fit for fit in fits if fit.outcome not in records.SUCCESSES), training.fits[-1][0])
    assert deciding.outcome != "interrupted"
    values = [
        records.mean_metrics([fold.best for fold in of_seed]).get(spec.study.metric) for of_seed in seeds_of_folds
    ]
    value, value_se = _mean_and_error(values) if deciding.outcome in records.SUCCESSES else (None, None)
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
        value=value,
        value_se=value_se,
        outcome=deciding.outcome,
        detail=deciding.detail,
        warnings=tuple(warning for fit in fits for warning in fit.warnings),
        attempt=job.attempt,
        host=socket.gethostname(),
        micro_batch=fits[-1].micro_batch,
        remat=fits[-1].batch_layout.remat,
        layout=dataclasses.asdict(fits[-1].batch_layout.layout),
        memory_bytes=max(estimates, default=None),
        folds=seeds_of_folds[0],
        replicates=tuple(
            Replicate(seed=other.seed, folds=of_seed)
            for other, of_seed in zip(job.replicates[1:], seeds_of_folds[1:], strict=True)
        ),
        libraries=environment.libraries(),
        settings=environment.process_settings()
        | {name: str(value) for name, value in compilation.compiler_options(config.model, config.shape).items()},
        device=environment.device(),
        git_commit=environment.git_commit(),
        started=training.started,
        finished=environment.now(),
        **dataclasses.asdict(sum((fit.timing for fit in fits), Timing())),
        wait_s=training.wait_s,
    )


def _mean_and_error(values: Sequence[float | int | None]) -> tuple[float, float | None]:
    """Mean over seeds and its standard error, SD / √k; a single seed tells no error, and its value stays as it is."""
    if len(values) == 1:
        assert values[0] is not None
        return values[0], None
    found = np.asarray(values, dtype=float)
    return float(found.mean()), float(found.std(ddof=1) / np.sqrt(len(found)))


def _fold_record(spec: StudySpec, fit: FitResult, dataset: Dataset) -> FoldRecord:
    assert fit.outcome != "interrupted"
    part = dataset.validation
    per_asset: dict[str, dict[str, Any]] = {}
    if fit.outputs is not None and np.isfinite(fit.outputs).all():
        ids = dataset.asset_ids[part.rows]
        prior = train_prior(dataset)
        per_asset = metrics.per_asset(spec.task.predicts, fit.outputs, part.labels, ids, dataset.assets, prior=prior)
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
        trace_s=fit.timing.trace_s,
        compile_s=fit.timing.compile_s,
        run_s=fit.timing.run_s,
        wall_s=fit.timing.wall_s,
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


def train_prior(dataset: Dataset) -> float:
    """Mean training label: the base rate, or the mean log return."""
    return float(np.mean(dataset.train.labels, dtype=np.float64))


def _of_replicates(fits: list[list[FitResult]], folds: tuple[Dataset, ...]) -> pa.Table:
    """The predictions of every seed but the first, with its number as the last column."""
    tables = []
    for replicate in range(1, len(fits[0])):
        table = _predictions([of_fold[replicate] for of_fold in fits], folds)
        tables.append(table.append_column("replicate", pa.array(np.full(len(table), replicate, np.int32))))
    return pa.concat_tables(tables, promote_options="permissive")


def _predictions(fits: list[FitResult], folds: tuple[Dataset, ...]) -> pa.Table:
    """One row per validation sample of every fold that has outputs."""
    parts = [
        prediction_table(dataset, index, fit.outputs)
        for index, (fit, dataset) in enumerate(zip(fits, folds, strict=False))
        if fit.outputs is not None
    ]
    return pa.concat_tables(parts) if parts else pa.table({name: [] for name in records.PREDICTION_COLUMNS})
