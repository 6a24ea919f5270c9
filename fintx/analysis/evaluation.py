"""Evaluation of a checkpoint: restored from its path alone, scored on validation or on other bars."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fintx.analysis import predictions
from fintx.data import datasets, features, sources
from fintx.data.bars import Bars
from fintx.data.datasets import Dataset, Part
from fintx.data.standardize import Standardizer
from fintx.errors import FintxError
from fintx.evaluate import baselines, metrics
from fintx.study import records, study_file
from fintx.study.records import Metrics
from fintx.train import checkpoint, trainer
from fintx.train.sharding import ONE, Layout


@dataclass(frozen=True)
class Evaluation:
    """All metrics of one checkpoint on one set of rows; of a walk-forward trial, the mean over its folds."""

    title: str
    checkpoint: Path
    param_count: int
    metrics: Metrics
    recorded: Metrics | None
    """What the trial's record holds for the same rows; none for rows the search never saw."""
    per_asset: dict[str, Metrics]
    first_date: str
    last_date: str
    notes: tuple[str, ...]
    baselines: dict[str, Metrics] = field(default_factory=dict)
    """What must be beaten, on the identical rows; none where the study's data are not at hand."""


@dataclass(frozen=True)
class TrialCheckpoints:
    """A trial's checkpoints, one per fold, and the study folder they lie in, if they still do."""

    folders: tuple[Path, ...]
    trial: Path
    study: Path | None


def on_validation(path: Path, *, data_root: Path) -> Evaluation:
    """Score a checkpoint on the validation rows it was chosen by; the figures equal the recorded ones.

    Raises:
        FintxError: no checkpoint there, a damaged one, or data that are missing or differ from the trained ones.
    """
    found = find_checkpoints(path)
    scored = []
    for folder in found.folders:
        restored = checkpoint.load(folder)
        config, meta = restored.config, restored.meta
        prepared = datasets.build(config, data_root)
        dataset = prepared.folds[meta["fold"]]
        _check_hashes(folder, meta, dataset)
        scored.append(_score(restored, dataset.features, dataset.validation, dataset))
    recorded = records.mean_metrics([s.meta["best"] for s in scored])
    opened = study_file.openings_note(found.study) if found.study else ""
    notes = [opened] if opened else []
    trained_on = Layout(**scored[0].meta.get("layout", {}))
    if _layout(trained_on) != trained_on:
        notes.append(f"trained on {trained_on}, scored on one device: last digits may differ from the recorded ones")
    beaten = _baselines(found.study, [s.meta["fold"] for s in scored])
    return replace(_evaluation("validation", found, scored, recorded=recorded, notes=notes), baselines=beaten)


def _baselines(study: Path | None, folds: list[int]) -> dict[str, Metrics]:
    """Their metrics, as means over the same folds."""
    held = {} if study is None else predictions.read_baselines(study)
    return {name: records.mean_metrics([each["folds"][fold] for fold in folds]) for name, each in held.items()}


def on_file(path: Path, file: Path, *, symbol: str | None, data_root: Path) -> Evaluation:
    """Score a checkpoint on the bars of a file: another asset, or later days of the same columns.

    Raises:
        FintxError: as on_validation; or the file is missing, breaks a rule, lacks columns or is too short.
    """
    found = find_checkpoints(path)
    folder = found.folders[-1]
    restored = checkpoint.load(folder)
    config, meta = restored.config, restored.meta
    name = symbol or file.stem
    bars = sources.read_file(file, name, today=datetime.date.today())
    without = features.needing("volume", config.data.features)
    if without and not bars.volume.any():
        raise FintxError(f"{file}: has no column volume, which the model's inputs {', '.join(without)} need")
    gaps = features.needing("gaps", config.data.features)
    if gaps and not features.has_gaps(bars):
        raise FintxError(
            f"{file}: its opens are mostly the close before, and the model's input {', '.join(gaps)} needs true opens"
        )
    context = sources.load_pinned(config.data, config.data.context, data_root)
    scaling = Standardizer.from_json(meta["scaling"])
    dataset, part = datasets.build_external(bars, context, config, scaling=scaling)
    notes = []
    if name not in config.data.assets:
        notes.append(f"{name} was not trained on: inputs are scaled by the pooled training statistics")
    try:
        beaten = _baselines_on(bars, dataset, part, context, restored, folder=folder, data_root=data_root)
    except FintxError as error:  # a checkpoint that was taken elsewhere, without its training data
        beaten = {}
        notes.append(f"no baselines: they learn from the study's training rows, and {error}")
    scored = _score(restored, dataset.features, part, dataset)
    return replace(_evaluation(str(file), found, [scored], recorded=None, notes=notes), baselines=beaten)


def _baselines_on(
    bars: Bars,
    dataset: Dataset,
    part: Part,
    context: Mapping[str, Bars],
    restored: checkpoint.Restored,
    *,
    folder: Path,
    data_root: Path,
) -> dict[str, Metrics]:
    """Fitted on the training rows of the checkpoint's fold, scored on rows of another asset or of later days."""
    config, meta = restored.config, restored.meta
    fold = datasets.build(config, data_root).folds[meta["fold"]]
    _check_hashes(folder, meta, fold)
    last = fold.dates.max().astype(datetime.date)  # of its own assets, nothing of the test part
    own = {
        symbol: held.between(None, last)
        for symbol, held in sources.load_pinned(config.data, fold.assets, data_root).items()
    }
    new = f"{bars.symbol}, the file's"
    together = replace(
        fold,
        features=np.concatenate([fold.features, dataset.features]),
        dates=np.concatenate([fold.dates, dataset.dates]),
        asset_ids=np.concatenate([fold.asset_ids, np.full(len(dataset.dates), len(fold.assets), np.int32)]),
        assets=(*fold.assets, new),
        close=np.concatenate([fold.close, dataset.close]),
        validation=Part(rows=part.rows + len(fold.dates), labels=part.labels),
    )
    found = baselines.for_dataset(together, config.task, {**own, new: bars}, context)
    return {baseline.name: baseline.metrics for baseline in found}


# --- finding ----------------------------------------------------------------------------------------------------------


def find_checkpoints(path: Path) -> TrialCheckpoints:
    """The checkpoints that a path means: a study's best trial, a trial, a trial's checkpoint folder, or one fold.

    Raises:
        FintxError: nothing of the kind there.
    """
    if not path.exists():
        raise FintxError(f"{path}: is not there; give a study's folder, such as outputs/demo, or a trial's")
    study = study_file.read_study(path)
    if study is not None:
        finished = records.read_all(path)
        best = records.best_of(finished, minimize=metrics.MINIMIZE[study.spec.study.metric])
        if best is None:
            raise FintxError(f"{path}: has no successful trial yet ({len(finished)} finished); run the study first")
        trial = records.trial_folder(path, best.trial_number)
    else:
        trial = _trial_of(path)
    only = path if (path / "..").resolve().name == "checkpoint" and path.name.startswith("fold_") else None
    folders = (only,) if only else tuple(sorted((trial / "checkpoint").glob("fold_*"), key=fold_number))
    if not folders:
        raise FintxError(
            f"{trial}: holds no checkpoint; only the study.keep_checkpoints best trials keep theirs, "
            "or this is no trial's folder"
        )
    above = trial.parent.parent
    return TrialCheckpoints(folders, trial, above if (above / "study.json").is_file() else None)


def _trial_of(path: Path) -> Path:
    resolved = path.resolve()
    if resolved.name == "checkpoint":
        return resolved.parent
    if resolved.parent.name == "checkpoint":
        return resolved.parent.parent
    return path


def fold_number(path: Path) -> int:
    """Of a checkpoint's folder; −1: it is none."""
    number = path.name.removeprefix("fold_")
    return int(number) if number.isdigit() else -1


# --- scoring ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scored:
    meta: dict[str, Any]
    metrics: Metrics
    per_asset: dict[str, Metrics]
    first_date: str
    last_date: str


def _score(restored: checkpoint.Restored, features: np.ndarray, part: Part, dataset: Dataset) -> _Scored:
    config, meta = restored.config, restored.meta
    layout = _layout(Layout(**meta.get("layout", {})))
    outputs = trainer.predict(config, restored.params, features, part.rows, layout=layout)
    dates = dataset.dates[part.rows]
    return _Scored(
        meta=meta,
        metrics=metrics.evaluate(config.task.predicts, outputs, part.labels, prior=meta["prior"]),
        per_asset=metrics.per_asset(
            config.task.predicts,
            outputs,
            part.labels,
            dataset.asset_ids[part.rows],
            dataset.assets,
            prior=meta["prior"],
        ),
        first_date=str(dates.min()),
        last_date=str(dates.max()),
    )


def _layout(trained_on: Layout) -> Layout:
    """The devices that a model was trained on, if there are as many here: then its figures are the recorded ones."""
    return trained_on if trained_on.n_devices <= jax.device_count() else ONE


def _check_hashes(folder: Path, meta: dict[str, Any], dataset: Dataset) -> None:
    for name in ("data_hash", "label_hash", "split_hash"):
        if meta[name] != getattr(dataset, name):
            raise FintxError(
                f"{folder}: was trained on other {name.removesuffix('_hash')} "
                f"({name} {meta[name][:12]}, here {getattr(dataset, name)[:12]}); use the same --data-dir and version"
            )


def _evaluation(
    rows: str,
    found: TrialCheckpoints,
    scored: list[_Scored],
    *,
    recorded: Metrics | None,
    notes: tuple[str, ...] | list[str],
) -> Evaluation:
    meta = scored[0].meta
    return Evaluation(
        title=f"trial {meta['trial_number']} of {meta['study']} on {rows}",
        checkpoint=found.trial / "checkpoint",
        param_count=meta["param_count"],
        metrics=records.mean_metrics([s.metrics for s in scored]),
        recorded=recorded,
        per_asset={
            asset: records.mean_metrics([s.per_asset[asset] for s in scored if asset in s.per_asset])
            for asset in dict.fromkeys(asset for s in scored for asset in s.per_asset)
        },
        first_date=min(s.first_date for s in scored),
        last_date=max(s.last_date for s in scored),
        notes=tuple(notes),
    )
