"""What did every model say on the validation rows? Read from the kept predictions, on identical rows, as losses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fintx.config.schema import StudySpec
from fintx.evaluate import significance
from fintx.evaluate.significance import RowLoss
from fintx.study import records
from fintx.tasks import Prediction
from fintx.types import FintxError, Floats, Ints

_KEY = ("fold", "date", "asset", "label")


@dataclass(frozen=True, eq=False)
class Rows:
    """The validation rows of a study, and what its baselines said of them."""

    predicts: Prediction
    loss: RowLoss
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

    def losses(self, outputs: Floats) -> Floats:
        """(S,) of a model's outputs."""
        return significance.row_losses(self.predicts, self.loss, outputs, self.labels)

    def series(self, losses: Floats, *, chosen: np.ndarray | None = None) -> Floats:
        """(S, …) losses as a series of days."""
        return significance.by_day(losses, self.dates, chosen=chosen)

    @property
    def best_baseline(self) -> str:
        """That with the least mean loss over all rows."""
        return min(self.baselines, key=lambda name: self.losses(self.baselines[name]).mean())


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
        loss=significance.loss_name(spec.study.metric),
        horizon=spec.task.horizon,
        fold=key["fold"].to_numpy(),
        dates=key["date"].to_numpy().astype("datetime64[D]"),
        labels=key["label"].to_numpy(),
        baselines={name: part["output"].to_numpy() for name, part in each.items()},
        key=key,
    )


def read_outputs(folder: Path, rows: Rows) -> Floats:
    """(S,) outputs of the model whose predictions lie in a trial's or a member's folder.

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


def series_of(outputs: Mapping[Any, Floats], rows: Rows) -> Floats:
    """(D, M) losses by day, a column per model; (D, 0) of none."""
    columns = [rows.series(rows.losses(each)) for each in outputs.values()]
    return np.column_stack(columns) if columns else np.zeros((len(np.unique(rows.dates)), 0))
