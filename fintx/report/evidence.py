"""What does a study's folder hold to judge it by? Its records, and every loss on every validation day.

Reads records and predictions alone, never logs; works on a study that is half finished. What is missing is said in
`notes`, a line each, and what depends on it is left out.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fintx.config.schema import StudySpec
from fintx.evaluate import metrics, significance
from fintx.evaluate.significance import Resamples
from fintx.study import lead, predictions, records
from fintx.study.lead import BaselineComparison
from fintx.study.predictions import Rows
from fintx.study.records import StudyFile, TrialRecord
from fintx.types import FintxError, Floats

LOSS_WORDS = {"log_loss": "log loss", "brier": "Brier score", "mse": "squared error", "mae": "absolute error",
              "auc": "1 − AUC", "average_precision": "1 − average precision"}  # fmt: skip


class NoEvidence(FintxError):
    """The folder holds nothing that could be reported, or what may not be compared."""


@dataclass(frozen=True, eq=False)
class Evidence:
    """A study as far as it is. Losses are those of the study's metric: 1 − it for a ranking."""

    folder: Path
    study: StudyFile
    records: tuple[TrialRecord, ...]
    """Every finished trial, by number."""
    baselines: dict[str, Any]
    """name → words and metrics, as `study.trial` keeps them."""
    rows: Rows | None
    """None where the baselines' predictions are missing: then nothing is compared row by row."""
    seeds: dict[int, Floats]
    """Trial number → (N, S) logits or log returns of its seeds, of the successful trials whose predictions are here."""
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        """The study's."""
        return self.folder.resolve().name

    @property
    def spec(self) -> StudySpec:
        """What the study asks."""
        return self.study.spec

    @property
    def metric(self) -> str:
        """The study's."""
        return self.spec.study.metric

    @functools.cached_property
    def outputs(self) -> dict[int, Floats]:
        """Trial number → (S,) outputs of its first seed: what one model says, for all that isn't a loss."""
        return {number: of_seeds[0] for number, of_seeds in self.seeds.items()}

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

    @property
    def skill_loss(self) -> str:
        """The loss that skill is a share of: the study's metric, or log loss where that is a ranking."""
        return significance.skill_loss(self.metric)

    @property
    def skill_key(self) -> str:
        """The metric that says how much of the prior's loss is saved."""
        return metrics.SKILLS[self.skill_loss]

    def skill(self, scored: dict[str, Any]) -> float | None:
        """1 − loss / loss of the training prior, of metrics as records and baselines hold them."""
        return scored.get(self.skill_key)

    @functools.cached_property
    def rival(self) -> str | None:
        """The best baseline; none without the baselines' predictions."""
        best = None if self.rows is None else lead.best_baseline(self.rows)
        return None if best is None else best[0]

    @functools.cached_property
    def comparison(self) -> BaselineComparison | None:
        """The best trial against the best baseline; none without their predictions."""
        if self.rows is None or self.best is None or self.best.trial_number not in self.seeds:
            return None
        return lead.compare(self.rows, self.rows.losses(self.seeds[self.best.trial_number]))

    @functools.cached_property
    def series(self) -> dict[int, Floats]:
        """Trial number → (D,) losses by day, mean over its seeds."""
        return {number: self.by_day(of_seeds) for number, of_seeds in self.seeds.items()}

    @functools.cached_property
    def baseline_series(self) -> dict[str, Floats]:
        """Baseline → (D,) losses by day."""
        held = {} if self.rows is None else self.rows.baselines
        return {name: self.by_day(outputs) for name, outputs in held.items()}

    @functools.cached_property
    def skill_series(self) -> dict[int, Floats]:
        """Trial number → (D,) losses by day that skill is a share of."""
        if self.skill_loss == self.metric:
            return self.series
        return {number: self.by_day(of_seeds, metric=self.skill_loss) for number, of_seeds in self.seeds.items()}

    @functools.cached_property
    def prior_skill_series(self) -> Floats | None:
        """(D,) the same of the prior; none without its predictions."""
        prior = None if self.rows is None else self.rows.baselines.get("prior")
        return None if prior is None else self.by_day(prior, metric=self.skill_loss)

    def by_day(self, outputs: Floats, *, metric: str | None = None) -> Floats:
        """(S,) outputs, or (N, S) of several seeds → (D,) losses by day."""
        assert self.rows is not None
        return self.rows.series(self.rows.losses(outputs, metric=metric))

    @functools.cached_property
    def resamples(self) -> Resamples | None:
        """Draws of the validation days, in blocks as long as the best trial's difference to the best baseline asks
        for: those of `comparison`. Where its predictions aren't here, the middle length of all trials' differences."""
        if not self.series or self.rival is None:
            return None
        against = self.baseline_series[self.rival]
        best = None if self.best is None else self.series.get(self.best.trial_number)
        compared = [best] if best is not None else list(self.series.values())
        gains = np.stack([against - each for each in compared], axis=1)
        block = significance.block_length(gains, horizon=self.spec.task.horizon)
        return significance.resample(len(gains), block)


def read(folder: Path) -> Evidence:
    """All that a study's folder holds.

    Raises:
        NoEvidence: no study there, no finished trial, or trials that were scored on different labels.
        FintxError: a file that does not hold what fintx wrote.
    """
    study = records.read_study(folder)
    if study is None:
        raise NoEvidence(f"{folder}: holds no study (no study.json); give a study's name, or its folder")
    finished = records.read_all(folder)
    if not finished:
        raise NoEvidence(
            f"{folder}: has no finished trial yet; run it (just sweep …), then report as often as you like"
        )
    _check_labels(folder, finished)
    notes: list[str] = []
    rows = _rows(folder, study.spec, notes)
    seeds = {} if rows is None else _seeds(folder, finished, rows, notes)
    return Evidence(folder, study, tuple(finished), predictions.read_baselines(folder), rows, seeds, tuple(notes))


def _check_labels(folder: Path, finished: Sequence[TrialRecord]) -> None:
    """Losses on different labels are never ranked together."""
    hashes: dict[str, list[str]] = {}
    for record in finished:
        for label_hash in sorted({fold.label_hash for fold in record.folds}):
            hashes.setdefault(label_hash, []).append(f"trial {record.trial_number}")
    if len(hashes) > 1:
        groups = sorted(hashes.items(), key=lambda pair: -len(pair[1]))
        words = "; ".join(f"{label_hash[:12]}: {some(names)}" for label_hash, names in groups)
        raise NoEvidence(
            f"{folder}: its trials were scored on different labels and can't be ranked together (label hash {words}); "
            "move the trials that don't belong to the study away"
        )


def some(names: Iterable[str]) -> str:
    """The first few of a list, and how many more there are."""
    listed = list(names)
    return ", ".join(listed[:4]) + (f" and {len(listed) - 4} more" if len(listed) > 4 else "")


def _rows(folder: Path, spec: StudySpec, notes: list[str]) -> Rows | None:
    if (folder / "baselines.parquet").is_file():
        return predictions.read_rows(folder, spec)
    notes.append(
        f"{folder / 'baselines.parquet'} is missing: nothing can be compared row by row; "
        "the next run of the study makes it again."
    )
    return None


def _seeds(folder: Path, finished: Sequence[TrialRecord], rows: Rows, notes: list[str]) -> dict[int, Floats]:
    """Of the successful trials whose predictions are here; the others are named."""
    found, missing = {}, []
    for record in finished:
        where = records.trial_folder(folder, record.trial_number)
        if record.value is None:
            continue
        if (where / "predictions.parquet").is_file():
            found[record.trial_number] = predictions.read_seeds(folder, record.trial_number, rows)
        else:
            missing.append(f"trial {record.trial_number}" + (f" (ran on {record.host})" if record.host else ""))
    if missing:
        notes.append(
            f"predictions.parquet is missing of {some(missing)}: left out of all that is compared row by row; "
            "copy the trial's folder here."
        )
    return found
