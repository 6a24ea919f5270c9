"""What does a study's folder hold to judge it by? Its records, and every loss on every validation row.

Reads records and predictions alone, never logs; works on a study that is half finished. What is missing is said in
`notes`, a line each, and what depends on it is left out.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fintx.config import StudySpec
from fintx.evaluate import metrics
from fintx.report import days
from fintx.report.days import Draws
from fintx.study import records
from fintx.study.records import StudyFile, TrialRecord
from fintx.types import FintxError, Floats

_ROW = ("fold", "date", "asset", "label")


class NoEvidence(FintxError):
    """The folder holds nothing that could be reported, or what may not be compared."""


@dataclass(frozen=True, eq=False)
class Rows:
    """The validation rows, in the order of the kept predictions."""

    fold: np.ndarray
    date: np.ndarray
    """(S,) datetime64[D]."""
    asset: np.ndarray
    """(S,) str."""
    label: Floats
    """(S,) 0 or 1, or a log return."""


@dataclass(frozen=True, eq=False)
class Evidence:
    """A study as far as it is. Losses are the mean log loss (nats) or squared error per row, lower is better."""

    folder: Path
    study: StudyFile
    records: tuple[TrialRecord, ...]
    """Every finished trial, by number."""
    baselines: dict[str, Any]
    """name → words and metrics, as `study.trial` keeps them."""
    rows: Rows | None
    """None where no predictions are here."""
    outputs: dict[int, Floats]
    """Trial number → (S,) logits or log returns, of the successful trials whose predictions are here."""
    baseline_outputs: dict[str, Floats]
    notes: tuple[str, ...]

    @property
    def spec(self) -> StudySpec:
        """What the study asks."""
        return self.study.spec

    @property
    def minimize(self) -> bool:
        """Whether less of the study's metric is better."""
        return metrics.MINIMIZE[self.spec.study.metric]

    @functools.cached_property
    def ranked(self) -> tuple[TrialRecord, ...]:
        """The successful trials, best first by the study's metric."""
        return tuple(records.ranked(list(self.records), minimize=self.minimize))

    @property
    def best(self) -> TrialRecord | None:
        """The best trial; none where none succeeded."""
        return next(iter(self.ranked), None)

    @functools.cached_property
    def losses(self) -> dict[int, Floats]:
        """Trial number → (S,) loss per row."""
        return {number: self._loss(outputs) for number, outputs in self.outputs.items()}

    @functools.cached_property
    def baseline_losses(self) -> dict[str, Floats]:
        """Baseline → (S,) loss per row."""
        return {name: self._loss(outputs) for name, outputs in self.baseline_outputs.items()}

    def _loss(self, outputs: Floats) -> Floats:
        assert self.rows is not None
        return metrics.per_sample_loss(self.spec.task.kind, outputs, self.rows.label)

    @property
    def rival(self) -> str | None:
        """The best baseline by the study's metric; none where no baseline has it."""
        metric = self.spec.study.metric
        scored = {name: held["metrics"].get(metric) for name, held in self.baselines.items()}
        found = {name: value for name, value in scored.items() if value is not None}
        sign = 1 if self.minimize else -1
        return min(found, key=lambda name: sign * found[name]) if found else None

    @functools.cached_property
    def prior_loss(self) -> float | None:
        """Mean loss of the training prior on the rows: what skill is measured by."""
        held = self.baseline_losses.get("prior")
        return None if held is None else float(held.mean())

    @functools.cached_property
    def draws(self) -> Draws | None:
        """Resamples of the validation days, for differences to the best baseline (or to the best trial)."""
        if self.rows is None or not self.losses:
            return None
        best = next((r.trial_number for r in self.ranked if r.trial_number in self.losses), None)
        assert best is not None
        against = self.baseline_losses.get(self.rival or "")
        series = self.losses[best] - against if against is not None else self.losses[best]
        return days.draw(self.rows.date, series[None], horizon=self.spec.task.horizon)


def read(folder: Path) -> Evidence:
    """All that a study's folder holds.

    Raises:
        NoEvidence: no study there, no finished trial, or trials that were scored on different labels.
        DamagedRecord: a file that does not hold what fintx wrote.
    """
    study = records.read_study(folder)
    if study is None:
        raise NoEvidence(f"{folder}: holds no study (no study.json); give a study's folder, such as outputs/demo")
    finished = records.read_all(folder)
    if not finished:
        raise NoEvidence(
            f"{folder}: has no finished trial yet; run it (just sweep …), then report as often as you like"
        )
    check_labels({f"trial {r.trial_number}": r for r in finished}, where=str(folder))
    held = _json(folder / "baselines.json")
    tables, notes = _predictions(folder, finished)
    kept = _baseline_tables(folder, held, notes)
    rows, outputs, baseline_outputs = _aligned(tables, kept, notes)
    return Evidence(folder, study, tuple(finished), held, rows, outputs, baseline_outputs, tuple(notes))


def check_labels(found: Mapping[str, TrialRecord], *, where: str) -> None:
    """Losses on different labels are never ranked together.

    Raises:
        NoEvidence: with which are of which hash.
    """
    hashes: dict[str, list[str]] = {}
    for name, record in found.items():
        for label_hash in sorted({fold.label_hash for fold in record.folds}):
            hashes.setdefault(label_hash, []).append(name)
    if len(hashes) > 1:
        groups = sorted(hashes.items(), key=lambda pair: -len(pair[1]))
        words = "; ".join(f"{label_hash[:12]}: {_some(names)}" for label_hash, names in groups)
        raise NoEvidence(f"{where}: its trials were scored on different labels, which can't be ranked together ({words})")


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:4]) + (f" and {len(listed) - 4} more" if len(listed) > 4 else "")


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError:
        raise records.DamagedRecord(f"{path}: is not what fintx wrote; remove it, and the next run makes it again") from None


def _table(path: Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        reason = str(error).splitlines()[0]
        raise records.DamagedRecord(f"{path}: can't be read ({reason}); restore it from a copy, or remove it") from None


def _predictions(folder: Path, finished: list[TrialRecord]) -> tuple[dict[int, pa.Table], list[str]]:
    tables, missing = {}, []
    for record in finished:
        if record.value is None:
            continue
        path = records.trial_folder(folder, record.trial_number) / "predictions.parquet"
        if path.is_file():
            tables[record.trial_number] = _table(path)
        else:
            missing.append(f"trial {record.trial_number}" + (f" (ran on {record.host})" if record.host else ""))
    notes = []
    if missing:
        notes.append(
            f"Predictions are missing of {_some(missing)}: what is compared row by row leaves them out; "
            "copy their predictions.parquet here."
        )
    return tables, notes


def _baseline_tables(folder: Path, held: dict[str, Any], notes: list[str]) -> dict[str, pa.Table]:
    path = folder / "baselines.parquet"
    if not path.is_file():
        notes.append(f"{path} is missing: no comparison with a baseline row by row; the next run of the study makes it.")
        return {}
    table = _table(path)
    return {name: table.filter(pc.equal(table["baseline"], name)) for name in held}


def _aligned(
    tables: dict[int, pa.Table], kept: dict[str, pa.Table], notes: list[str]
) -> tuple[Rows | None, dict[int, Floats], dict[str, Floats]]:
    """Outputs over one set of rows; whatever was scored on other rows is left out and said."""
    every: dict[Any, pa.Table] = {**kept, **tables}
    if not every:
        return None, {}, {}
    reference = next(iter(every.values())).select(_ROW)
    strangers = [name for name, table in every.items() if not table.select(_ROW).equals(reference)]
    if strangers:
        named = [f"trial {name}" if isinstance(name, int) else str(name) for name in strangers]
        notes.append(f"Scored on other rows and left out of comparisons: {_some(named)}.")
    same = {name: table["output"].to_numpy() for name, table in every.items() if name not in strangers}
    rows = Rows(
        fold=reference["fold"].to_numpy(),
        date=reference["date"].to_numpy().astype("datetime64[D]"),
        asset=np.asarray(reference["asset"].to_pylist()),
        label=reference["label"].to_numpy().astype(np.float64),
    )
    outputs = {name: values for name, values in same.items() if isinstance(name, int)}
    return rows, outputs, {name: values for name, values in same.items() if isinstance(name, str)}
