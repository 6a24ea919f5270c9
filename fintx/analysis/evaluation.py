"""Evaluation of a checkpoint: restored from its path alone, scored on validation or on the bars of a file."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
from fintx.evaluate.metrics import Metrics
from fintx.study import records, study_file
from fintx.train import checkpoint, trainer
from fintx.train.checkpoint import Restored
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
    baselines: dict[str, Metrics]
    """On the identical rows; empty where the study's data are not at hand."""


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
    checkpoints = find_checkpoints(path)
    prepared, scores = None, []
    for folder in checkpoints.folders:
        restored = checkpoint.load(folder)
        prepared = prepared or datasets.build(restored.config, data_root)
        dataset = prepared.folds[restored.meta["fold"]]
        _check_hashes(folder, restored.meta, dataset)
        scores.append(_score(restored, dataset, dataset.validation))
    metas = [score.meta for score in scores]
    opened = study_file.openings_note(checkpoints.study) if checkpoints.study else ""
    notes = [opened] if opened else []
    trained_on = Layout(**metas[0].get("layout", {}))
    if _layout(trained_on) != trained_on:
        notes.append(f"trained on {trained_on}, scored on one device: last digits may differ from the recorded ones")
    fitted = {} if checkpoints.study is None else predictions.read_baselines(checkpoints.study)
    baseline_metrics = {
        name: records.mean_metrics([own["folds"][meta["fold"]] for meta in metas]) for name, own in fitted.items()
    }
    recorded = records.mean_metrics([meta["best"] for meta in metas])
    return _evaluation("validation", checkpoints, scores, baseline_metrics, recorded=recorded, notes=notes)


def on_file(path: Path, file: Path, *, symbol: str | None, data_root: Path) -> Evaluation:
    """Score a checkpoint on the bars of a file: another asset, or later days of the same columns.

    Raises:
        FintxError: as on_validation; or the file is missing, breaks a rule, lacks columns or is too short.
    """
    checkpoints = find_checkpoints(path)
    folder = checkpoints.folders[-1]
    restored = checkpoint.load(folder)
    config, name = restored.config, symbol or file.stem
    bars = sources.read_file(file, name, today=datetime.date.today())
    volume, gaps = (features.needing(what, config.data.features) for what in ("volume", "gaps"))
    if volume and not bars.volume.any():
        raise FintxError(f"{file}: has no column volume, which the model's inputs {', '.join(volume)} need")
    if gaps and not features.has_gaps(bars):
        raise FintxError(
            f"{file}: its opens are mostly the close before, and the model's input {', '.join(gaps)} needs true opens"
        )
    context = sources.load_pinned(config.data, config.data.context, data_root)
    scaling = Standardizer.from_json(restored.meta["scaling"])
    dataset, part = datasets.build_external(bars, context, config, scaling=scaling)
    notes, baseline_metrics = [], {}
    if name not in config.data.assets:
        notes.append(f"{name} was not trained on: inputs are scaled by the pooled training statistics")
    try:
        fold = datasets.build(config, data_root).folds[restored.meta["fold"]]
        _check_hashes(folder, restored.meta, fold)
        own = sources.load_pinned(config.data, fold.assets, data_root)
        baseline_metrics = _baselines(restored, fold, own, bars, dataset, part, context)
    except FintxError as error:  # a checkpoint that was taken elsewhere, without its training data
        notes.append(f"no baselines: they learn from the study's training rows, and {error}")
    return _evaluation(
        str(file), checkpoints, [_score(restored, dataset, part)], baseline_metrics, recorded=None, notes=notes
    )


def _baselines(
    restored: Restored, fold: Dataset, own: Mapping[str, Bars], bars: Bars, dataset: Dataset, part: Part,
    context: Mapping[str, Bars],
) -> dict[str, Metrics]:  # fmt: skip
    """Fitted on the training rows of the checkpoint's fold, scored on the file's rows.

    Args:
        own: bars of the fold's assets.
        bars, dataset, part: the file's.
    """
    last = fold.dates.max().astype(datetime.date)  # nothing of the test part
    symbol = f"{bars.symbol}, the file's"
    joined = replace(
        fold,
        features=np.concatenate([fold.features, dataset.features]),
        dates=np.concatenate([fold.dates, dataset.dates]),
        asset_ids=np.concatenate([fold.asset_ids, np.full(len(dataset.dates), len(fold.assets), np.int32)]),
        assets=(*fold.assets, symbol),
        close=np.concatenate([fold.close, dataset.close]),
        validation=Part(rows=part.rows + len(fold.dates), labels=part.labels),
    )
    prices = {name: asset_bars.between(None, last) for name, asset_bars in own.items()} | {symbol: bars}
    fitted = baselines.for_dataset(joined, restored.config.task, prices, context)
    return {baseline.name: baseline.metrics for baseline in fitted}


# --- finding ----------------------------------------------------------------------------------------------------------


def find_checkpoints(path: Path) -> TrialCheckpoints:
    """The checkpoints that a path means: a study's best trial, a trial, a trial's checkpoint folder, or one fold.

    Raises:
        FintxError: nothing of the kind there.
    """
    if not path.exists():
        raise FintxError(f"{path}: is not there; give a study's folder, such as outputs/demo, or a trial's")
    study, resolved, only = study_file.read_study(path), path.resolve(), False
    if study is not None:
        finished = records.read_all(path)
        best = records.best_of(finished, minimize=metrics.MINIMIZE[study.spec.study.metric])
        if best is None:
            raise FintxError(f"{path}: has no successful trial yet ({len(finished)} finished); run the study first")
        trial = records.trial_folder(path, best.trial_number)
    elif resolved.name == "checkpoint":
        trial = resolved.parent
    elif resolved.parent.name == "checkpoint":
        trial, only = resolved.parent.parent, path.name.startswith("fold_")
    else:
        trial = path
    folders = (path,) if only else fold_checkpoints(trial)
    if not folders:
        raise FintxError(
            f"{trial}: holds no checkpoint; only the study.keep_checkpoints best trials keep theirs, "
            "or this is no trial's folder"
        )
    above = trial.parent.parent
    return TrialCheckpoints(folders, trial, above if (above / "study.json").is_file() else None)


def fold_checkpoints(trial: Path) -> tuple[Path, ...]:
    """The checkpoint folders in a trial's or a rerun's folder, by fold; empty if it keeps none."""
    numbered = [
        (int(number), path)
        for path in (trial / "checkpoint").glob("fold_*")
        if (number := path.name.removeprefix("fold_")).isdigit()
    ]
    return tuple(path for _, path in sorted(numbered))


# --- scoring ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Score:
    """Of one fold's checkpoint."""

    meta: dict[str, Any]
    metrics: Metrics
    per_asset: dict[str, Metrics]
    dates: np.ndarray
    """(S,) datetime64[D]."""


def _score(restored: Restored, dataset: Dataset, part: Part) -> _Score:
    config, prior = restored.config, restored.meta["prior"]
    layout = _layout(Layout(**restored.meta.get("layout", {})))
    outputs = trainer.predict(config, restored.params, dataset.features, part.rows, layout=layout)
    predicts, asset_ids = config.task.predicts, dataset.asset_ids[part.rows]
    return _Score(
        meta=restored.meta,
        metrics=metrics.evaluate(predicts, outputs, part.labels, prior=prior),
        per_asset=metrics.per_asset(predicts, outputs, part.labels, asset_ids, dataset.assets, prior=prior),
        dates=dataset.dates[part.rows],
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
    rows: str, checkpoints: TrialCheckpoints, scores: list[_Score], baseline_metrics: dict[str, Metrics], *,
    recorded: Metrics | None, notes: Sequence[str],
) -> Evaluation:  # fmt: skip
    meta, dates = scores[0].meta, np.concatenate([score.dates for score in scores])
    assets = dict.fromkeys(asset for score in scores for asset in score.per_asset)
    return Evaluation(
        title=f"trial {meta['trial_number']} of {meta['study']} on {rows}",
        checkpoint=checkpoints.trial / "checkpoint",
        param_count=meta["param_count"],
        metrics=records.mean_metrics([score.metrics for score in scores]),
        recorded=recorded,
        per_asset={
            asset: records.mean_metrics([score.per_asset[asset] for score in scores if asset in score.per_asset])
            for asset in assets
        },
        first_date=str(dates.min()),
        last_date=str(dates.max()),
        notes=tuple(notes),
        baselines=baseline_metrics,
    )
