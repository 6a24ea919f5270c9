"""Baselines of a study: fitted once per data, label and split, kept beside the data, copied into its folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fintx.config.schema import StudySpec
from fintx.data import sources
from fintx.data.datasets import Dataset
from fintx.evaluate import baselines
from fintx.study import records


def ensure_baselines(
    folder: Path,
    folds: tuple[Dataset, ...],
    spec: StudySpec,
    data_root: Path,
    *,
    tell: Callable[[str], None],
    pause: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """What must be beaten on the very same rows: fitted once per data, label and split, whatever study asks.

    Args:
        tell: told of progress, a line per fold.
        pause: called before each fit; what it raises ends them.

    Returns:
        name → {"words", "metrics" (mean over folds), "folds" (metrics of each)}.
    """
    path = folder / "baselines.json"
    if path.is_file() and (folder / "baselines.parquet").is_file():
        with contextlib.suppress(ValueError):  # damaged: made again
            return json.loads(path.read_text())
    kept = data_root / "baselines" / _baselines_key(folds, spec)
    found = _kept_baselines(kept)
    if found is None:
        _fit_baselines(kept, folds, spec, data_root, tell, pause)
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
    kept: Path,
    folds: tuple[Dataset, ...],
    spec: StudySpec,
    data_root: Path,
    tell: Callable[[str], None],
    pause: Callable[[], None],
) -> None:
    bars = sources.load_pinned(spec.data, spec.data.assets, data_root)
    context = sources.load_pinned(spec.data, spec.data.context, data_root)
    per_fold = []
    for index, fold in enumerate(folds):
        tell("fitting what must be beaten" + (f", fold {index + 1} of {len(folds)}" if len(folds) > 1 else ""))
        per_fold.append(baselines.for_dataset(fold, spec.task, bars, context, pause=pause))
    result = {
        first.name: {
            "words": first.words,
            "metrics": records.mean_metrics([fold[index].metrics for fold in per_fold]),
            "folds": [fold[index].metrics for fold in per_fold],
        }
        for index, first in enumerate(per_fold[0])
    }
    outputs = [
        records.prediction_table(fold, index, baseline.outputs).append_column(
            "baseline", pa.array([baseline.name] * len(fold.validation.rows))
        )
        for index, fold in enumerate(folds)
        for baseline in per_fold[index]
    ]
    records.write_predictions(kept, pa.concat_tables(outputs), name="baselines.parquet")
    records.write_atomically(kept / "baselines.json", json.dumps(result, indent=1) + "\n")
