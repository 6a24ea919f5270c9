"""Kept predictions: every model's outputs on the same validation rows, its loss on each, and the best baseline.

The best baseline is named here alone: the terminal, the pages, a confirmation and the test part all follow it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fintx.config.schema import StudySpec
from fintx.errors import FintxError
from fintx.evaluate import metrics, significance
from fintx.evaluate.significance import Estimate
from fintx.study import records
from fintx.study.records import TrialRecord
from fintx.tasks import Prediction
from fintx.types import Floats, Ints

_KEY = ("fold", "date", "asset", "label")


@dataclass(frozen=True, eq=False)
class Rows:
    """The validation rows of a study, and its baselines' outputs on them."""

    predicts: Prediction
    metric: str
    """The metric that the study ranks trials by."""
    n_seeds: int
    """Of each trial of the search (`study.replicates`)."""
    horizon: int
    fold: Ints
    """(S,) index of the fold that each row belongs to."""
    dates: np.ndarray
    """(S,) datetime64[D]."""
    labels: Floats
    """(S,) true labels."""
    baselines: dict[str, Floats]
    """Name → (S,) outputs."""
    key: pa.Table
    """What identifies a row; other predictions must have the same."""

    @property
    def assets(self) -> np.ndarray:
        """(S,) names."""
        return np.asarray(self.key["asset"].to_pylist())

    def losses(self, outputs: Floats, *, metric: str | None = None) -> Floats:
        """(S,) losses whose mean is the metric (1 − it for a ranking) as records hold it: over folds, and over seeds.

        A ranking orders the rows of one fold at a time: each fold has a model of its own.

        Args:
            outputs: (S,) of one model, or (N, S) of a trial's seeds.
            metric: none: the study's.

        Returns:
            NaN for all rows where a ranking is undefined in a fold.
        """
        if outputs.ndim == 2:
            return np.mean([self.losses(of_seed, metric=metric) for of_seed in outputs], axis=0)
        folds, losses, means = np.unique(self.fold), np.empty(len(self.labels)), []
        for fold in folds:
            inside = self.fold == fold
            of_fold = significance.row_losses(
                self.predicts, metric or self.metric, outputs[inside], self.labels[inside]
            )
            means.append(of_fold.mean())
            # A fold counts as one, however many rows it has: its deviations are weighted; the mean is moved below.
            losses[inside] = means[-1] + (of_fold - means[-1]) * len(losses) / (len(folds) * len(of_fold))
        return losses + (np.mean(means) - losses.mean())

    def losses_among(self, chosen: np.ndarray, outputs: Floats) -> Floats:
        """(S,) losses of one model scored on the chosen rows alone, a plain mean over them; NaN on the others.

        NaN too in a fold whose chosen rows are of one class, where a ranking is undefined.
        """
        losses = np.full(len(self.labels), np.nan)
        for fold in np.unique(self.fold[chosen]):
            inside = chosen & (self.fold == fold)
            losses[inside] = significance.row_losses(self.predicts, self.metric, outputs[inside], self.labels[inside])
        return losses

    def by_day(self, losses: Floats, *, chosen: np.ndarray | None = None) -> Floats:
        """(S, …) losses as a series of days, (D, …)."""
        return significance.by_day(losses, self.dates, chosen=chosen)

    def take(self, places: Ints) -> Rows:
        """The rows at these places, in that order."""
        return dataclasses.replace(
            self,
            fold=self.fold[places],
            dates=self.dates[places],
            labels=self.labels[places],
            baselines={name: outputs[places] for name, outputs in self.baselines.items()},
            key=self.key.take(places),
        )


# --- reading ----------------------------------------------------------------------------------------------------------


def read_baselines(study_folder: Path) -> dict[str, Any]:
    """baselines.json: name → {"words", "metrics", "folds"}; empty if it isn't there yet.

    Raises:
        DamagedRecord: it is not what fintx wrote.
    """
    path = study_folder / "baselines.json"
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError):
        raise records.DamagedRecord(f"{path}: is not what fintx wrote; remove it, and the next run makes it") from None


def read_rows(study_folder: Path, spec: StudySpec) -> Rows:
    """The rows of baselines.parquet.

    Raises:
        FintxError: the file is missing or isn't what fintx wrote.
    """
    path = study_folder / "baselines.parquet"
    table = _read(path, "output", "baseline")
    names = list(dict.fromkeys(table["baseline"].to_pylist()))
    if not names:
        raise FintxError(f"{path}: holds no baseline; move it and baselines.json away, and run the study again")
    parts = {name: table.filter(pc.equal(table["baseline"], name)) for name in names}
    key = parts[names[0]].select(_KEY)
    return Rows(
        predicts=spec.task.predicts,
        metric=spec.study.metric,
        n_seeds=spec.study.replicates,
        horizon=spec.task.horizon,
        fold=key["fold"].to_numpy(),
        dates=key["date"].to_numpy().astype("datetime64[D]"),
        labels=key["label"].to_numpy(),
        baselines={name: _outputs(path, part, key, name) for name, part in parts.items()},
        key=key,
    )


def read_outputs(folder: Path, rows: Rows) -> Floats:
    """(S,) outputs of the model in a trial's folder (its first seed's) or in a rerun's.

    Raises:
        FintxError: they are missing, damaged, or of other rows than the baselines'.
    """
    path = folder / "predictions.parquet"
    return _outputs(path, _read(path, "output"), rows.key, "its model")


def read_seeds(study_folder: Path, number: int, rows: Rows) -> Floats:
    """(N, S) outputs of each seed of a trial of the search, the first seed's first.

    Raises:
        FintxError: they are missing, damaged, too few, or of other rows than the baselines'.
    """
    folder = records.trial_folder(study_folder, number)
    outputs = [read_outputs(folder, rows)]
    if rows.n_seeds > 1:
        path = folder / "replicates.parquet"
        table = _read(path, "output", "replicate")
        for replicate in range(1, rows.n_seeds):
            part = table.filter(pc.equal(table["replicate"], replicate))
            outputs.append(_outputs(path, part, rows.key, f"its model of seed {replicate + 1}"))
    return np.array(outputs)


def trial_losses(study_folder: Path, number: int, rows: Rows) -> Floats:
    """(S,) losses of a trial of the search, mean over its seeds: what every comparison of trials is made of.

    Raises:
        FintxError: as `read_seeds`.
    """
    return rows.losses(read_seeds(study_folder, number, rows))


def _read(path: Path, *columns: str) -> pa.Table:
    try:
        return pq.read_table(path, columns=[*_KEY, *columns])
    except FileNotFoundError:
        raise FintxError(f"{path}: is not there; were its predictions made on another machine, or deleted?") from None
    except (OSError, pa.ArrowInvalid, pa.ArrowKeyError) as error:
        first = next(iter(str(error).splitlines()), "")
        raise FintxError(f"{path}: holds no predictions of fintx ({first}); restore it from a copy") from None


def _outputs(path: Path, table: pa.Table, key: pa.Table, model: str) -> Floats:
    """A table's outputs; its rows must be the baselines'."""
    if table.num_rows != key.num_rows or not all(table[column].equals(key[column]) for column in _KEY):
        raise FintxError(
            f"{path}: {model} was scored on other rows than the baselines ({table.num_rows:,} against "
            f"{key.num_rows:,}), so their losses can't be compared"
        )
    return table["output"].to_numpy()


# --- the best baseline ------------------------------------------------------------------------------------------------

Standing = Literal["ahead", "can't be told apart", "behind"]


@dataclass(frozen=True)
class BaselineComparison:
    """A trial against the best baseline."""

    metric: str
    """The study's: values and difference are in it."""
    baseline: str
    baseline_value: float
    trial_value: float
    """Mean over the trial's seeds."""
    difference: Estimate
    """How much better the trial is; negative: the baseline is better. Days are resampled in blocks."""
    n_rows: int

    @property
    def standing(self) -> Standing:
        """Of the trial beside the baseline."""
        return standing(self.difference)


def standing(difference: Estimate) -> Standing:
    """The side of zero on which the whole interval lies, if on one."""
    return "ahead" if difference.positive else "behind" if difference.negative else "can't be told apart"


def best_baseline(rows: Rows, *, among: Iterable[str] | None = None) -> tuple[str, float] | None:
    """The baseline that is best in the study's metric on these rows, and its value; none if none has one.

    Args:
        among: names to choose from; none: all.
    """
    means = {name: rows.losses(rows.baselines[name]).mean() for name in (rows.baselines if among is None else among)}
    defined = [name for name, mean in means.items() if not np.isnan(mean)]  # NaN: one class alone in a fold
    if not defined:
        return None
    best = min(defined, key=lambda name: means[name])
    return best, _value(rows.metric, means[best])


def compare(rows: Rows, losses: Floats) -> BaselineComparison | None:
    """A trial against the best baseline; none if no baseline has the study's metric.

    The best of many trials was chosen on these very rows: that luck is not in the interval (`confirmation` counts it).

    Args:
        losses: (S,) of the trial, from `trial_losses`.
    """
    best = best_baseline(rows)
    if best is None:
        return None
    baseline, value = best
    gains = rows.by_day(rows.losses(rows.baselines[baseline]) - losses)
    block = significance.block_length(gains, horizon=rows.horizon)
    return BaselineComparison(
        metric=rows.metric,
        baseline=baseline,
        baseline_value=value,
        trial_value=_value(rows.metric, losses.mean()),
        difference=significance.estimate(gains, significance.resample(len(gains), block)),
        n_rows=len(rows.labels),
    )


def compare_trial(study_folder: Path, spec: StudySpec, trial: TrialRecord) -> BaselineComparison | None:
    """The same from the predictions in a study's folder.

    Raises:
        FintxError: predictions that are missing, damaged or of other rows.
    """
    rows = read_rows(study_folder, spec)
    return compare(rows, trial_losses(study_folder, trial.trial_number, rows))


def _value(metric: str, loss: float) -> float:
    return float(1 - loss if metric in metrics.RANKINGS else loss)
