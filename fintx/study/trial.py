"""How does one trial become a record? Fit every fold, keep predictions and checkpoints, and write the record last."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from fintx.config import StudySpec, TrialConfig, config_hash
from fintx.data import sources
from fintx.data.windows import Dataset
from fintx.evaluate import baselines, metrics
from fintx.study import environment, records
from fintx.study.records import FoldRecord, TrialRecord
from fintx.train import checkpoint, loop
from fintx.types import Floats


@dataclass(frozen=True)
class Asked:
    """What the sampler or the queue asks for."""

    number: int
    params: dict[str, Any]
    entry: str | None
    """The queue entry's identity; none: the sampler's own proposal."""
    note: str

    @property
    def source(self) -> Literal["queue", "sampler"]:
        """Who asked."""
        return "sampler" if self.entry is None else "queue"


def run(
    spec: StudySpec,
    asked: Asked,
    config: TrialConfig,
    folds: tuple[Dataset, ...],
    *,
    study_folder: Path,
    on_epoch: Callable[[int, loop.Epoch], None],
    should_stop: Callable[[], bool],
) -> TrialRecord | None:
    """Train a config on every fold and write its record.

    Args:
        on_epoch: called with the fold and what is known after each epoch.
        should_stop: asked between epochs.

    Returns:
        The record, or none if asked to stop: then nothing of the trial is kept.
    """
    started = environment.now()
    fits: list[loop.FitResult] = []
    for index, dataset in enumerate(folds):
        fit = loop.fit(
            config,
            dataset,
            metric=spec.study.metric,
            on_epoch=lambda epoch, index=index: on_epoch(index, epoch),  # type: ignore[misc]
            should_stop=should_stop,
        )
        if fit.outcome == "interrupted":
            return None
        fits.append(fit)
        if fit.outcome not in records.SUCCESSES:
            break
    record = _record(spec, asked, config, fits, folds, started=started)
    where = records.trial_folder(study_folder, asked.number)
    shutil.rmtree(where, ignore_errors=True)  # what an attempt that was cut off may have left
    records.write_predictions(where, _predictions(fits, folds))
    if record.value is not None:
        for index, (fit, dataset) in enumerate(zip(fits, folds, strict=True)):
            assert fit.params is not None
            meta = _checkpoint_meta(record, dataset, fold=index)
            checkpoint.save(where / "checkpoint" / f"fold_{index}", fit.params, config=config, meta=meta)
    records.append(study_folder, record)
    return record


def _record(
    spec: StudySpec,
    asked: Asked,
    config: TrialConfig,
    fits: list[loop.FitResult],
    folds: tuple[Dataset, ...],
    *,
    started: str,
) -> TrialRecord:
    kept = tuple(_fold_record(spec, fit, fold) for fit, fold in zip(fits, folds, strict=False))
    outcome = kept[-1].outcome
    value = records.mean_metrics([fold.best for fold in kept]).get(spec.study.metric)
    return TrialRecord(
        study=spec.study.name,
        trial_number=asked.number,
        config=config,
        config_hash=config_hash(config),
        budget=spec.budget,
        source=asked.source,
        entry=asked.entry,
        note=asked.note,
        params=asked.params,
        **config.shape.model_dump(),
        param_count=fits[0].param_count,
        seeds={"study": spec.study.seed, "trial": config.seed},
        metric=spec.study.metric,
        value=value if outcome in records.SUCCESSES else None,
        outcome=outcome,
        detail=fits[-1].detail,
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
    }


def train_prior(dataset: Dataset) -> float:
    """Mean training label: the base rate, or the mean log return."""
    return float(np.mean(dataset.train.labels, dtype=np.float64))


def ensure_baselines(folder: Path, folds: tuple[Dataset, ...], spec: StudySpec, data_root: Path) -> dict[str, Any]:
    """Fit what must be beaten on the very same rows, once per study; later runs read it back.

    Returns:
        name → {"words", "metrics" (mean over folds), "folds" (metrics of each)}.
    """
    path = folder / "baselines.json"
    if path.is_file():
        return json.loads(path.read_text())
    loaded = {
        symbol: sources.load(symbol, root=data_root, version=spec.data.versions.get(symbol))
        for symbol in (*spec.data.assets, *spec.data.context)
    }
    context = {symbol: loaded[symbol] for symbol in spec.data.context}
    bars = {symbol: loaded[symbol] for symbol in spec.data.assets}
    per_fold = [baselines.for_dataset(fold, spec.task, bars, context) for fold in folds]
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
    records.write_predictions(folder, pa.concat_tables(outputs), name="baselines.parquet")
    records.write_atomically(path, json.dumps(result, indent=1) + "\n")
    return result


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
