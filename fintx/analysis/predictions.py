"""Kept predictions: what every model said on the same validation rows, and its loss on each of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
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
    """The validation rows of a study, and what its baselines said of them."""

    predicts: Prediction
    metric: str
    """The study's."""
    n_seeds: int
    """Of each trial of the search (`study.replicates`)."""
    horizon: int
    fold: Ints
    """(S,)"""
    dates: np.ndarray
    """(S,) datetime64[D]."""
    labels: Floats
    """(S,)"""
    baselines: dict[str, Floats]
    """Name → (S,) outputs."""
    key: pa.Table
    """What identifies a row; other predictions must have the same."""

    @property
    def assets(self) -> np.ndarray:
        """(S,) names."""
        return np.asarray(self.key["asset"].to_pylist())

    def losses(self, outputs: Floats, *, metric: str | None = None) -> Floats:
        """(S,) whose mean is the metric as records hold it (1 − it for a ranking): mean over folds, and over seeds.

        A ranking orders the rows of a fold alone: each fold has a model of its own.

        Args:
            outputs: (S,) of one model, or (N, S) of a trial's seeds.
            metric: another one than the study's.

        Returns:
            NaN for all rows where a ranking is undefined in a fold.
        """
        if outputs.ndim == 2:
            return np.mean([self.losses(of_seed, metric=metric) for of_seed in outputs], axis=0)
        name, folds = metric or self.metric, np.unique(self.fold)
        found = np.empty(len(self.labels))
        means = []
        for fold in folds:
            inside = self.fold == fold
            losses = significance.row_losses(self.predicts, name, outputs[inside], self.labels[inside])
            means.append(losses.mean())
            # A fold counts as one, however many rows it has: its deviations are weighted; the mean is moved below.
            found[inside] = means[-1] + (losses - means[-1]) * len(found) / (len(folds) * len(losses))
        return found + (np.mean(means) - found.mean())

    def losses_among(self, chosen: np.ndarray, outputs: Floats) -> Floats:
        """(S,) losses of one model scored on some rows alone, a plain mean over them; NaN on the others.

        NaN too in a fold in which those rows are of one class, where a ranking is undefined.
        """
        found = np.full(len(self.labels), np.nan)
        for fold in np.unique(self.fold[chosen]):
            inside = chosen & (self.fold == fold)
            found[inside] = significance.row_losses(self.predicts, self.metric, outputs[inside], self.labels[inside])
        return found

    def take(self, places: Ints) -> Rows:
        """Some of the rows, in that order."""
        return dataclasses.replace(
            self,
            fold=self.fold[places],
            dates=self.dates[places],
            labels=self.labels[places],
            baselines={name: outputs[places] for name, outputs in self.baselines.items()},
            key=self.key.take(places),
        )

    def series(self, losses: Floats, *, chosen: np.ndarray | None = None) -> Floats:
        """(S, …) losses as a series of days."""
        return significance.by_day(losses, self.dates, chosen=chosen)


def read_baselines(study_folder: Path) -> dict[str, Any]:
    """What baselines.json holds: name → {"words", "metrics", "folds"}; empty where it is not there yet.

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
    """The rows that baselines.parquet holds.

    Raises:
        FintxError: the file is missing or isn't what fintx wrote.
    """
    path = study_folder / "baselines.parquet"
    table = _read(path, (*_KEY, "output", "baseline"))
    names = list(dict.fromkeys(table["baseline"].to_pylist()))
    if not names:
        raise FintxError(f"{path}: holds no baseline; move it and baselines.json away, and run the study again")
    each = {name: table.filter(pc.equal(table["baseline"], name)) for name in names}
    key = each[names[0]].select(_KEY)
    for name, part in each.items():
        _check_same(path, part, key, name)
    return Rows(
        predicts=spec.task.predicts,
        metric=spec.study.metric,
        n_seeds=spec.study.replicates,
        horizon=spec.task.horizon,
        fold=key["fold"].to_numpy(),
        dates=key["date"].to_numpy().astype("datetime64[D]"),
        labels=key["label"].to_numpy(),
        baselines={name: part["output"].to_numpy() for name, part in each.items()},
        key=key,
    )


def trial_losses(study_folder: Path, number: int, rows: Rows) -> Floats:
    """(S,) losses of a trial of the search, mean over its seeds: what every comparison of trials is made of.

    Raises:
        FintxError: as `read_seeds`.
    """
    return rows.losses(read_seeds(study_folder, number, rows))


def read_seeds(study_folder: Path, number: int, rows: Rows) -> Floats:
    """(N, S) outputs of each seed of a trial of the search, the first seed's first.

    Raises:
        FintxError: they are missing, damaged, too few, or of other rows than the baselines'.
    """
    folder = records.trial_folder(study_folder, number)
    outputs = [read_outputs(folder, rows)]
    if rows.n_seeds > 1:
        path = folder / "replicates.parquet"
        table = _read(path, (*_KEY, "output", "replicate"))
        for replicate in range(1, rows.n_seeds):
            part = table.filter(pc.equal(table["replicate"], replicate))
            _check_same(path, part, rows.key, f"its model of seed {replicate + 1}")
            outputs.append(part["output"].to_numpy())
    return np.array(outputs)


def read_outputs(folder: Path, rows: Rows) -> Floats:
    """(S,) outputs of the model whose predictions lie in a trial's or a rerun's folder: of a trial, its first seed's.

    Raises:
        FintxError: they are missing, damaged, or of other rows than the baselines'.
    """
    path = folder / "predictions.parquet"
    table = _read(path, (*_KEY, "output"))
    _check_same(path, table, rows.key, "its model")
    return table["output"].to_numpy()


def _read(path: Path, columns: tuple[str, ...]) -> pa.Table:
    try:
        return pq.read_table(path, columns=list(columns))
    except FileNotFoundError:
        raise FintxError(f"{path}: is not there; were its predictions made on another machine, or deleted?") from None
    except (OSError, pa.ArrowInvalid, pa.ArrowKeyError) as error:
        first = next(iter(str(error).splitlines()), "")
        raise FintxError(f"{path}: holds no predictions of fintx ({first}); restore it from a copy") from None


def _check_same(path: Path, table: pa.Table, key: pa.Table, who: str) -> None:
    if table.num_rows != key.num_rows or not all(table[column].equals(key[column]) for column in _KEY):
        raise FintxError(
            f"{path}: {who} was scored on other rows than the baselines ({table.num_rows:,} against "
            f"{key.num_rows:,}), so their losses can't be compared"
        )


def series_of(losses: Mapping[Any, Floats], rows: Rows) -> Floats:
    """(D, M) losses by day, a column per model; (D, 0) of none."""
    columns = [rows.series(of_model) for of_model in losses.values()]
    return np.column_stack(columns) if columns else np.zeros((len(np.unique(rows.dates)), 0))


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
    """The verdict in words: on which side of zero the whole interval lies, if on one."""
    return "ahead" if difference.positive else "behind" if difference.negative else "can't be told apart"


def best_baseline(rows: Rows, *, among: Iterable[str] | None = None) -> tuple[str, float] | None:
    """The baseline that is best in the study's metric on these rows, and its value; none where none has one.

    Args:
        among: names to choose from; none: all.
    """
    names = rows.baselines if among is None else among
    means = {name: float(rows.losses(rows.baselines[name]).mean()) for name in names}
    defined = {name: mean for name, mean in means.items() if mean == mean}  # NaN: one class alone in a fold
    if not defined:
        return None
    name = min(defined, key=lambda each: defined[each])
    return name, _value(rows.metric, defined[name])


def compare(rows: Rows, losses: Floats) -> BaselineComparison | None:
    """A trial against the best baseline; none where no baseline has the study's metric.

    The best of many trials was chosen on these very rows: that luck is not in the interval (`study.confirmation`).

    Args:
        losses: (S,) of the trial, as `predictions.trial_losses` reads them.
    """
    best = best_baseline(rows)
    if best is None:
        return None
    name, value = best
    saved = rows.series(rows.losses(rows.baselines[name]) - losses)
    block = significance.block_length(saved, horizon=rows.horizon)
    difference = significance.estimate(saved, significance.resample(len(saved), block))
    return BaselineComparison(
        metric=rows.metric,
        baseline=name,
        baseline_value=value,
        trial_value=_value(rows.metric, float(losses.mean())),
        difference=difference,
        n_rows=len(rows.labels),
    )


def compare_trial(study_folder: Path, spec: StudySpec, trial: TrialRecord) -> BaselineComparison | None:
    """The same from the predictions kept in a study's folder.

    Raises:
        FintxError: predictions that are missing, damaged or of other rows.
    """
    rows = read_rows(study_folder, spec)
    return compare(rows, trial_losses(study_folder, trial.trial_number, rows))


def _value(metric: str, loss: float) -> float:
    return 1 - loss if metric in metrics.RANKINGS else loss
